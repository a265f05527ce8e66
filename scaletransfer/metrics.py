"""Metrics on a whole validation set, in float64, unknown labels left out; ranks by scikit-learn.

Undefined values are None (null in JSON), never 0, 0.5 or NaN, and take no part in a mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PER_CLASS = ("auroc", "average_precision", "precision", "recall", "f1")


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
    score, truth = _table(scores, "scores"), _table(target, "target")
    if score.shape != truth.shape or score.shape[1] != len(names):
        raise ValueError(
            f"Scores {score.shape}, targets {truth.shape} and {len(names)} label names do not fit together."
        )
    _check_names(names)
    known = ~np.isnan(truth)
    if not np.isin(truth[known], (0.0, 1.0)).all():
        raise ValueError("Multi-label targets must be 0, 1 or NaN for unknown.")
    _check_finite(score, known)
    predicted = score > (0.0 if from_logits else 0.5)
    classes: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        rows = known[:, column]
        classes[name] = _binary(truth[rows, column] == 1, score[rows, column], predicted[rows, column])
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
    score, truth = _table(scores, "scores"), np.asarray(target)
    if truth.shape != (len(score),) or score.shape[1] != len(names):
        raise ValueError(
            f"Scores {score.shape}, targets {truth.shape} and {len(names)} class names do not fit together."
        )
    _check_names(names)
    if len(truth) and (truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= len(names)):
        raise ValueError(f"Multi-class targets must be integers from 0 to {len(names) - 1}.")
    truth = truth.astype(np.int64)
    _check_finite(score, np.ones_like(score, dtype=bool))
    rank = _rank_of_target(score, truth)
    predicted = score.argmax(axis=1) if len(score) else truth
    if from_logits:
        score = np.exp(score - score.max(axis=1, keepdims=True))
        score /= score.sum(axis=1, keepdims=True)
    classes = {name: _binary(truth == index, score[:, index], predicted == index) for index, name in enumerate(names)}
    some = len(truth) > 0
    return {
        "samples": len(score),
        "accuracy": float((rank < 1).mean()) if some else None,
        "accuracy_top5": float((rank < 5).mean()) if some and len(names) >= 5 else None,
        **_means(classes),
        "classes": classes,
    }


def _binary(positive: npt.NDArray[np.bool_], score: Floats, predicted: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Metrics of one label over the rows where it is known."""
    # scikit-learn costs a second to import, and training without validation needs none of it.
    from sklearn.metrics import average_precision_score, roc_auc_score

    count = len(positive)
    positives = int(positive.sum())
    report: dict[str, Any] = dict.fromkeys(PER_CLASS)
    report["accuracy"] = float((positive == predicted).mean()) if count else None
    report["positives"], report["negatives"] = positives, count - positives
    if not 0 < positives < count:
        return report
    hits, alarms = int((positive & predicted).sum()), int(predicted.sum())
    report["auroc"] = float(roc_auc_score(positive, score))
    report["average_precision"] = float(average_precision_score(positive, score))
    report["precision"] = hits / alarms if alarms else 0.0
    report["recall"] = hits / positives
    # 2 * precision * recall / (precision + recall), without its 0 / 0.
    report["f1"] = 2 * hits / (alarms + positives)
    return report


def _means(classes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    both = [c for c in classes.values() if c["auroc"] is not None]
    means: dict[str, Any] = {
        f"mean_{metric}": float(np.mean([c[metric] for c in both])) if both else None for metric in PER_CLASS
    }
    return {**means, "mean_classes": len(both)}


def _rank_of_target(scores: Floats, target: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many classes come before the target's: those with a higher score, and equal ones of lower index."""
    own = np.take_along_axis(scores, target[:, None], axis=1)
    lower_index = np.arange(scores.shape[1])[None, :] < target[:, None]
    before: npt.NDArray[np.int64] = ((scores > own) | ((scores == own) & lower_index)).sum(axis=1)
    return before


def _table(values: npt.ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"The {what} of a report must have two dimensions, not shape {array.shape}.")
    return array


def _check_names(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"The names of a report must differ, but {twice[0]!r} comes more than once.")


def _check_finite(scores: Floats, where: npt.NDArray[np.bool_]) -> None:
    bad = int((~np.isfinite(scores) & where).sum())
    if bad:
        raise ValueError(f"{bad} scores are NaN or infinite: the training has diverged, or the weights are damaged.")
