"""How many images a second our loader gives, next to other loaders and to the decoder alone, on the same images.

    python tools/bench/loader.py                      every workload, 1 process and 2 workers: about ten minutes
    python tools/bench/loader.py --quick              fewer programs and images, 2 workers: about two minutes
    python tools/bench/loader.py --only xray,colour256 --workers 2 --rounds 9
    python tools/bench/loader.py --make-peers runs/bench/peers     first: peers that need an environment of their own

Each loader is a program of its own. All of one workload are started, then each runs for a second or so while the
others are stopped, round after round; printed are median, smallest and largest of the rounds. The images are drawn
once and kept in --data (0.3 GB). All is in the page cache; every program's libraries have one thread, so that only the
workers count: processes of the peers, threads of DALI, of the decoder and, unless named otherwise, of ours. Nobody
does anything with the batches. Programs that are not installed are listed with the command that installs them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import tables
from bench.bench_data import Data, Drawn, prepare
from bench.conductor import run
from bench.line_up import Line, line_up
from bench.peer_environments import PEERS, make_peers
from scaletransfer.cli import CommandParser, run_command

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs" / "bench"
QUICK_SHARE = 4
LEAST = {"xray": 32, "xray256": 200, "colour": 200}
"""Images of a set: each of two workers, which share the shards, must have enough to fill a batch."""
SETS = {
    "xray": Drawn(name="xray", images=64, height=2828, width=2320, channels=1, kilobytes=618, quality=90),
    "xray256": Drawn(name="xray256", images=2000, height=312, width=256, channels=1, kilobytes=21, quality=95),
    "colour": Drawn(
        name="colour", images=800, height=375, width=500, channels=3, kilobytes=81, quality=95, falloff=1.2
    ),
    "colour256": Drawn(
        name="colour256",
        images=800,
        height=375,
        width=500,
        channels=3,
        kilobytes=81,
        quality=95,
        falloff=1.2,
        short_side=256,
    ),
}
TITLES = {
    "xray": "X-rays as published to 224, affine augmentation",
    "xray256": "X-ray shards with short side 256 to 224",
    "colour": "photographs as published to 224, RandomResizedCrop and flip",
    "colour256": "colour shards with short side 256 to 224, RandomResizedCrop and flip",
}


def main(argv: Sequence[str]) -> int:
    """Measure and print tables; 0. Raises ValueError for options that have no meaning."""
    options = _parser().parse_args(argv)
    if options.make_peers:
        make_peers(options.make_peers, print)
        return 0
    chosen = _listed(options.only, SETS, "--only")
    workers = _workers(options.workers or ("2" if options.quick else "0,2"))
    images = _images(options.images, options.quick)
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    seconds = options.seconds if options.seconds is not None else 0.6 if options.quick else 1.2
    if rounds < 1 or seconds <= 0:
        raise ValueError("--rounds must be at least 1 and --seconds above 0")
    print(tables.conditions(rounds, seconds), flush=True)
    found: dict[str, list[Line]] = {}
    for name in chosen:
        data = drawn_set(name, options.data, images, _say)
        lines = line_up(name, data, options.peers, options.quick)
        for count in workers:
            programs = [program for line in lines if (program := line.program(count)) is not None]
            run(programs, rounds, seconds, options.data, _say)
        found[name] = lines
        print(f"\n## {TITLES[name]}\n\n{data.describe()}; batches of {lines[0].batch}\n")
        print(tables.table(lines, workers), flush=True)
    print("\n" + tables.promises(found))
    if options.json:
        options.json.write_text(json.dumps(tables.as_json(found), indent=1))
    return 0


def drawn_set(name: str, folder: Path, images: Mapping[str, int], say: Callable[[str], None]) -> Data:
    """A set of SETS with another number of images, drawn unless it is there. Of photographs, both sets are the same."""
    drawn = SETS[name]
    source = "colour" if name == "colour256" else name
    if images[source] != drawn.images:
        drawn = replace(drawn, images=images[source], name=f"{name}-{images[source]}")
    files = drawn_set("colour", folder, images, say) if name == "colour256" else None
    return prepare(drawn, folder, say, files)


def _images(given: Sequence[str], quick: bool) -> dict[str, int]:
    """The number of images of each set."""
    share = QUICK_SHARE if quick else 1
    found = {name: max(least, SETS[name].images // share) for name, least in LEAST.items()}
    for text in given:
        name, _, number = text.partition("=")
        if name not in LEAST:
            raise ValueError(f"--images {text}: give NAME=N with one of the names {', '.join(LEAST)}")
        if not number.isdecimal() or int(number) < LEAST[name]:
            raise ValueError(f"--images {text}: give at least {LEAST[name]} images of {name}")
        found[name] = int(number)
    return found


def _workers(text: str) -> list[int]:
    if not all(number.isdecimal() for number in text.split(",")):
        raise ValueError(f"--workers {text}: give numbers with commas between them, such as 0,2")
    return [int(number) for number in text.split(",")]


def _say(text: str) -> None:
    """Progress, where somebody looks."""
    if sys.stderr.isatty() or os.environ.get("BENCH_VERBOSE"):
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _listed(text: str, known: Sequence[str] | dict[str, Drawn], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: there are {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/loader.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(SETS), metavar="A,B", help=f"workloads (default: {', '.join(SETS)})")
    add("--workers", metavar="N,M", help="numbers of workers, 0 is the process itself (default: 0,2; quick: 2)")
    add("--images", action="append", default=[], metavar="NAME=N", help="images to draw for xray, xray256 or colour")
    add("--rounds", type=int, metavar="N", help="how often each program is measured (default: 5; quick: 2)")
    add("--seconds", type=float, metavar="S", help="for how long each time (default: 1.2; quick: 0.6)")
    add("--data", type=Path, default=RUNS / "data", help="folder of the drawn images (default: runs/bench/data)")
    peers = ", ".join(name for name, peer in PEERS.items() if peer.environment)
    add("--peers", type=Path, default=RUNS / "peers", help=f"folder of the environments of {peers} (runs/bench/peers)")
    add("--make-peers", type=Path, metavar="DIR", help="make these environments (6 GB), and stop")
    add("--json", type=Path, metavar="FILE", help="write the rate of every round too")
    add("--quick", action="store_true", help="leave out variants, a quarter of the images")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
