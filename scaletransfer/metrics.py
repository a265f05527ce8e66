"""Metrics on a whole validation set, in float64, unknown labels left out.

AUROC and average precision mean what they mean in scikit-learn, but all the positives of a class are ranked in one
search: two of its calls for each of 10,000 classes take minutes. Undefined values are None (null in JSON), never 0,
0.5 or NaN, and take no part in a mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
PER_CLASS = ("auroc", "average_precision", "precision", "recall", "f1")
BLOCK = 1 << 22  # values of a score table that are looked at together; 32 MB in float64


CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion")
"""The findings by which models are compared on CheXpert (Irvin et al. 2019, arXiv 1901.07031)."""


def chexpert_five(report: dict[str, Any]) -> dict[str, Any] | None:
    """``mean_auroc`` over the five findings of CheXpert's competition, and ``mean_classes``, over how many of them
    (those with both outcomes); None where the report lacks one of the five."""
    if not all(name in report["classes"] for name in CHEXPERT_FIVE):
        return None
    found = [report["classes"][name]["auroc"] for name in CHEXPERT_FIVE]
    there = [value for value in found if value is not None]
    return {"mean_auroc": float(np.mean(there)) if there else None, "mean_classes": len(there)}


def multilabel_report(
    scores: npt.ArrayLike, target: npt.ArrayLike, names: Sequence[str], *, from_logits: bool = True
) -> dict[str, Any]:
    """Metrics of independent labels.

    scores [n, L]: logits, or probabilities with from_logits=False (a label is predicted at probability >
    0.5); target [n, L]: 1, 0, or NaN for unknown; names: L. Returns `accuracy`: share of all known labels
    that are predicted right; `known`: their number; `samples`: n; `mean_<metric>` for auroc,
    average_precision, precision, recall and f1: unweighted mean over the classes that have both outcomes
    among their known labels; `mean_classes`: how many these are; `classes`: per name these five, `accuracy`,
    `positives` and `negatives`. A class without both outcomes has None for the five. A class that is never
    predicted has precision 0.

    Raises ValueError for shapes that do not fit, targets other than 0, 1 and NaN, and scores that are not
    finite where the target is known.
    """
    score, truth, known = check_multilabel(scores, target, names)
    predicted = score > (0.0 if from_logits else 0.5)
    classes: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        rows = known[:, column]
        positive, alarm, values = truth[rows, column] == 1, predicted[rows, column], score[rows, column]
        hits, alarms = int((positive & alarm).sum()), int(alarm.sum())
        classes[name] = _binary(hits, alarms, np.sort(values[positive]), np.sort(values))
    right = int((predicted == (truth == 1))[known].sum())
    count = int(known.sum())
    return {
        "samples": len(score),
        "known": count,
        "accuracy": right / count if count else None,
        **_means(classes),
        "classes": classes,
    }


def multiclass_report(
    scores: npt.ArrayLike, target: npt.ArrayLike, names: Sequence[str], *, from_logits: bool = True
) -> dict[str, Any]:
    """Metrics of exclusive classes.

    scores [n, C]: logits (softmax is taken, in float64) or probabilities; target [n] class indexes; names: C.
    Returns `samples`; `accuracy` (top-1) and `accuracy_top5` (None below 5 classes): of equal scores the
    class with the lower index goes first, as in argmax; `mean_*`, `mean_classes` and `classes` as in
    `multilabel_report`, each class against the rest, ranked by probability and predicted where it comes
    first.

    Raises ValueError for shapes that do not fit, targets that are no class index, and scores that are not
    finite.
    """
    score, truth = check_multiclass(scores, target, names)
    rank, predicted = rank_of_target(score, truth)
    width = len(names)
    hits = np.bincount(truth[rank < 1], minlength=width)
    alarms = np.bincount(predicted, minlength=width)
    members = np.split(np.argsort(truth, kind="stable"), np.cumsum(np.bincount(truth, minlength=width))[:-1])
    classes = {}
    for index, values in class_scores(score, from_logits=from_logits):
        own = np.sort(values[members[index]])
        classes[names[index]] = _binary(int(hits[index]), int(alarms[index]), own, np.sort(values))
    some = len(truth) > 0
    return {
        "samples": len(score),
        "accuracy": float((rank < 1).mean()) if some else None,
        "accuracy_top5": float((rank < 5).mean()) if some and len(names) >= 5 else None,
        **_means(classes),
        "classes": classes,
    }


class MultilabelTable(NamedTuple):
    """Checked arguments of a multi-label report, all [n, L]."""

    score: Floats
    truth: Floats
    known: Booleans


def check_multilabel(scores: npt.ArrayLike, target: npt.ArrayLike, names: Sequence[str]) -> MultilabelTable:
    """The arguments of ``multilabel_report`` as arrays; raises what it raises."""
    score: Floats = _table(scores, "scores").astype(np.float64, copy=False)
    truth: Floats = _table(target, "target").astype(np.float64, copy=False)
    if score.shape != truth.shape or score.shape[1] != len(names):
        raise ValueError(
            f"Scores {score.shape}, targets {truth.shape} and {len(names)} label names do not fit together."
        )
    _check_names(names)
    known = ~np.isnan(truth)
    if not np.isin(truth[known], (0.0, 1.0)).all():
        raise ValueError("Multi-label targets must be 0, 1 or NaN for unknown.")
    _check_finite(int((~np.isfinite(score) & known).sum()))
    return MultilabelTable(score, truth, known)


def check_multiclass(
    scores: npt.ArrayLike, target: npt.ArrayLike, names: Sequence[str]
) -> tuple[npt.NDArray[np.floating[Any]], Integers]:
    """The arguments of ``multiclass_report`` as arrays, scores in the precision they came in; raises what it raises."""
    score, truth = _table(scores, "scores"), np.asarray(target)
    if truth.shape != (len(score),) or score.shape[1] != len(names):
        raise ValueError(
            f"Scores {score.shape}, targets {truth.shape} and {len(names)} class names do not fit together."
        )
    _check_names(names)
    if len(truth) and (truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= len(names)):
        raise ValueError(f"Multi-class targets must be integers from 0 to {len(names) - 1}.")
    _check_finite(sum(int((~np.isfinite(score[rows])).sum()) for rows in _row_blocks(score)))
    return score, truth.astype(np.int64)


def rank_of_target(score: npt.NDArray[np.floating[Any]], truth: Integers) -> tuple[Integers, Integers]:
    """How many classes come before the target's, and which class comes first; both int64 [n] for score [n, C].

    Before it come those with a higher score, and equal ones of lower index.
    """
    rank, first = np.zeros_like(truth), np.zeros_like(truth)
    for rows in _row_blocks(score):
        block, target = score[rows], truth[rows]
        own = np.take_along_axis(block, target[:, None], axis=1)
        lower_index = np.arange(block.shape[1])[None, :] < target[:, None]
        rank[rows] = ((block > own) | ((block == own) & lower_index)).sum(axis=1)
        first[rows] = block.argmax(axis=1)
    return rank, first


def class_scores(score: npt.NDArray[np.floating[Any]], *, from_logits: bool) -> Iterator[tuple[int, Floats]]:
    """Class by class its index and float64 [n] scores by which images are ranked: the softmax of logits, or as given.

    The float64 table as a whole never exists: with 10,000 classes it is several times the logits.
    """
    high, total = np.zeros(len(score)), np.ones(len(score))
    if from_logits:
        for rows in _row_blocks(score):
            block = score[rows].astype(np.float64)
            high[rows] = block.max(axis=1)
            total[rows] = np.exp(block - high[rows, None]).sum(axis=1)
    step = max(1, BLOCK // max(1, len(score)))
    for start in range(0, score.shape[1], step):
        values = np.ascontiguousarray(score[:, start : start + step].T, dtype=np.float64)
        if from_logits:
            values = np.exp(values - high) / total
        yield from enumerate(values, start)


def _binary(hits: int, alarms: int, positive: Floats, every: Floats) -> dict[str, Any]:
    """Metrics of one label over the rows where it is known: ``ranking``'s arguments, and counts of the predictions."""
    positives, count = len(positive), len(every)
    report: dict[str, Any] = dict.fromkeys(PER_CLASS)
    report["accuracy"] = (count - alarms - positives + 2 * hits) / count if count else None
    report["positives"], report["negatives"] = positives, count - positives
    if not 0 < positives < count:
        return report
    report["auroc"], report["average_precision"] = ranking(positive, every)
    report["precision"] = hits / alarms if alarms else 0.0
    report["recall"] = hits / positives
    # 2 * precision * recall / (precision + recall), without its 0 / 0.
    report["f1"] = 2 * hits / (alarms + positives)
    return report


def ranking(positive: Floats, every: Floats) -> tuple[float, float]:
    """AUROC and average precision of one class that has both outcomes.

    positive [P]: ascending scores of its positives; every [P + N]: ascending scores of all rows. AUROC is the share of
    the P * N pairs that are in order, ties counting one half (Hanley and McNeil, Radiology 143, 1982). Average
    precision is the sum of (recall - recall before) * precision over the distinct scores, without interpolation
    (https://scikit-learn.org/stable/modules/model_evaluation.html, "Precision, recall and F-measures"), which is the
    mean, over the positives, of the precision among all rows that score at least as high.
    """
    count, positives = len(every), len(positive)
    negatives = count - positives
    at_least, above = (count - np.searchsorted(every, positive, side) for side in ("left", "right"))
    own_at_least, own_above = (positives - np.searchsorted(positive, positive, side) for side in ("left", "right"))
    # twice the negatives that a positive beats, so that a tie's half stays an integer and the sum exact
    beaten = int((2 * negatives - (at_least - own_at_least) - (above - own_above)).sum())
    return beaten / (2 * positives * negatives), float((own_at_least / at_least).mean())


def _means(classes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    both = [c for c in classes.values() if c["auroc"] is not None]
    means: dict[str, Any] = {
        f"mean_{metric}": float(np.mean([c[metric] for c in both])) if both else None for metric in PER_CLASS
    }
    return {**means, "mean_classes": len(both)}


def _table(values: npt.ArrayLike, what: str) -> npt.NDArray[np.floating[Any]]:
    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"The {what} of a report must have two dimensions, not shape {array.shape}.")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _row_blocks(score: npt.NDArray[np.floating[Any]]) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, score.shape[1]))
    return (slice(start, start + step) for start in range(0, len(score), step))


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"The names of a report must differ, but {twice[0]!r} comes more than once.")


def _check_finite(bad: int) -> None:
    if bad:
        raise ValueError(f"{bad} scores are NaN or infinite: the training has diverged, or the weights are damaged.")
