"""Whether probabilities mean what they say: calibration error, reliability table, Brier score; and confusion counts.

numpy only: from the probabilities and labels of a predictions file these numbers can be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of equal width, as in Guo et al. 2017."""
CONFUSION_LIMIT = 200
"""Classes up to which the table of a multi-class problem is given."""


def reliability(confidence: npt.ArrayLike, outcome: npt.ArrayLike, bins: int = BINS) -> dict[str, Any]:
    """Calibration of events that were predicted with a probability.

    confidence [n] in [0, 1]; outcome [n]: whether the event came, bool. Returns ``ece``, the expected calibration error
    (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599: mean over the images of |confidence - frequency| in their
    bin), ``mce`` (the largest of these), ``brier`` (mean squared difference; Brier 1950) and ``bins``: for each bin
    that is not empty low, high, count, confidence (mean) and frequency. All None and [] without images.
    """
    p, hit = np.asarray(confidence, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    if not len(p):
        return {"ece": None, "mce": None, "brier": None, "bins": []}
    edges = np.linspace(0, 1, bins + 1)
    where = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, bins - 1)  # bins are (low, high]
    count = np.bincount(where, minlength=bins)
    mean, share = (np.bincount(where, values, bins) / np.maximum(count, 1) for values in (p, hit))
    gap = np.abs(mean - share)
    rows = [
        {
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "count": int(count[b]),
            "confidence": float(mean[b]),
            "frequency": float(share[b]),
        }
        for b in np.flatnonzero(count)
    ]
    return {
        "ece": float((gap * count).sum() / len(p)),
        "mce": float(gap[count > 0].max()),
        "brier": float(((p - hit) ** 2).mean()),
        "bins": rows,
    }


def calibration(probability: npt.NDArray[Any], target: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    """Calibration of a set of images.

    probability [n, L]; target int [n] classes, or float [n, L] labels of 1, 0 and NaN for unknown. Multi-class: of
    the most probable class (top-label), with ``brier`` over all classes (the sum of squares). Multi-label: of all known
    labels together, and ``classes``: name -> ``ece`` and ``brier`` of each label alone.
    """
    if target.ndim == 1:
        found = reliability(probability.max(axis=1, initial=0), probability.argmax(axis=1) == target)
        if len(target):
            found["brier"] = float(((probability - np.eye(len(names))[target]) ** 2).sum(axis=1).mean())
        return found
    known = ~np.isnan(target)
    found = reliability(probability[known], target[known] == 1)
    found["classes"] = {}
    for column, name in enumerate(names):
        rows = known[:, column]
        one = reliability(probability[rows, column], target[rows, column] == 1)
        found["classes"][name] = {"ece": one["ece"], "brier": one["brier"]}
    return found


def confusion(probability: npt.NDArray[Any], target: npt.NDArray[Any], names: Sequence[str]) -> Any:
    """Counts of truth against prediction; arguments as ``calibration``.

    Multi-class: L lists of L numbers, a row a true class, a column a predicted one (None above 200 classes).
    Multi-label: name -> [[true negatives, false positives], [false negatives, true positives]] at probability > 0.5,
    among the images where the label is known. Both are laid out as scikit-learn's.
    """
    if target.ndim == 1:
        if len(names) > CONFUSION_LIMIT:
            return None
        table = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(table, (target, probability.argmax(axis=1)), 1)
        return table.tolist()
    found = {}
    for column, name in enumerate(names):
        rows = ~np.isnan(target[:, column])
        truth, said = (target[rows, column] == 1).astype(np.int64), (probability[rows, column] > 0.5).astype(np.int64)
        found[name] = np.bincount(2 * truth + said, minlength=4).reshape(2, 2).tolist()
    return found
