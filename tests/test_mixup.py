"""Mixup: by hand, symmetric, and the same whatever the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletransfer.losses import make_loss
from scaletransfer.transfer.mixup import Mixup, mix_images, mix_targets, mixing_weight


def test_images_by_hand():
    images = torch.tensor([1.0, 3.0, 10.0, 20.0]).view(4, 1, 1, 1)
    mixed = mix_images(images, 0.75).flatten().tolist()
    assert mixed == [0.75 * 1 + 0.25 * 3, 0.75 * 3 + 0.25 * 1, 0.75 * 10 + 0.25 * 20, 0.75 * 20 + 0.25 * 10]


def test_classes_become_probabilities():
    mixed = mix_targets(torch.tensor([2, 0, 1, 1]), 0.9, 3)
    expected = [[0.1, 0, 0.9], [0.9, 0, 0.1], [0, 1, 0], [0, 1, 0]]
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-7)
    assert mixed.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_a_label_unknown_in_either_image_is_unknown():
    nan = float("nan")
    mixed = mix_targets(torch.tensor([[1.0, nan, 0.0], [0.0, 1.0, 0.0]]), 0.8, 3)
    assert mixed.isnan().tolist() == [[False, True, False]] * 2
    np.testing.assert_allclose(mixed[:, 0].numpy(), [0.8, 0.2], atol=1e-7)


def test_the_loss_of_a_mixture_is_the_mixture_of_losses():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    loss = make_loss("multiclass")
    total, count = loss(logits, mix_targets(target, 0.7, 4).double())
    partner = target.view(-1, 2).flip(1).reshape(-1)
    expected = 0.7 * loss(logits, target)[0] + 0.3 * loss(logits, partner)[0]
    assert float(total) == pytest.approx(float(expected), rel=1e-6) and int(count) == 6


def test_micro_batches_change_nothing():
    mixup = Mixup(seed=5, alpha=0.1, classes=3)
    images, target = torch.rand(8, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 1, 2, 0])
    whole = mixup.images(7, images), mixup.targets(7, target)
    for size in (2, 4):
        pairs = zip(images.split(size), target.split(size), strict=True)
        parts = [(mixup.images(7, i), mixup.targets(7, t)) for i, t in pairs]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
        assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])


def test_weights_are_draws_of_the_beta_distribution():
    from scipy.stats import beta, kstest

    drawn = [mixing_weight(0, step, 0.4) for step in range(2000)]
    assert kstest(drawn, beta(0.4, 0.4).cdf).pvalue > 0.001
    assert drawn[:50] == [mixing_weight(0, step, 0.4) for step in range(50)]
    assert drawn[:50] != [mixing_weight(1, step, 0.4) for step in range(50)]
    assert mixing_weight(0, 3, 0.0) == 1.0
