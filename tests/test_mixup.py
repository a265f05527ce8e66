"""Mixup: by hand, symmetric, and the same whatever the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scaletransfer.losses import make_loss
from scaletransfer.transfer.mixup import Mixup, cut_images, cutting_box, mix_images, mix_targets, mixing_weight


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


def test_cutmix_is_torchvisions():
    """On two images, which are each other's partner in both."""
    from torchvision.transforms import v2

    torch.manual_seed(0)
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    for step in range(5):
        box, weight = cutting_box(7, step, 1.0, 32)
        cutter = v2.CutMix(alpha=1.0, num_classes=3)
        cutter.make_params = lambda _, box=box, weight=weight: {"box": box, "lam_adjusted": weight}
        mixed, soft = cutter(images, target)
        assert torch.equal(cut_images(images, box), mixed)
        torch.testing.assert_close(mix_targets(target, weight, 3), soft)
        assert cutting_box(7, step, 1.0, 32) == (box, weight) != cutting_box(8, step, 1.0, 32)
        area = (box[2] - box[0]) * (box[3] - box[1]) / 32**2
        assert weight == pytest.approx(1 - area)


def test_cutmix_does_not_touch_the_global_generator_and_both_take_turns():
    before = torch.get_rng_state()
    both = Mixup(seed=1, alpha=0.2, classes=3, cutmix=1.0, size=16)
    cuts = [both.cuts(step) for step in range(200)]
    assert 70 < sum(cuts) < 130
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(4, 1, 16, 16)
    step = cuts.index(True)
    assert torch.equal(both.images(step, images), cut_images(images, cutting_box(1, step, 1.0, 16)[0]))
    assert not any(Mixup(seed=1, alpha=0.2, classes=3).cuts(step) for step in range(20))
    assert all(Mixup(seed=1, alpha=0.0, classes=3, cutmix=1.0, size=16).cuts(step) for step in range(20))
