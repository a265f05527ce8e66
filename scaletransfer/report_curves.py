"""Learning curves of runs, from the TensorBoard events (or else metrics.jsonl) in their folders."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletransfer.result_names import canonical_metric, lower_is_better
from scaletransfer.result_rows import Entry

LOSS, LOSS_TAG = "training_loss", "train/loss"
POINTS = 120
"""Most points of a curve in a report; longer ones are thinned evenly, their last point stays."""

Points = dict[int, float]


@dataclass(frozen=True)
class Curve:
    """A model's curve in one data set, with one number of images: mean, least and most over its seeds at each step."""

    dataset: str
    metric: str
    shot: int | None
    pretraining: str
    network: str
    seeds: int
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curves_of(entries: Sequence[Entry]) -> list[Curve]:
    """The curve of each target's main metric, and of the training loss, of every model whose run folders are here."""
    found = []
    for entry in entries:
        if not entry.main or entry.source:
            continue
        runs = [read_run_curves(Path(path)) for path in entry.paths if path and os.path.isdir(path)]
        for metric in (entry.metric, LOSS):
            curves = [run[metric] for run in runs if run.get(metric)]
            steps = _thinned(sorted(set.intersection(*map(set, curves)))) if curves else []
            if not steps:
                continue
            columns = [[curve[step] for curve in curves] for step in steps]
            found.append(
                Curve(
                    entry.dataset,
                    metric,
                    entry.shot,
                    entry.pretraining,
                    entry.network,
                    len(curves),
                    tuple(steps),
                    tuple(math.fsum(column) / len(column) for column in columns),
                    tuple(map(min, columns)),
                    tuple(map(max, columns)),
                )
            )
    return found


def _thinned(steps: list[int]) -> list[int]:
    every = math.ceil(len(steps) / POINTS)
    return steps[::-every][::-1] if every > 1 else steps


def read_run_curves(folder: Path) -> dict[str, Points]:
    """Metric to step to value, shares in percent, of one run; empty without events and without metrics.jsonl.

    What an interrupted run wrote again is taken once: TensorBoard's own reader drops what lies behind a restart.
    """
    if any(folder.glob("events.out.tfevents.*")):
        return _from_events(folder)
    return _from_rows(folder / "metrics.jsonl")


def _from_events(folder: Path) -> dict[str, Points]:
    # here, as it takes a while to import
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    found: dict[str, Points] = {}
    for tag in events.Tags()[SCALARS]:
        if tag.startswith("test/") or tag == LOSS_TAG:
            metric = LOSS if tag == LOSS_TAG else canonical_metric(tag)
            found[metric] = {point.step: _shown(metric, point.value) for point in events.Scalars(tag)}
    return found


def _from_rows(path: Path) -> dict[str, Points]:
    found: dict[str, Points] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a process was killed while it wrote this line; what it wrote again after that has other steps
        validation = row.get("event") == "validation"
        if not validation and ("event" in row or "loss" not in row):
            continue
        for name, value in row.items() if validation else [(LOSS, row["loss"])]:
            if name not in ("step", "samples") and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, {})[int(row["step"])] = _shown(name, float(value))
    return found


def _shown(metric: str, value: float) -> float:
    return value if lower_is_better(metric) else 100 * value
