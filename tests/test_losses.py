"""Losses against torch's own on the known entries; unknown ones touch nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletransfer.losses import Loss, count_known, cross_entropy, make_loss, masked_bce


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_unknown(rows: int, labels: int, share: float) -> Tensor:
    target = torch.randint(0, 2, (rows, labels), generator=_generator(1)).float()
    target[torch.rand(rows, labels, generator=_generator(2)) < share] = float("nan")
    return target


def test_bce_equals_torchs_on_the_known_entries() -> None:
    target = _with_unknown(40, 13, 0.6)
    logits = (torch.randn(40, 13, dtype=torch.float64, generator=_generator()) * 5).requires_grad_()
    known = ~target.isnan()
    total, count = masked_bce(logits, target)
    total.backward()
    reference = logits.detach().clone().requires_grad_()
    expected = nn.BCEWithLogitsLoss(reduction="sum")(reference[known], target[known].double())
    expected.backward()
    assert total.dtype == torch.float64 and abs(total.item() - expected.item()) < 1e-12
    assert count.dtype == torch.int64 and count == known.sum() == count_known(target)
    assert torch.allclose(logits.grad, reference.grad, atol=1e-15)
    assert torch.all(logits.grad[~known] == 0) and torch.all(logits.grad[known] != 0)


def test_bce_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 7.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [0.25, float("nan")]])
    total, count = masked_bce(logits, target)
    hand = np.log(2) + (2 + np.log1p(np.exp(-2))) + (np.log1p(np.exp(-1)) + 0.25)
    assert abs(total.item() - hand) < 1e-12 and count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    target = _with_unknown(64, 13, 0.3)
    logits = (torch.randn(64, 13, generator=_generator()) * 10).to(dtype)
    total, _ = masked_bce(logits, target)
    exact, _ = masked_bce(logits.double(), target)
    assert total.dtype == torch.float32 and abs(total.item() / exact.item() - 1) < 1e-6
    classes = torch.randint(0, 13, (64,), generator=_generator())
    total, _ = cross_entropy(logits, classes)
    exact, _ = cross_entropy(logits.double(), classes)
    assert total.dtype == torch.float32 and abs(total.item() / exact.item() - 1) < 1e-6


def test_extreme_logits_stay_finite_and_exact() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4]], requires_grad=True)
    total, _ = masked_bce(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    total.backward()
    assert total == 1e4 and torch.equal(logits.grad, torch.tensor([[0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("value", [0.0, 3e38, float("inf"), float("nan")])
def test_all_unknown_batch_is_zero_with_zero_gradients(value: float) -> None:
    layer = nn.Linear(4, 3)
    logits = layer(torch.randn(5, 4, generator=_generator())) + 0
    logits.retain_grad()
    total, count = masked_bce(
        torch.where(torch.ones(5, 3, dtype=torch.bool), logits + value, logits),
        torch.full((5, 3), float("nan")),
    )
    total.backward()
    assert total == 0 and count == 0
    assert torch.all(logits.grad == 0)
    for parameter in layer.parameters():
        assert torch.all(parameter.grad == 0)


def test_sums_over_parts_are_the_sum_over_all() -> None:
    target, logits = (
        _with_unknown(32, 13, 0.5),
        torch.randn(32, 13, dtype=torch.float64, generator=_generator()),
    )
    whole, count = masked_bce(logits, target)
    parts = [masked_bce(x, y) for x, y in zip(logits.split([1, 20, 11]), target.split([1, 20, 11]), strict=True)]
    assert abs(sum(p[0].item() for p in parts) - whole.item()) < 1e-12
    assert sum(p[1].item() for p in parts) == count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_hand(smoothing: float) -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=_generator())
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    x = logits.numpy()
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    share = np.full((6, 4), smoothing / 4) + (1 - smoothing) * np.eye(4)[target.numpy()]
    total, count = cross_entropy(logits, target, smoothing)
    assert abs(total.item() + (share * log_p).sum()) < 1e-12 and count == 6
    # The same classes as probabilities, and a mixup of two.
    soft, count = cross_entropy(logits, F.one_hot(target, 4).float(), smoothing)
    assert abs(soft.item() - total.item()) < 1e-12 and count == 6
    other = target.flip(0)
    mixed, _ = cross_entropy(
        logits, 0.3 * F.one_hot(target, 4).double() + 0.7 * F.one_hot(other, 4).double(), smoothing
    )
    expected = 0.3 * total + 0.7 * cross_entropy(logits, other, smoothing)[0]
    assert abs(mixed.item() - expected.item()) < 1e-12


def test_no_class_index_is_skipped_in_silence() -> None:
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, -100]))


def test_make_loss_and_counts() -> None:
    logits = torch.randn(5, 3, generator=_generator())
    unknown = _with_unknown(5, 3, 0.5)
    multilabel, multiclass = make_loss("multilabel"), make_loss("multiclass", label_smoothing=0.1)
    assert torch.equal(multilabel(logits, unknown)[0], masked_bce(logits, unknown)[0])
    assert multilabel.count(unknown) == multilabel(logits, unknown)[1] < 15
    classes = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(multiclass(logits, classes)[0], cross_entropy(logits, classes, 0.1)[0])
    soft = F.one_hot(classes, 3).float()
    assert multiclass.count(classes) == multiclass.count(soft) == multiclass(logits, soft)[1] == 5
    assert count_known(classes) == 5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="task must be one of multilabel, multiclass, not 'regression'"):
        make_loss("regression")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        make_loss("multiclass", label_smoothing=1.0)
    with pytest.raises(ValueError, match="for multi-class tasks"):
        Loss(task="multilabel", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"gives \(2, 3\) logits for targets of shape \(2, 4\)"):
        masked_bce(torch.zeros(2, 3), torch.zeros(2, 4))


def test_class_weights_equal_torchs_mean() -> None:
    logits = torch.randn(30, 4, dtype=torch.float64, generator=_generator())
    target = torch.randint(0, 4, (30,), generator=_generator(3))
    weights = (1.0, 0.25, 0.5, 0.1)
    loss = Loss(task="multiclass", class_weights=weights)
    total, count = loss(logits, target)
    expected = nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64))(logits, target)
    assert float(total / count) == pytest.approx(float(expected), rel=1e-6)
    assert float(count) == pytest.approx(float(loss.count(target))) == pytest.approx(sum(weights[i] for i in target))
    soft = F.one_hot(target, 4).double()
    mixed = loss(logits, soft)
    assert float(mixed[0]) == pytest.approx(float(total)) and float(mixed[1]) == pytest.approx(float(count), rel=1e-6)
    with pytest.raises(ValueError, match="class_weights is for multi-class"):
        Loss(task="multilabel", class_weights=weights)
