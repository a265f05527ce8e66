"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) that do not depend on how
a batch is spread over ranks.

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
from torchvision.transforms import v2


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


Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, the ends excluded."""


def cutting_box(seed: int, step: int, alpha: float, size: int) -> tuple[Box, float]:
    """(the box of an update in images of size x size, the weight of an image's own target): functions of seed and step.

    The draw is torchvision's CutMix's, from a generator of its own.
    """
    cutter = v2.CutMix(alpha=alpha, num_classes=1)
    digest = blake2b(f"cutmix/{seed}/{step}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        drawn = cutter.make_params([torch.empty(1, 1, size, size)])
    return drawn["box"], float(drawn["lam_adjusted"])


def cut_images(images: Tensor, box: Box) -> Tensor:
    """Float [b, c, h, w], b even: each image with its partner's pixels inside the box."""
    x1, y1, x2, y2 = box
    mixed = images.clone()
    mixed[..., y1:y2, x1:x2] = _partners(images)[..., y1:y2, x1:x2]
    return mixed


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mixup and CutMix of a run, as the training loop calls them: ``step`` is the update, counted from 0.

    With both, an update has one of the two, with equal chances. alpha: of mixup; cutmix: of CutMix; size: of images.
    """

    seed: int
    alpha: float
    classes: int
    cutmix: float = 0.0
    size: int = 0

    def cuts(self, step: int) -> bool:
        """Whether the update has CutMix."""
        if not (self.alpha and self.cutmix):
            return bool(self.cutmix)
        return bool(blake2b(f"which/{self.seed}/{step}".encode(), digest_size=1).digest()[0] % 2)

    def images(self, step: int, images: Tensor) -> Tensor:
        """`mix_images` or `cut_images` as drawn for this update."""
        if self.cuts(step):
            return cut_images(images, cutting_box(self.seed, step, self.cutmix, self.size)[0])
        return mix_images(images, mixing_weight(self.seed, step, self.alpha))

    def targets(self, step: int, target: Tensor) -> Tensor:
        """`mix_targets` with the weight of this update."""
        if self.cuts(step):
            return mix_targets(target, cutting_box(self.seed, step, self.cutmix, self.size)[1], self.classes)
        return mix_targets(target, mixing_weight(self.seed, step, self.alpha), self.classes)


def _partners(rows: Tensor) -> Tensor:
    assert len(rows) % 2 == 0, "the configuration checks this"
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).reshape(rows.shape)
