"""Losses as (sum, count). The caller divides by the count of the whole global batch; nothing here divides.

A mean over this rank's micro-batch would weigh samples differently on different numbers of ranks, and is NaN
where nothing is known. sum / max(1, global count) is neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Task = Literal["multilabel", "multiclass"]
UNKNOWN_CLASS = -1
"""The class of a sample of which nothing is known (an image that could not be read): it adds nothing to the loss."""


def count_known(target: Tensor) -> Tensor:
    """How many terms a loss over `target` has, as an int64 scalar on its device (no synchronisation).

    float [b, L] multi-label targets: the labels that are not NaN. int64 [b] classes: those not UNKNOWN_CLASS.
    """
    if target.is_floating_point():
        return torch.isnan(target).logical_not().sum()
    return (target != UNKNOWN_CLASS).sum()


def masked_bce(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over the known labels: (sum, number of known labels).

    logits [b, L] of any floating dtype; target float [b, L] in [0, 1] (soft ones too), NaN for unknown. The
    sum is float32 (float64 for float64 logits), computed from the logits directly (log1p of an exponential),
    the count an int64 scalar. Unknown labels add 0 to the sum and exactly 0 to every gradient, whatever the
    logit.
    """
    _same_shape(logits, target)
    known = torch.isnan(target).logical_not()
    # Both inputs are replaced before the loss: masking its result alone would leave 0 * nan in the gradients.
    x = torch.where(known, _at_least_float32(logits), 0.0)
    y = torch.where(known, target, 0.0).to(x.dtype)
    terms = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return torch.where(known, terms, 0.0).sum(), known.sum()


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy: (sum, number of samples), or with class weights (weighted sum, sum of the weights).

    logits [b, C] of any floating dtype; target int64 [b] class indexes (UNKNOWN_CLASS adds nothing), or float [b, C]
    class probabilities (mixup). The sum is float32 (float64 for float64 logits), the count an int64 scalar.
    label_smoothing s gives every class s / C and the target 1 - s on top (arXiv 1512.00567). weight: [C]; a sample
    counts by the weight of its class, a mixture of classes by the mean weight of what is in it.
    """
    if target.is_floating_point():
        _same_shape(logits, target)
    x = _at_least_float32(logits)
    y = target.to(x.dtype) if target.is_floating_point() else target
    total = F.cross_entropy(x, y, weight, reduction="sum", label_smoothing=label_smoothing, ignore_index=UNKNOWN_CLASS)
    return total, count_weighted(target, weight)


def count_weighted(target: Tensor, weight: Tensor | None) -> Tensor:
    """The count of `cross_entropy`: samples (int64 scalar), or the sum of their weights (float32 scalar)."""
    if weight is None:
        if target.is_floating_point():
            return torch.full((), target.shape[0], dtype=torch.int64, device=target.device)
        return count_known(target)
    weight = weight.to(target.device, torch.float32)
    if target.is_floating_point():
        return (target * weight).sum()
    return torch.where(target == UNKNOWN_CLASS, 0.0, weight[target.clamp(min=0)]).sum()


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a task: call it with (logits, target) for (sum, count)."""

    task: Task
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """Multi-class: what a sample of each class counts; None: all the same."""

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}, not {self.task!r}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        if self.task == "multilabel" and self.label_smoothing:
            raise ValueError("label_smoothing is for multi-class tasks; set it to 0 for a multi-label one.")
        if self.task == "multilabel" and self.class_weights is not None:
            raise ValueError("class_weights is for multi-class tasks; set it to none for a multi-label one.")

    def __call__(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count) as `masked_bce` or `cross_entropy`."""
        if self.task == "multilabel":
            return masked_bce(logits, target)
        return cross_entropy(logits, target, self.label_smoothing, self._weight(logits))

    def count(self, target: Tensor) -> Tensor:
        """The count that the call will return, known from the targets alone: a scalar on their device."""
        if self.task == "multilabel":
            return count_known(target)
        return count_weighted(target, self._weight(target))

    def _weight(self, like: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.tensor(self.class_weights, dtype=dtype, device=like.device)


def make_loss(task: Task, *, label_smoothing: float = 0.0) -> Loss:
    """The loss of "multilabel" (masked binary cross-entropy) or "multiclass" (cross-entropy).

    Raises ValueError for another task, and for label smoothing outside [0, 1) or on a multi-label task.
    """
    return Loss(task=task, label_smoothing=label_smoothing)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _same_shape(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ValueError(
            f"The model gives {tuple(logits.shape)} logits for targets of shape {tuple(target.shape)}: the "
            "number of outputs must be the number of labels."
        )
