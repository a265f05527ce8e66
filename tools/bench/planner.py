"""The planner against measurements: memory and bytes sent of real steps on this machine's CPU, engine by engine.

    python tools/bench/planner.py                 all engines on 1, 2 and 4 ranks, into the table of docs/ENGINES.md
    python tools/bench/planner.py --engines ddp zero3 --ranks 2 --print

Lines of the table that are not measured this time stay.

BiT-S-R50x1 in four cases: a small batch, where what the engine holds counts; a large batch of larger images, where
activations do; small micro-batches accumulated with activation checkpointing; and the small batch again while
checkpoints are written in the background, from a copy. Needs less than 4 GiB in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.page import joined, parts
from bench.planner_run import configuration
from scaletransfer.cli import CommandParser, run_command
from scaletransfer.config import find_config
from scaletransfer.plan import Planner
from scaletransfer.plan_bytes import ENGINES
from scaletransfer.plan_devices import find_device

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "ENGINES.md"
BEGIN, END = "<!-- planner: begin -->", "<!-- planner: end -->"
CASES: dict[str, dict[str, Any]] = {
    "small batch": {
        "model": "BiT-S-R50x1", "size": 64, "classes": 1000, "micro": 2, "times": 1, "checkpointing": False,
    },
    "large batch": {
        "model": "BiT-S-R50x1", "size": 96, "classes": 1000, "micro": 12, "times": 1, "checkpointing": False,
    },
    "accumulated": {
        "model": "BiT-S-R50x1", "size": 96, "classes": 1000, "micro": 6, "times": 2, "checkpointing": True,
    },
    "with checkpoints": {
        "model": "BiT-S-R50x1", "size": 64, "classes": 1000, "micro": 2, "times": 1, "checkpointing": False,
        "saves": True,
    },
}  # fmt: skip
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Line:
    """One case of one engine on so many ranks; bytes, of the rank that takes most."""

    engine: str
    ranks: int
    case: str
    planned: int
    measured: int
    planned_sent: int
    measured_sent: int


def launch(engine: str, ranks: int, cases: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """What each rank found.

    Raises:
        RuntimeError: the run failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="scaletransfer-planner-") as name:
        folder = Path(name)
        (folder / "cases.json").write_text(json.dumps(cases))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "DS_"))}
        environment = kept | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}",
            # so that freed tensors leave the resident set at once, and what is measured is what is held (mallopt(3));
            # the engine's own limits (engine/heap.py) keep up to 64 MiB, which count for little in a large network
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_MMAP_MAX_": "1000000",
        }
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(find_config(f"launch/{engine}.yaml")), "--num_processes", str(ranks)),
            *("-m", "bench.planner_run", str(folder / "cases.json"), name),
        ]
        with (folder / "output").open("w") as output:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
        if done.returncode:
            raise RuntimeError(f"{engine} on {ranks} ranks failed:\n{(folder / 'output').read_text()[-4000:]}")
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def compare(engine: str, ranks: int, cases: dict[str, Any], limit: float = 1200) -> list[Line]:
    """Run the cases and plan them."""
    found = launch(engine, ranks, cases, limit)
    lines = []
    for name, case in cases.items():
        # the first step has no momentum yet, and ZeRO-3 no order of layers
        measured = max(max(rank[name]["peaks"][1:]) for rank in found)
        sent = max(sum(rank[name]["sent"].values()) for rank in found)
        planner = Planner(configuration(case, ranks), case["classes"], find_device("cpu:1000"), 1, ranks)
        row = planner.row(engine, 0)
        assert row.memory is not None and row.traffic is not None, row.impossible
        lines.append(
            Line(
                engine=engine,
                ranks=ranks,
                case=name,
                planned=row.memory.total,
                measured=measured,
                planned_sent=row.traffic.total,
                measured_sent=sent,
            )
        )
    return lines


def table(lines: Iterable[Line]) -> list[str]:
    """Markdown."""
    cells = [["engine", "ranks", "case", "planned MiB", "measured", "ratio", "sent, planned MB", "counted", "ratio"]]
    for line in lines:
        sent = f"{line.planned_sent / line.measured_sent:.3f}" if line.measured_sent else "-"
        cells.append(
            [
                line.engine,
                str(line.ranks),
                line.case,
                f"{line.planned / MIB:.0f}",
                f"{line.measured / MIB:.0f}",
                f"{line.planned / line.measured:.2f}",
                f"{line.planned_sent / 1e6:.1f}",
                f"{line.measured_sent / 1e6:.1f}",
                sent,
            ]
        )
    text = [f"| {' | '.join(row)} |" for row in cells]
    return [text[0], "|" + "---|" * len(cells[0]), *text[1:]]


def update(text: str, measured: Sequence[str]) -> str:
    """The document with the lines of ``measured`` (a table) in its table, in the order of engines, ranks and cases."""
    before, old, after = parts(text, BEGIN, END)
    lines = joined(old, measured, 3, lambda key: (ENGINES.index(key[0]), int(key[1]), list(CASES).index(key[2])))
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", END + after])


def parser() -> argparse.ArgumentParser:
    """The tool's options."""
    made = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    made.add_argument("--print", action="store_true", dest="only", help="print the table and leave the document alone")
    return made


def main(argv: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parser().parse_args(argv)
    for engine in options.engines:
        for ranks in options.ranks:
            if (engine == "single") != (ranks == 1) or (engine == "hsdp" and ranks < 4):
                continue
            lines = table(compare(engine, ranks, {name: CASES[name] for name in options.cases}))
            print("\n".join(lines[2:]), flush=True)
            if not options.only:
                DOCUMENT.write_text(update(DOCUMENT.read_text(), lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
