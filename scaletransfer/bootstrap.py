"""Bootstrap intervals of the metrics of one validation set: how far they would move with other patients or images.

A test set of 121 images moves by 0.83 points with each of them, so a number without an interval says little there. A
resample is never built: the scores of a class are sorted once, and each resample is a row of weights, how often it drew
each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scaletransfer.metrics import (
    PER_CLASS,
    Booleans,
    Floats,
    Integers,
    check_multiclass,
    check_multilabel,
    class_scores,
    rank_of_target,
)

CHUNK = 1 << 18  # weights (resamples x images) that are worked on together: 1 MB, which stays in the cache
CLASS_LIMIT = 200
LEAST = 1e-12
"""The least probability that a loss takes a logarithm of, where probabilities were given and not logits."""


def intervals(
    scores: npt.ArrayLike,
    target: npt.ArrayLike,
    names: Sequence[str],
    *,
    task: str,
    groups: npt.ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    from_logits: bool = True,
    class_limit: int = CLASS_LIMIT,
) -> dict[str, Any]:
    """Percentile bootstrap intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Args:
        scores, target, names, from_logits: as in ``metrics.multilabel_report`` or ``metrics.multiclass_report``.
        task: "multilabel" or "multiclass".
        groups: int64 [n] patient codes: images of equal code are drawn together, as one unit; -1 is no known patient,
            and such an image is a unit of its own. None: every image is a unit.
        samples: how many resamples, each of as many units as there are.
        seed: of numpy's Philox generator; the same seed gives the same intervals.
        level: share of the resamples that lies inside an interval.
        class_limit: with more classes than this, only loss and accuracies have intervals, means and classes are left
            out (None and {}): their cost is images x classes x resamples, about 7 s for 10,000 x 100 x 1,000.

    Returns:
        ``accuracy``, ``accuracy_top5`` (multi-class of 5 classes or more), ``loss`` (mean negative log-likelihood of
        the known targets) and ``mean_<metric>`` for the five of ``metrics.PER_CLASS``: [low, high]; ``classes``: per
        name these five, the same; ``unit`` ("patient" or "image"), ``units`` (their number), ``samples`` and
        ``level``. A class that lacks an outcome in a resample takes no part in that resample's means, and its own
        interval is over the resamples where it has both. Without any such resample, and where there are fewer than two
        units to draw from, the interval is None.

    Raises:
        ValueError: what the reports refuse; groups that do not fit; samples, level or task out of range.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"Bootstrap intervals need samples >= 1 and 0 < level < 1, not {samples} and {level}.")
    if task == "multilabel":
        seen = _multilabel(scores, target, names, from_logits)
    elif task == "multiclass":
        seen = _multiclass(scores, target, names, from_logits, class_limit)
    else:
        raise ValueError(f"The task of bootstrap intervals must be multilabel or multiclass, not {task!r}.")
    unit_of, patients = _units(groups, len(seen.counted))
    units = int(unit_of.max()) + 1 if len(unit_of) else 0
    whole, per_class = _resampled(
        seen, list(seen.classes) if len(names) <= class_limit else [], unit_of, units, samples, seed
    )
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {
        **{key: _interval(values, ends) for key, values in whole.items()},
        **{f"mean_{key}": _interval(_mean(values), ends) for key, values in zip(PER_CLASS, per_class, strict=True)},
        "classes": {
            name: {key: _interval(values[:, i], ends) for key, values in zip(PER_CLASS, per_class, strict=True)}
            for i, name in enumerate(names[: per_class.shape[2]])
        },
        "unit": "patient" if patients else "image",
        "units": units,
        "samples": samples,
        "level": level,
    }


class _Seen(NamedTuple):
    """What each of n images adds to a metric."""

    totals: dict[str, npt.NDArray[Any]]
    """[n] of each metric that is a sum over images, divided by that of ``counted``."""
    counted: Integers
    classes: Iterator[_Class]
    tables: tuple[Booleans, Booleans, Booleans, Booleans]
    """[n, L] each: positives, negatives, predictions, right ones."""


def _multilabel(scores: Any, target: Any, names: Sequence[str], from_logits: bool) -> _Seen:
    table = check_multilabel(scores, target, names)
    predicted, positive = table.score > (0.0 if from_logits else 0.5), table.truth == 1
    right = ((predicted == positive) & table.known).sum(axis=1)
    totals = {"accuracy": right, "loss": log_loss(table.score, table.truth, from_logits)}
    outcomes, alarms = positive & table.known, predicted & table.known
    classes = (
        _Class.of(table.score[:, c], positive[:, c], np.flatnonzero(table.known[:, c])) for c in range(len(names))
    )
    tables = (outcomes, table.known & ~outcomes, alarms, outcomes & alarms)
    return _Seen(totals, table.known.sum(axis=1), classes, tables)


def _multiclass(scores: Any, target: Any, names: Sequence[str], from_logits: bool, class_limit: int) -> _Seen:
    score, truth = check_multiclass(scores, target, names)
    rank, first = rank_of_target(score, truth)
    totals = {"accuracy": (rank < 1).astype(np.int64), "loss": log_loss(score, truth, from_logits)}
    if len(names) >= 5:
        totals["accuracy_top5"] = (rank < 5).astype(np.int64)
    each = np.arange(len(names) if len(names) <= class_limit else 0)
    outcomes, alarms = truth[:, None] == each, first[:, None] == each
    every = np.arange(len(truth))
    classes = (_Class.of(column, truth == c, every) for c, column in class_scores(score, from_logits=from_logits))
    return _Seen(totals, np.ones_like(truth), classes, (outcomes, ~outcomes, alarms, outcomes & alarms))


def _resampled(
    seen: _Seen, ranked: list[_Class], unit_of: Integers, units: int, samples: int, seed: int
) -> tuple[dict[str, Floats], Floats]:
    """Each resample's metrics: [samples] of each total, [len(PER_CLASS), samples, len(ranked)]; NaN where undefined."""
    whole = {key: np.full(samples, np.nan) for key in seen.totals}
    per_class = np.full((len(PER_CLASS), samples, len(ranked)), np.nan)
    counts = np.hstack(seen.tables).astype(np.float64) if ranked else np.zeros((len(seen.counted), 0))
    generator = np.random.Generator(np.random.Philox(seed))
    step = max(1, CHUNK // max(1, len(seen.counted)))
    for start in range(0, samples if units > 1 else 0, step):
        chunk = slice(start, min(start + step, samples))
        weights = _draws(generator, units, chunk.stop - start)[:, unit_of]
        total = weights @ seen.counted
        for key, values in seen.totals.items():
            np.divide(weights @ values, total, out=whole[key][chunk], where=total > 0)
        for index, one in enumerate(ranked):
            per_class[:2, chunk, index] = one.rank(weights)
        if ranked:
            per_class[2:, chunk] = _thresholded(weights.astype(np.float64) @ counts)
    return whole, per_class


def log_loss(score: npt.NDArray[np.floating[Any]], truth: npt.NDArray[Any], from_logits: bool) -> Floats:
    """float64 [n]: each image's negative log-likelihood, summed over its known labels. Arguments as ``intervals``."""
    from scipy.special import log_expit, log_softmax  # here, as it takes a while to import

    values = score.astype(np.float64)
    if truth.ndim == 1:
        logs = log_softmax(values, axis=1) if from_logits else np.log(np.maximum(values, LEAST))
        return np.asarray(-np.take_along_axis(logs, truth[:, None], axis=1)[:, 0])
    yes, no = (log_expit(values), log_expit(-values)) if from_logits else _logs(values)
    return np.asarray(-np.where(truth == 1, yes, np.where(truth == 0, no, 0.0)).sum(axis=1))


def _logs(probability: Floats) -> tuple[Floats, Floats]:
    return np.log(np.maximum(probability, LEAST)), np.log(np.maximum(1 - probability, LEAST))


def _thresholded(counts: Floats) -> Floats:
    """[3, b, L] precision, recall and F1 of counts [b, 4 L] as ``intervals`` draws them; NaN without both outcomes."""
    positives, negatives, alarms, hits = np.split(counts, 4, axis=1)
    pairs = ((hits, alarms), (hits, positives), (2 * hits, alarms + positives))
    found = np.stack([np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in pairs])
    found[:, (positives == 0) | (negatives == 0)] = np.nan
    return np.asarray(found)


class _Class(NamedTuple):
    """A class's images from the highest score down, and where its positives stand among them.

    Images of equal score are one step of the curve; only the steps with a positive add to a metric. For each of these,
    ``first``/``last`` are how many images score higher / at least as high, and ``own_first``/``own_last`` how many
    positives do.
    """

    order: Integers
    positives: Integers
    first: Integers
    last: Integers
    own_first: Integers
    own_last: Integers

    @classmethod
    def of(cls, score: Floats, positive: Booleans, rows: Integers) -> _Class:
        """From score and outcome of all images [n], and the rows of those where the class is known."""
        order = rows[np.argsort(-score[rows], kind="stable")]
        descending, hit = -score[order], positive[order]
        steps = np.unique(descending[hit])
        return cls(
            order,
            order[hit],
            np.searchsorted(descending, steps, "left"),
            np.searchsorted(descending, steps, "right"),
            np.searchsorted(descending[hit], steps, "left"),
            np.searchsorted(descending[hit], steps, "right"),
        )

    def rank(self, weights: npt.NDArray[np.int32]) -> tuple[Floats, Floats]:
        """AUROC and average precision [b] under draw counts int32 [b, n]; NaN where an outcome was not drawn.

        The sums of ``metrics.ranking``, with every image counted as often as it was drawn.
        """
        nothing = np.full(len(weights), np.nan)
        if not len(self.first):
            return nothing, nothing
        every, own = _running(weights, self.order), _running(weights, self.positives)
        positives, negatives = own[:, -1].astype(np.float64), (every[:, -1] - own[:, -1]).astype(np.float64)
        above, at_least = every[:, self.first], every[:, self.last]
        own_above, own_at_least = own[:, self.own_first], own[:, self.own_last]
        drawn = (own_at_least - own_above).astype(np.float64)
        beaten = drawn * (2 * negatives[:, None] - (at_least - own_at_least) - (above - own_above))
        precision = drawn * own_at_least / np.maximum(at_least, 1)
        defined = (positives > 0) & (negatives > 0)
        return (
            np.divide(beaten.sum(axis=1), 2 * positives * negatives, out=nothing.copy(), where=defined),
            np.divide(precision.sum(axis=1), positives, out=nothing, where=defined),
        )


def _running(weights: npt.NDArray[np.int32], columns: Integers) -> npt.NDArray[np.int32]:
    """Sums of the first 0, 1, ... of the named columns, per row."""
    total = np.zeros((len(weights), len(columns) + 1), dtype=np.int32)
    np.cumsum(np.take(weights, columns, axis=1, mode="clip"), axis=1, out=total[:, 1:])
    return total


def _draws(generator: np.random.Generator, units: int, samples: int) -> npt.NDArray[np.int32]:
    """How often each unit was drawn: int32 [samples, units]. A resample's draws do not depend on its chunk."""
    counts = np.empty((samples, units), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(generator.integers(units, size=units), minlength=units)
    return counts


def _units(groups: npt.ArrayLike | None, count: int) -> tuple[Integers, bool]:
    """The unit of each image, numbered from 0, and whether any unit is a patient."""
    if groups is None:
        return np.arange(count), False
    codes = np.asarray(groups)
    if codes.shape != (count,) or (count and (codes.dtype.kind not in "iu" or codes.min() < -1)):
        shape = f"shape {codes.shape} of {codes.dtype}"
        raise ValueError(f"Patient codes must be {count} integers, -1 for no known patient, not {shape}.")
    alone = codes == -1
    known, numbers = np.unique(codes[~alone], return_inverse=True)
    unit = np.empty(count, dtype=np.int64)
    unit[~alone], unit[alone] = numbers, len(known) + np.arange(int(alone.sum()))
    return unit, bool(len(known))


def _mean(values: Floats) -> Floats:
    """Mean over the classes [samples, L] that are defined; NaN where none is."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    return np.divide(
        np.where(defined, values, 0.0).sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0
    )


def _interval(values: Floats, ends: Sequence[float]) -> list[float] | None:
    defined = values[~np.isnan(values)]
    return [float(end) for end in np.quantile(defined, ends)] if len(defined) else None
