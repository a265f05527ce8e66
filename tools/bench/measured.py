"""What benchmarks share: taking turns, a table of medians, and the JSON file to which every figure can be traced."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any


def take_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each of so many rounds, all in turn in each; a first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def ratio(found: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """How many times as long `above` takes as `below`: the ratio of their medians."""
    return median(found[above]) / median(found[below])


def table(title: str, found: Mapping[str, Sequence[float]], base: str) -> str:
    """Markdown: milliseconds, median and smallest to largest, and how many times faster than `base` each is."""
    rows = [f"| {title} | ms, median | smallest to largest | {base} / it |", "|---|---:|---:|---:|"]
    for name, seconds in found.items():
        low, high = 1e3 * min(seconds), 1e3 * max(seconds)
        rows.append(
            f"| {name} | {1e3 * median(seconds):.1f} | {low:.1f} to {high:.1f} | {ratio(found, base, name):.3f} |"
        )
    return "\n".join(rows)


def promise(what: str, wanted: str, value: float, kept: bool) -> dict[str, Any]:
    """A ratio that the project promises, and whether this measurement keeps it."""
    return {"what": what, "wanted": wanted, "measured": round(value, 4), "kept": kept}


def promise_table(promises: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    rows = ["| ratio of medians | wanted | measured | |", "|---|---:|---:|---|"]
    for one in promises:
        kept = "kept" if one["kept"] else "**not kept**"
        rows.append(f"| {one['what']} | {one['wanted']} | {one['measured']:.3f} | {kept} |")
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    """Where and with what it is measured."""
    names = ("torch", "timm", "numpy", "accelerate", "deepspeed")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: found for name in names if (found := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write(path: Path | None, command: str, argv: Sequence[str], content: Mapping[str, Any]) -> None:
    """Put what was measured into a JSON file, with the command (but for the file's name) and the machine; nothing where
    `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    words = list(argv)
    place = words.index("--json") if "--json" in words else len(words)
    whole = {"command": " ".join(["python", command, *words[:place], *words[place + 2 :]]), "machine": machine()}
    whole |= content
    path.write_text(json.dumps(whole, indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
