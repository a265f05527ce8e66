"""Results of fine-tuning runs: read from their folders, checked, and averaged over seeds.

A cell is one data set with one number of training images per class; models are compared inside a cell only, paired by
seed, as the same seed draws the same training images. Intervals are Student's t over seeds; each is for one comparison,
none is corrected for how many there are.
"""

from __future__ import annotations

import difflib
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

    @property
    def percent(self) -> float:
        """The main metric, in percent."""
        return 100 * float(self.metrics[self.metric])


@dataclass(frozen=True)
class Estimate:
    """Mean of the values of some seeds and its t-interval, None from a single seed. Percent, or percentage points."""

    seeds: tuple[int, ...]
    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, values: dict[int, float]) -> Estimate:
        """From one value per seed: mean -+ t(n - 1) s / sqrt(n)."""
        count, mean = len(values), math.fsum(values.values()) / len(values)
        if count < 2:
            return cls(tuple(values), mean, None)
        from scipy.stats import t  # here, as it takes half a second

        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values.values()) / (count - 1))
        half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * spread / math.sqrt(count)
        return cls(tuple(values), mean, (mean - half, mean + half))

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Row:
    """A model in a cell; ``gain`` over the baseline is None for the baseline, and where they share no seed."""

    model: str
    score: Estimate
    gain: Estimate | None
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Cell:
    """The runs of one data set with one number of training images per class (None: all); a row per model."""

    dataset: str
    shot: int | None
    rows: tuple[Row, ...]

    @property
    def sample(self) -> Result:
        """Any of its results, for what they share."""
        return self.rows[0].results[0]


@dataclass(frozen=True)
class Summary:
    """All cells, by data set and then from few to all images; the models in the order in which they are shown."""

    cells: tuple[Cell, ...]
    models: tuple[str, ...]
    baseline: str | None

    def by_dataset(self) -> dict[str, list[Cell]]:
        """The cells of each data set."""
        found: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            found[cell.dataset].append(cell)
        return found


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
        key = (result.dataset, result.shot, result.pretrained_model, result.seed)
        if first := seen.get(key):
            raise ValueError(
                f"{first.folder} and {result.folder} are both {result.pretrained_model} on {result.dataset} with "
                f"{shot_words(result.shot)} and seed {result.seed}: leave one of them out"
            )
        seen[key] = result
    return results


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
    return Result(folder=path.parent, **{name: content[name] for name in FIELDS})


def summarise(results: Sequence[Result], baseline: str | None = BASELINE) -> Summary:
    """Means over seeds, and gains over ``baseline`` (a model's name; None: no gains) paired by seed.

    Raises:
        ValueError: results that cannot be compared, or no result of the baseline.
    """
    models = sorted({result.pretrained_model for result in results})
    if baseline is not None and baseline not in models:
        close = difflib.get_close_matches(baseline, models, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"there is no run of the baseline {baseline!r}{hint}: there are {', '.join(models)}")
    models.sort(key=lambda name: name != baseline)
    _check_equal(results, OF_DATASET, lambda r: (r.dataset,))
    _check_equal(results, OF_CELL, lambda r: (r.dataset, r.shot))
    _check_equal(results, OF_MODEL, lambda r: (r.dataset, r.shot, r.pretrained_model))
    grid: dict[tuple[str, int | None], dict[str, dict[int, Result]]] = {}
    for result in sorted(results, key=lambda r: (r.dataset, shot_order(r.shot), r.seed)):
        cell = grid.setdefault((result.dataset, result.shot), {})
        cell.setdefault(result.pretrained_model, {})[result.seed] = result
    cells = []
    for (dataset, shot), runs in grid.items():
        base = runs.get(baseline, {}) if baseline is not None else {}
        rows = []
        for model in (name for name in models if name in runs):
            own = runs[model]
            gains = {} if model == baseline else {s: own[s].percent - base[s].percent for s in own if s in base}
            score = Estimate.of({seed: result.percent for seed, result in own.items()})
            rows.append(Row(model, score, Estimate.of(gains) if gains else None, tuple(own.values())))
        cells.append(Cell(dataset, shot, tuple(rows)))
    return Summary(tuple(cells), tuple(models), baseline)


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


def metric_words(metric: str) -> str:
    """A metric's name as a label, with its unit."""
    return f"{metric.replace('_', ' ').replace('auroc', 'AUROC')} (%)"
