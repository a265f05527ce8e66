"""The learning rate as a pure function of samples seen and global batch: there is no state to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Kind = Literal["step", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then steps or half a cosine. Checked when made: ValueError names the field."""

    kind: Kind
    """step: x decay_factor at each of decay_epochs. cosine: half a cosine from the peak to min_lr."""
    base_lr: float
    """Learning rate for 256 images: the peak is base_lr * global batch / 256."""
    epochs: float
    """Length of the training."""
    warmup_epochs: float = 0.0
    """Length of the warm-up; 0 for none."""
    warmup_start_factor: float = 0.0
    """The warm-up rises from this share of the peak. The paper's runs used 1 / (number of GPUs)."""
    decay_epochs: tuple[float, ...] = (30.0, 60.0, 80.0)
    """Where a step schedule decays; later ones than `epochs` have no effect. Not used by cosine."""
    decay_factor: float = 0.1
    """What a step schedule multiplies by at each decay."""
    min_lr: float = 0.0
    """Where the cosine ends; absolute, not per 256 images."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"schedule kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}.")
        for name in ("base_lr", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"schedule {name} must be a number above 0, not {value}.")
        for name in ("warmup_epochs", "min_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"schedule {name} must be a number of 0 or more, not {value}.")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"schedule warmup_epochs {self.warmup_epochs} is longer than epochs {self.epochs}.")
        if not 0 <= self.warmup_start_factor <= 1:
            raise ValueError(f"schedule warmup_start_factor must be in [0, 1], not {self.warmup_start_factor}.")
        if not 0 < self.decay_factor <= 1:
            raise ValueError(f"schedule decay_factor must be in (0, 1], not {self.decay_factor}.")
        # A list, as YAML gives it, is taken; the frozen field keeps a tuple.
        object.__setattr__(self, "decay_epochs", tuple(self.decay_epochs))
        if self.kind == "step":
            self._check_step()

    def _check_step(self) -> None:
        edges = self.decay_epochs
        if not all(math.isfinite(e) and e > 0 for e in edges) or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"schedule decay_epochs must be above 0 and increase, not {list(edges)}.")
        if edges and edges[0] < self.warmup_epochs:
            raise ValueError(f"schedule decay_epochs begin at {edges[0]}, inside the {self.warmup_epochs} of warm-up.")
        if self.min_lr:
            raise ValueError(f"schedule min_lr {self.min_lr} is for cosine; a step schedule has no lowest value.")


def peak_lr(schedule: Schedule, global_batch: int) -> float:
    """base_lr * global_batch / 256 (the linear rule of arXiv 1706.02677)."""
    return schedule.base_lr * global_batch / 256


def lr_at(schedule: Schedule, samples_seen: int, samples_per_epoch: int, global_batch: int) -> float:
    """The learning rate of the update that follows `samples_seen` samples.

    samples_seen: images used by earlier updates, all ranks and accumulation together (0 for the first
    update); samples_per_epoch: images an epoch really uses (without a last incomplete batch); global_batch:
    images an update. Warm-up and cosine are taken at the update's end, fractional epoch (batch index + 1) /
    batches as in the released code, so the last update of the warm-up has exactly the peak; steps by the
    epoch that the update belongs to. During warm-up nothing decays; the cosine runs from the warm-up's end to
    `epochs` and stays at min_lr after it.

    Raises ValueError for a negative samples_seen, for an epoch shorter than one batch, and for a min_lr above
    the peak.
    """
    if samples_seen < 0 or global_batch < 1 or samples_per_epoch < global_batch:
        raise ValueError(
            f"An epoch of {samples_per_epoch} samples, a global batch of {global_batch} and {samples_seen} "
            "samples seen give no learning rate: an epoch needs at least one whole batch."
        )
    peak = peak_lr(schedule, global_batch)
    if schedule.min_lr > peak:
        raise ValueError(f"schedule min_lr {schedule.min_lr} is above the peak {peak} at global batch {global_batch}.")
    epoch_at_end = (samples_seen + global_batch) / samples_per_epoch
    if samples_seen < schedule.warmup_epochs * samples_per_epoch:
        done = min(1.0, epoch_at_end / schedule.warmup_epochs)
        start = schedule.warmup_start_factor
        return peak * (start + (1 - start) * done)
    if schedule.kind == "step":
        decays = sum(samples_seen >= edge * samples_per_epoch for edge in schedule.decay_epochs)
        return peak * schedule.decay_factor**decays
    length = schedule.epochs - schedule.warmup_epochs
    done = min(1.0, (epoch_at_end - schedule.warmup_epochs) / length) if length > 0 else 1.0
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
