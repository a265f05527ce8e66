"""Mixup (Zhang et al. 2018, arXiv 1710.09412) that does not depend on how a batch is spread over ranks.

The partner of a sample is its neighbour in the order, position 2k with 2k + 1: neighbours in a random order are a
random pair, and a pair never leaves a micro-batch. One mixing weight an update, as in the released BiT code.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf


def mixing_weight(seed: int, step: int, alpha: float) -> float:
    """The weight of an update: one draw of Beta(alpha, alpha), a function of seed and step; 1 where alpha is 0."""
    if alpha == 0:
        return 1.0
    key = blake2b(f"mixup/{seed}/{step}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8").copy()))
    return float(generator.beta(alpha, alpha))


def mix_images(images: Tensor, weight: float) -> Tensor:
    """Float [b, c, h, w], b even: each image times ``weight`` plus its partner times 1 - ``weight``."""
    return weight * images + (1 - weight) * _partners(images)


def mix_targets(target: Tensor, weight: float, classes: int) -> Tensor:
    """Targets of mixed images: float [b, classes].

    int64 [b] classes become probabilities. float [b, L] labels are mixed; a label that is unknown (NaN) in either
    image is unknown in the mixture.
    """
    soft = target if target.is_floating_point() else nnf.one_hot(target, classes).to(torch.float32)
    return weight * soft + (1 - weight) * _partners(soft)


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mixup of a run, as the training loop calls it: ``step`` is the update, counted from 0."""

    seed: int
    alpha: float
    classes: int

    def images(self, step: int, images: Tensor) -> Tensor:
        """`mix_images` with the weight of this update."""
        return mix_images(images, mixing_weight(self.seed, step, self.alpha))

    def targets(self, step: int, target: Tensor) -> Tensor:
        """`mix_targets` with the weight of this update."""
        return mix_targets(target, mixing_weight(self.seed, step, self.alpha), self.classes)


def _partners(rows: Tensor) -> Tensor:
    assert len(rows) % 2 == 0, "the configuration checks this"
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).reshape(rows.shape)
