"""Runs the benchmarks that write JSON files, and writes docs/BENCHMARKS.md from these files alone.

    python tools/bench/all.py                       all: half an hour on two cores, 16 GB of memory (make bench)
    python tools/bench/all.py --only scaling        some; the figures of the others stay
    python tools/bench/all.py --only                none: the document is written anew from docs/benchmarks/

Every figure of the document is a number in docs/benchmarks/NAME.json, or the median, smallest or largest of several.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import measured
from scaletransfer.cli import CommandParser, run_command

ROOT = Path(__file__).resolve().parents[2]
FOLDER, DOCUMENT = ROOT / "docs" / "benchmarks", ROOT / "docs" / "BENCHMARKS.md"
_LARGE = "--models BiT-M-R152x4 --classes 21842 --layouts whole --rounds 3"
COMMANDS = {
    "step-wide": "tools/bench/step.py --only wide accumulated",
    "step-r50x1": "tools/bench/step.py --only r50x1",
    "step-evaluation": "tools/bench/step.py --only evaluation",
    "optimizer": "tools/bench/optimizer.py --models BiT-S-R50x1",
    "optimizer-large": f"tools/bench/optimizer.py {_LARGE}",
    "optimizer-zero2": "tools/bench/optimizer.py --engine zero2 --models BiT-S-R101x3 --rounds 3",
    "optimizer-fsdp2": "tools/bench/optimizer.py --engine fsdp2 --models BiT-S-R152x4 --rounds 3",
    "scaling": "tools/bench/scaling.py",
}
TITLES = {
    "step-wide": "Forward and backward at the width of R152x4",
    "step-r50x1": "Forward and backward of R50x1",
    "step-evaluation": "Evaluation",
    "optimizer": "The optimizer, R50x1",
    "optimizer-large": "The optimizer, R152x4",
    "optimizer-zero2": "The optimizer under ZeRO-2",
    "optimizer-fsdp2": "The optimizer under FSDP2",
    "scaling": "How cost grows with samples and shards",
}
BASES = {"r50x1": "published standardisation", "wide": "published standardisation"}
BASES |= {"accumulated": "no standardisation", "evaluation": "training mode"}


def main(argv: Sequence[str]) -> int:
    """Run, and write the document; 1 if a benchmark failed."""
    options = _parser().parse_args(argv)
    failed = []
    for name in options.only:
        command = [sys.executable, *shlex.split(COMMANDS[name]), "--json", str(FOLDER / f"{name}.json")]
        print(f"== {shlex.join(command[1:])}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    found = {name: json.loads(file.read_text()) for name in COMMANDS if (file := FOLDER / f"{name}.json").exists()}
    DOCUMENT.write_text(document(found))
    print(f"wrote {DOCUMENT.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def document(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/BENCHMARKS.md."""
    parts = [
        "# Benchmarks\n",
        "Written by `python tools/bench/all.py` from the files in `docs/benchmarks/`; nothing here was typed. All ways "
        "of a table took turns in one process, round after round; shown are medians with the smallest and the largest."
        "\n",
    ]
    for name, content in found.items():
        facts = content["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        parts.append(f"## {TITLES[name]}\n")
        parts.append(
            f"`{content['command']}`, {facts['date']}, {facts['processor']}, {facts['cores']} cores, load "
            f"{facts['load']} at the end, {versions}; `docs/benchmarks/{name}.json`\n"
        )
        parts += _tables(name, content)
        parts.append(measured.promise_table(content["promises"]) + "\n")
    return "\n".join(parts)


def _tables(name: str, content: Mapping[str, Any]) -> list[str]:
    if name.startswith("step"):
        return [measured.table(part, seconds, BASES[part]) + "\n" for part, seconds in content["seconds"].items()]
    if name == "scaling":
        return [_growth(content)]
    tables = []
    for row in content["rows"]:
        title = f"{row['model']}, {row['layout']}: {row['tensors']} tensors, {row['elements'] / 1e6:,.1f} M"
        tables.append(measured.table(title, row["seconds"], "floor") + "\n")
    return tables


def _growth(content: Mapping[str, Any]) -> str:
    lines = ["| samples | shards | index opened, s | order started, s | resumed, s | peak, MB |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    for row in content["rows"]:
        cells = [f"{median(row['found'][key]):.3f}" for key in ("opened", "ordered", "resumed")]
        peak = median(row["found"]["peak_mb"])
        lines.append(f"| {row['samples']:,} | {row['shards']:,} | " + " | ".join(cells) + f" | {peak:,.0f} |")
    lines += ["", "| exponent | |", "|---|---:|"]
    for name, value in content["exponents"].items():
        lines.append(f"| {name} | {'too short to tell' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="tools/bench/all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS), help="(default: all)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
