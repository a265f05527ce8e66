"""The same training on every engine: how far each is from a single process, in a table.

    python tools/bench/parity.py --write docs/ENGINES.md         all engines and ranks, about 15 minutes on two cores
    python tools/bench/parity.py --engines ddp zero2 --ranks 2

Same seed, data and global batch of 24; each launch loops over both optimizers, multi-class and masked multi-label
targets (in the first step, ranks that know no label at all), accumulation 1 and 2, activation checkpointing off and on,
and float64 as well as float32 where the engine allows. All are compared with a single process that does neither
accumulate nor checkpoint. The network is a small BiT without kinks, see parity_worker.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.page import check, put
from bench.parity_worker import STEPS, Case, all_cases
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.engine.strategy import ENGINES

TOOLS = Path(__file__).resolve().parents[1]
RANKS = {"single": (1,), "ddp": (2, 3, 4), "hsdp": (4,)}
"""Of the others 1 to 4: one process of ddp is single, and hybrid sharding needs two replicas of two."""
BEGIN, END = "<!-- parity: written by tools/bench/parity.py -->", "<!-- parity: end -->"
LOSS_BOUND, WEIGHT_BOUND, FLOAT64_BOUND = 1e-5, 1e-4, 1e-10


@dataclass(frozen=True)
class Gap:
    """How far one run is from the reference: of the losses the largest relative difference, of the weights the norm."""

    loss: float
    weights: float


Found = dict[str, dict[str, Any]]
"""By name of a case, what a rank saw (`parity_worker.train`)."""


def launches() -> list[tuple[str, int]]:
    """Every engine with every number of ranks that makes sense of 1 to 4."""
    return [(engine, ranks) for engine in ENGINES for ranks in RANKS.get(engine, (1, 2, 3, 4))]


def launch(engine: str, ranks: int, references: Path, *, limit: float = 1800) -> list[Found]:
    """All cases of an engine, by rank. A single process writes the reference weights to ``references``.

    Raises:
        RuntimeError: a process failed or the limit (seconds) passed; with the last lines of the output.
    """
    with tempfile.TemporaryDirectory(prefix="scaletransfer-parity-") as folder:
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps({"references": str(references), "folder": folder}))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(TOOLS.parent / "launch" / f"{engine}.yaml"), "--num_processes", str(ranks)]
        path = os.pathsep.join([str(TOOLS.parent), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        try:
            done = subprocess.run(
                [*command, "-m", "bench.parity_worker", str(spec)],
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{engine} on {ranks} ranks: {limit:.0f} s passed") from error
        if done.returncode:
            raise RuntimeError(f"{engine} on {ranks} ranks: exit {done.returncode}\n{done.stdout[-4000:]}")
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def gap(case: Case, precision: str, ranks: Sequence[Found], single: Found) -> Gap:
    """The largest gap of any rank to the single process in ``precision``."""
    wanted = single[case.base(precision).name]["loss"]
    assert len(wanted) == STEPS and abs(wanted[-1] - wanted[0]) > 0.1 * wanted[0], "nothing is learned or compared"
    losses = [rank[case.name]["loss"] for rank in ranks]
    return Gap(
        max(abs(a - b) / abs(b) for loss in losses for a, b in zip(loss, wanted, strict=True)),
        max(rank[case.name]["weights"][precision] for rank in ranks),
    )


def within(case: Case, precision: str, found: Gap) -> bool:
    """Whether a gap is inside what is promised."""
    if case.precision == precision == "fp64":
        return found.loss <= FLOAT64_BOUND and found.weights <= FLOAT64_BOUND
    return found.loss <= LOSS_BOUND and found.weights <= WEIGHT_BOUND


def row(engine: str, ranks: Sequence[Found], single: Found) -> tuple[str, list[str]]:
    """A line of the table, and a sentence for each case that is out of bounds."""
    worst: dict[tuple[str, str], Gap] = {}
    beyond = []
    for case in all_cases(engine):
        for precision in ("fp64",) if case.precision == "fp64" else ("fp32", "fp64"):
            found = gap(case, precision, ranks, single)
            key = (case.precision, precision)
            before = worst.get(key, Gap(0.0, 0.0))
            worst[key] = Gap(max(before.loss, found.loss), max(before.weights, found.weights))
            if not within(case, precision, found):
                beyond.append(
                    f"{engine} on {len(ranks)} ranks, {case.name}: losses are {found.loss:.1e} and weights "
                    f"{found.weights:.1e} from a single process in {precision}"
                )
    cells = [engine, str(len(ranks)), str(len(all_cases(engine)))]
    for key in (("fp32", "fp32"), ("fp32", "fp64"), ("fp64", "fp64")):
        cells += [f"{worst[key].loss:.1e}", f"{worst[key].weights:.1e}"] if key in worst else ["", ""]
    return f"| {' | '.join(cells)} |", beyond


HEAD = (
    "| engine | ranks | runs | losses, fp32 | weights | losses, to fp64 | weights | losses, both fp64 | weights |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main(argv: Sequence[str]) -> int:
    """Launch, compare, print and write the table; 1 if something is out of bounds."""
    options = _parser().parse_args(argv)
    if options.write is not None:
        check(options.write, BEGIN, END)  # before minutes are spent
    chosen = [(e, n) for e, n in launches() if e == "single" or (e in options.engines and n in options.ranks)]
    lines, beyond = [HEAD], []
    with tempfile.TemporaryDirectory(prefix="scaletransfer-parity-") as folder:
        single: Found = {}
        for engine, ranks in chosen:
            print(f"{engine} on {ranks}", file=sys.stderr, flush=True)
            found = launch(engine, ranks, Path(folder))
            single = single or found[0]
            line, sentences = row(engine, found, single)
            lines.append(line)
            beyond += sentences
    print("\n".join(lines))
    if options.write is not None:
        put(options.write, BEGIN, END, "\n".join(lines))
    for sentence in beyond:
        print(sentence, file=sys.stderr)
    return 1 if beyond else 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/parity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="(default: all)")
    add("--ranks", nargs="+", type=int, choices=(1, 2, 3, 4), default=(1, 2, 3, 4), help="(default: 1 2 3 4)")
    add("--write", type=Path, metavar="FILE", help="also write the table between the two markers in this file")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
