"""Tables of what was measured, and whether it keeps what the project promises."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.conductor import Program
from bench.line_up import LIMIT, OURS, Line

_LIMIT_XRAY = f"{LIMIT}, 1/4, as ours does"


@dataclass(frozen=True)
class Promise:
    """One line with a number of workers against another one: the ratio of their medians is to be `least` or more."""

    least: float
    workload: str
    line: str
    workers: int
    other: str
    other_workload: str = ""


PROMISES = (
    Promise(8, "xray", OURS, 0, "the published steps"),
    Promise(0.85, "xray", OURS, 0, _LIMIT_XRAY),
    Promise(80, "xray256", OURS, 2, "the published steps", "xray"),
    Promise(5, "xray256", OURS, 2, "webdataset default"),
    Promise(5, "xray256", OURS, 2, "open_clip-like stages"),
    Promise(5, "xray256", OURS, 2, "mosaicml MDS"),
    Promise(3.5, "xray256", "ours, affine", 2, "webdataset default"),
    Promise(3.5, "xray256", "ours, affine", 2, "open_clip-like stages"),
    Promise(3.5, "xray256", "ours, affine", 2, "mosaicml MDS"),
    Promise(0.72, "xray256", OURS, 0, LIMIT),
    Promise(1.2, "xray256", OURS, 2, "DALI on CPU"),
    Promise(20, "xray256", "ours, reading alone", 0, LIMIT),
    Promise(2.2, "colour", OURS, 2, "ImageFolder + PIL"),
    Promise(0.95, "colour", OURS, 2, "DALI on CPU"),
    Promise(3, "colour256", OURS, 2, "webdataset default"),
    Promise(0.72, "colour256", OURS, 0, LIMIT),
    Promise(1.2, "colour256", OURS, 2, "DALI on CPU"),
)


def conditions(rounds: int, seconds: float) -> str:
    """How and where it is measured, in a paragraph."""
    load = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {load}. Images per second, median (smallest-largest) of "
        f"{rounds} rounds of {seconds} s, programs in turn, one thread a library, files in the page cache. CPU: "
        "processor time an image, which other programs on the machine hardly change. Memory: "
        "largest resident size of the program and its workers added up, and in parentheses with shared pages counted "
        "once, in MB. A ratio to the limit compares with the decoder on as many threads."
    )


def table(lines: Sequence[Line], workers: Sequence[int]) -> str:
    """Markdown: a line a program, five columns a number of workers."""
    head, rule = ["program"], ["---"]
    for count in workers:
        who = "1 process" if not count else f"{count} workers"
        head += [who, "of the limit", "ours / it", "CPU ms", "MB"]
        rule += ["---:"] * 5
    rows = [[*head, "batch"], [*rule, "---"]]
    by_name = {line.name: line for line in lines}
    for line in lines:
        if line.install:
            rows.append([line.name, f"not installed: `{line.install}`"])
            continue
        cells = [line.name]
        for count in workers:
            cells += _cells(line, count, by_name)
        cells.append(next((program.batches for program in line.programs.values() if program.batches), ""))
        rows.append(cells)
    failed = [
        f"\n{program.name}: {program.failure}"
        for line in lines
        for program in line.programs.values()
        if program.failure
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "".join(failed)


def _cells(line: Line, workers: int, lines: Mapping[str, Line]) -> list[str]:
    program = line.programs.get(workers)
    if program is None:
        return [""] * 5
    if not program.rates:
        return ["failed", "", "", "", ""]
    spread = f"{_number(program.rate)} ({_number(min(program.rates))}-{_number(max(program.rates))})"
    limit = lines[line.limit].rate(workers) if line.limit in lines else 0.0
    ours = lines[line.ours].rate(workers) if line.ours in lines else 0.0
    return [
        spread,
        f"{program.rate / limit:.2f}" if limit else "",
        f"{ours / program.rate:.2f}" if ours else "",
        f"{1000 * median(program.cpu):#.3g}",
        f"{program.rss:.0f} ({program.pss:.0f})",
    ]


def promises(found: Mapping[str, Sequence[Line]]) -> str:
    """Markdown: the ratios that the project promises, those that were measured; the same of the processor's time."""
    rows = ["| ratio of medians | promised | measured | | of CPU time |", "|---|---:|---:|---|---:|"]
    for promise in PROMISES:
        other = promise.other_workload or promise.workload
        above = _program(found, promise.workload, promise.line, promise.workers)
        below = _program(found, other, promise.other, promise.workers)
        if above is None or below is None:
            continue
        ratio, work = above.rate / below.rate, median(below.cpu) / median(above.cpu)
        who = "1 process" if not promise.workers else f"{promise.workers} workers"
        against = promise.other + (f" ({other})" if promise.other_workload else "")
        kept = "kept" if ratio >= promise.least else "**not kept**"
        name = f"{promise.workload}, {who}: {promise.line} / {against}"
        rows.append(f"| {name} | {promise.least:g} | {ratio:.2f} | {kept} | {work:.2f} |")
    return "\n".join(rows) if len(rows) > 2 else "none of the promised ratios was measured"


def as_json(found: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Every rate: workload -> line -> number of workers -> images per second of each round, memory."""
    return {
        workload: {
            line.name: {
                str(count): {"rates": p.rates, "cpu": p.cpu, "rss_mb": p.rss, "pss_mb": p.pss, "failure": p.failure}
                for count, p in line.programs.items()
            }
            for line in lines
        }
        for workload, lines in found.items()
    }


def _program(found: Mapping[str, Sequence[Line]], workload: str, name: str, workers: int) -> Program | None:
    """What was measured for a line; None where nothing was."""
    programs = (line.programs.get(workers) for line in found.get(workload, ()) if line.name == name)
    return next((program for program in programs if program and program.rates), None)


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
