"""How much memory a rank takes under each engine, next to what its shares of parameters, gradients and momentum are.

    python tools/bench/memory.py             every engine, 1, 2 and 4 ranks, R101x1 with 21,842 classes
    python tools/bench/memory.py --engines fsdp2,zero3 --ranks 2 --model BiT-M-R50x3
    python tools/bench/memory.py --model BiT-M-R152x4 --engines fsdp2,zero3 --ranks 2 --checkpointing on
    python tools/bench/memory.py --write docs/ENGINES.md    puts the table between the marks there; lines of the same
                                                            network and batch that are not measured again stay

Every line is a launch of its own, as a user would start it, with images of noise. "peak" is the largest resident size
of a rank (libraries and their 0.5 GB included), while the engine is built and while it trains. "state" is what
the storages of parameters, masters, gradients and momentum hold between backward and step; the share beside it is
(parameters + gradients + momentum) / ranks in float32. "beyond" is how far the start's peak, without the libraries,
is above that share and the largest block: fsdp2 and zero3 promise at most 1 GiB. On CPUs with
gloo; a GPU's memory is counted by nobody here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

from bench.launched import launch as run_ranks  # noqa: E402
from bench.page import check, joined, put  # noqa: E402
from scaletransfer.cli import CommandParser, run_command  # noqa: E402 (the checkout's own, installed or not)
from scaletransfer.engine.strategy import ENGINES  # noqa: E402

GB = 1e9
ROOM = 2**30
"""What a start may take beyond what it leaves and one block: libraries' buffers, the tensor that is being drawn."""


def launch(engine: str, ranks: int, spec: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """What each rank measured.

    Raises:
        ValueError: the run failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        case = Path(name) / "spec.json"
        case.write_text(json.dumps(spec))
        script = [str(Path(__file__).with_name("memory_worker.py")), str(case)]
        run_ranks(engine, ranks, script, threads=spec["threads"], limit=limit)
        return [json.loads((Path(name) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def facts(engine: str, ranks: int, checkpointing: bool, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line of the table: of the rank that takes most; bytes."""
    held = [sum(rank["held"].values()) for rank in found]
    share = 3 * 4 * found[0]["parameters"] / ranks
    start = max(rank["birth_peak"] - rank["base"] - share - rank["largest_block"] for rank in found)
    return {
        "engine": engine,
        "ranks": ranks,
        "checkpointing": checkpointing,
        "base": max(rank["base"] for rank in found),
        "birth_peak": max(rank["birth_peak"] for rank in found),
        "train_peak": max(step["peak"] for rank in found for step in rank["steps"]),
        "held": max(held),
        "expected": max(sum(rank["expected"].values()) for rank in found),
        "share": share,
        "start_beyond": start,
        "seconds": sorted(step["seconds"] for step in found[0]["steps"])[len(found[0]["steps"]) // 2],
        "loss": [step["loss"] for step in found[0]["steps"]],
    }


HEAD = [
    "| engine | ranks | recompute | peak, start | beyond | peak, steps | state | share | state / share | by formula "
    "| s a step |",
    "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]
WAYS = {False: "weights only", True: "blocks"}
BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"


def line(row: dict[str, Any]) -> str:
    """One line of the table, in GB."""
    numbers = [row["birth_peak"], row["start_beyond"], row["train_peak"], row["held"], row["share"]]
    cells = [f"{number / GB:.2f}" for number in numbers]
    cells += [f"{row['held'] / row['share']:.2f}", f"{row['expected'] / GB:.2f}", f"{row['seconds']:.1f}"]
    return f"| {row['engine']} | {row['ranks']} | {WAYS[row['checkpointing']]} | " + " | ".join(cells) + " |"


def update(path: Path, title: str, lines: Sequence[str]) -> None:
    """Put the table into a page, beside lines of the same ``title`` that it has already."""
    old = check(path, BEGIN, END)[1]
    ways = list(WAYS.values())
    table = joined(
        old if title in old else "",
        [*HEAD, *lines],
        3,
        lambda key: (ENGINES.index(key[0]), int(key[1]), ways.index(key[2])),
    )
    put(path, BEGIN, END, "\n".join([title, "", *table]))


def main(argv: Sequence[str]) -> int:
    """Measure and print; 0, or 1 where fsdp2 or zero3 hold more than they may."""
    options = _parser().parse_args(argv)
    spec = {
        "model": options.model,
        "classes": options.classes,
        "size": options.size,
        "micro_batch": options.micro_batch,
        "optimizer": options.optimizer,
        "steps": options.steps,
        "threads": options.threads,
    }
    ways = {"on": [True], "off": [False], "both": [False, True]}[options.checkpointing]
    rows, broken = [], []
    title = (
        f"{options.model}, {options.classes:,} classes, {options.micro_batch} images of {options.size} pixels a rank:"
    )
    print("\n".join([title, "", *HEAD]), flush=True)
    if options.write:
        check(options.write, BEGIN, END)  # before minutes are spent
    for engine in options.engines.split(","):
        if engine not in ENGINES:
            raise ValueError(f"--engines {engine}: there are {', '.join(ENGINES)}")
        for ranks in [1] if engine == "single" else [int(number) for number in options.ranks.split(",")]:
            if engine == "hsdp" and ranks != 4:
                continue
            for way in ways:
                row = facts(engine, ranks, way, launch(engine, ranks, {**spec, "checkpointing": way}, options.limit))
                rows.append(row)
                print(line(row), flush=True)
                if options.write:
                    update(options.write, title, [line(row)])
                broken += promises(row)
    for sentence in broken:
        print(f"not kept: {sentence}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if broken else 0


def promises(row: dict[str, Any]) -> list[str]:
    """What fsdp2 and zero3 promise and this line does not keep."""
    if row["engine"] not in ("fsdp2", "zero3"):
        return []
    name, found = f"{row['engine']} on {row['ranks']} ranks", []
    if not 0.9 <= row["held"] / row["share"] <= 1.1:
        found.append(f"{name} holds {row['held'] / row['share']:.2f} of its share")
    if row["start_beyond"] > ROOM:
        found.append(f"{name} takes {row['start_beyond'] / GB:.2f} GB beyond its share and a block to start")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="BiT-M-R101x1", help="network (default: BiT-M-R101x1)")
    add("--classes", type=int, default=21_842, help="outputs (default: 21842, as ImageNet-21k has)")
    add("--size", type=int, default=64, help="side of the images in pixels (default: 64)")
    add("--micro-batch", type=int, default=2, help="images a rank (default: 2)")
    add("--engines", default=",".join(ENGINES), metavar="A,B", help="engines (default: all)")
    add("--ranks", default="1,2,4", metavar="N,M", help="numbers of ranks (default: 1,2,4; single has one, hsdp four)")
    add("--checkpointing", choices=("on", "off", "both"), default="both", help="recompute blocks (default: both)")
    add("--optimizer", choices=("sgd", "sgd_agc"), default="sgd_agc", help="(default: sgd_agc)")
    add("--steps", type=int, default=3, help="(default: 3)")
    add("--threads", type=int, default=1, help="threads of a rank (default: 1)")
    add("--limit", type=float, default=3600, help="seconds that one launch may take (default: 3600)")
    add("--write", type=Path, metavar="FILE", help="also put the table between the marks in this file")
    add("--json", type=Path, metavar="FILE", help="write the numbers too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
