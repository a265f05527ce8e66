"""BiT-HyperRule: schedule, resolution and mixup of a fine-tuning run from the size of its training set and images.

Source: Kolesnikov et al. 2020 (arXiv 1912.11370, section 3.3 and the released bit_hyperrule.py). Two protocols:
``bit`` is that rule; ``paper`` is what the code of arXiv 2106.00116 did with it. They differ in the learning rate, in
the step at which it falls (theirs one later), in the first resize and in the new head's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Protocol = Literal["bit", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("bit", "paper")

MIXUP_FROM = 20_000
"""Training images from which on mixup is used."""
SMALL_AREA = 96 * 96
"""Pixels below which an image is small."""


@dataclass(frozen=True, kw_only=True)
class HyperRule:
    """The schedule of one run, in optimizer updates counted from 0."""

    protocol: Protocol
    warmup: int
    """Updates over which the rate rises linearly from 0."""
    decays: tuple[int, ...]
    """Updates at which the rate falls to a tenth."""
    steps: int
    """Updates in all."""
    mixup: float
    """Both parameters of the Beta distribution; 0 for none."""

    def lr_at(self, step: int, peak: float) -> float:
        """The learning rate of update ``step`` (from 0). The first is 0 where there is a warm-up, as published.

        Raises ValueError for a step outside the run.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"the schedule has the steps 0 to {self.steps - 1}, not {step}")
        if step < self.warmup:
            return peak * step / self.warmup
        # The released code asks `decay < step`, so that the rate falls one update late: kept under `paper`.
        fallen = sum(step > decay if self.protocol == "paper" else step >= decay for decay in self.decays)
        return float(peak * 0.1**fallen)


def hyper_rule(train_size: int, protocol: Protocol = "bit", steps: int | None = None) -> HyperRule:
    """The rule for a training set of ``train_size`` images (after few-shot selection).

    steps: another length; warm-up and decays keep their shares of it (500 images or fewer in the 500-step schedule:
    warm-up over the first fifth, decays at two, three and four fifths).

    Raises ValueError for an unknown protocol, an empty training set, or fewer than one step.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if train_size < 1:
        raise ValueError("the training set is empty")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    if train_size < 20_000:
        warmup, *decays, total = 100, 200, 300, 400, 500
    elif train_size < 500_000:
        warmup, *decays, total = 500, 3_000, 6_000, 9_000, 10_000
    else:
        warmup, *decays, total = 500, 6_000, 12_000, 18_000, 20_000
    if steps is not None and steps != total:
        warmup, decays = round(warmup * steps / total), [max(1, round(edge * steps / total)) for edge in decays]
        total = steps
    return HyperRule(protocol=protocol, warmup=warmup, decays=tuple(decays), steps=total, mixup=mixup_alpha(train_size))


def mixup_alpha(train_size: int) -> float:
    """0.1 from 20,000 training images on, else 0 (no mixup)."""
    return 0.1 if train_size >= MIXUP_FROM else 0.0


def resolution(height: int, width: int) -> tuple[int, int]:
    """(side before the crop, side of the crop) for images of this size: (160, 128) below 96 x 96 in area, else
    (512, 480)."""
    return (160, 128) if height * width < SMALL_AREA else (512, 480)


def peak_lr(global_batch: int, protocol: Protocol = "bit") -> float:
    """The peak learning rate: 0.003 for 512 images (BiT), 0.001 for 128 (paper), in proportion to the batch."""
    base, images = (0.003, 512) if protocol == "bit" else (0.001, 128)
    return base * global_batch / images
