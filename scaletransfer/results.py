"""Results of fine-tuning runs, read from their folders and checked, and the mean over seeds with its interval."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULT = "result.json"
FORMAT, FORMAT_VERSION = "scaletransfer-result", 1
BASELINE = "scratch"
LEVEL = 0.95
FIELDS: dict[str, type | tuple[type, ...]] = {
    "dataset": str,
    "pretrained_model": str,
    "shot": (int, type(None)),
    "seed": int,
    "steps": int,
    "last_step": int,
    "protocol": str,
    "peak_lr": (int, float),
    "task": str,
    "metric": str,
    "label_names": list,
    "train_samples": int,
    "valid_samples": int,
    "metrics": dict,
}
# What results must share: those of a data set, to be points of one curve; those of a cell, to be compared; those of a
# model within a cell, to be averaged.
OF_DATASET = ("task", "metric", "label_names", "valid_samples")
OF_CELL = ("steps", "last_step", "protocol")
OF_MODEL = ("peak_lr",)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run: its folder and the fields of its result.json."""

    folder: Path
    dataset: str
    pretrained_model: str
    shot: int | None
    seed: int
    steps: int
    last_step: int
    protocol: str
    peak_lr: float
    task: str
    metric: str
    label_names: list[str]
    train_samples: int
    valid_samples: int
    metrics: dict[str, Any]
    network: str = ""
    """The architecture in model/model.json beside the result; "" where that file is not there."""

    @property
    def percent(self) -> float:
        """The main metric, in percent."""
        return 100 * float(self.metrics[self.metric])


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with its interval. Percent, or percentage points.

    ``kind`` says what the interval is of: "seeds" (Student's t over seeds), "bootstrap" (a single seed: its validation
    set was resampled), "" (a single seed of which nothing more is known: no interval). ``std`` is that of the seeds
    (n - 1), None from one.
    """

    seeds: tuple[int, ...]
    mean: float
    interval: tuple[float, float] | None
    kind: str = ""
    std: float | None = None
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, values: dict[int, float], bootstrap: tuple[float, float] | None = None) -> Estimate:
        """From one value per seed: mean -+ t(n - 1) s / sqrt(n); of one seed, the ``bootstrap`` interval if given."""
        count, mean = len(values), math.fsum(values.values()) / len(values)
        least, most = min(values.values()), max(values.values())
        if count < 2:
            return cls(tuple(values), mean, bootstrap, "bootstrap" if bootstrap else "", None, least, most)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / (count - 1))
        return cls(tuple(values), mean, t_interval(mean, std, count), "seeds", std, least, most)

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def t_interval(mean: float, std: float, count: int) -> tuple[float, float]:
    """The interval mean -+ t(n - 1) s / sqrt(n) of ``count`` >= 2 values; ``std``: their deviation s (n - 1)."""
    from scipy.stats import t  # here, as it takes half a second

    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * std / math.sqrt(count)
    return mean - half, mean + half


def collect(paths: Iterable[Path | str]) -> list[Result]:
    """All results in or below the given run folders, in the order of their paths; a folder given twice counts once.

    Raises:
        ValueError: a path without a result, a file that is no result, or two results of one data set, number of
            images, model and seed.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        here = [path] if path.is_file() else sorted(path.rglob(RESULT))
        if not here:
            why = f"holds no {RESULT}" if path.is_dir() else "does not exist"
            raise ValueError(f"{path} {why}: give folders of fine-tuning runs that have ended")
        files |= {file.resolve(): file for file in here if file.resolve() not in files}
    results = [_read(file) for file in files.values()]
    seen: dict[tuple[Any, ...], Result] = {}
    for result in results:
        key = (result.dataset, result.shot, result.pretrained_model, result.network, result.seed)
        if first := seen.get(key):
            raise ValueError(
                f"{first.folder} and {result.folder} are both {result.pretrained_model} on {result.dataset} with "
                f"{shot_words(result.shot)} and seed {result.seed}: leave one of them out"
            )
        seen[key] = result
    return results


def read_run(folder: Path) -> Result:
    """The result of one run's folder. ValueError where it is none."""
    return _read(folder / RESULT)


def _read(path: Path) -> Result:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, or fine-tune again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result of scaletransfer finetune: leave its folder out, or remove the file")
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise ValueError(f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}: update it")
    for name, kind in FIELDS.items():
        if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"{path}: field {name!r} is missing or of a wrong type; fine-tune again")
    metric = content["metric"]
    value = content["metrics"].get(metric)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{path} has no value for its metric {metric!r}: leave this run out")
    return Result(folder=path.parent, network=_network(path.parent), **{name: content[name] for name in FIELDS})


def _network(folder: Path) -> str:
    path = folder / "model" / "model.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, or fine-tune again") from error
    name = content.get("model") if isinstance(content, dict) else None
    return name if isinstance(name, str) else ""


def check_comparable(results: Sequence[Result]) -> None:
    """ValueError where results that would be averaged or compared were not made alike."""
    _check_equal(results, OF_DATASET, lambda r: (r.dataset,))
    _check_equal(results, OF_CELL, lambda r: (r.dataset, r.shot))
    _check_equal(results, OF_MODEL, lambda r: (r.dataset, r.shot, r.pretrained_model, r.network))


def _check_equal(results: Sequence[Result], fields: Sequence[str], group: Callable[[Result], tuple[Any, ...]]) -> None:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[group(result)].append(result)
    for members in groups.values():
        for one, other in pairwise(members):
            for name in fields:
                values = getattr(one, name), getattr(other, name)
                if values[0] != values[1]:
                    what = "label_names differ" if name == "label_names" else f"{name} {values[0]} and {values[1]}"
                    where = f"{one.dataset}, {shot_words(one.shot)}" if fields is not OF_DATASET else one.dataset
                    raise ValueError(
                        f"{one.folder} and {other.folder} cannot be compared ({where}: {what}): leave one of them out"
                    )


def shot_order(shot: int | None) -> float:
    """Sorts numbers of images per class; None, all of them, comes last."""
    return math.inf if shot is None else shot


def shot_words(shot: int | None) -> str:
    """A number of training images in words."""
    return "all training images" if shot is None else f"{shot} image{'s' * (shot != 1)} per class"
