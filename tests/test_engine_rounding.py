"""What rounding to bf16 before weight standardisation costs, and how it is told on weights that ranks hold parts of."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletransfer.engine.pieces import Piece
from scaletransfer.engine.rounding import LIMIT, ROUNDING, amplification, standardised, worst
from scaletransfer.models import create_model, init_weights
from scaletransfer.models.convolution import StdConv2d, standardize

CPU = torch.device("cpu")


def drawn(mean: float) -> Tensor:
    """Filters of deviation 0.05 whose mean is so many deviations."""
    return 0.05 * (torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(1)) + mean)


def of_parts(weight: Tensor, borders: list[int], epsilon: float = 1e-10) -> Tensor:
    """The amplification of each filter when each rank holds a range of the flattened weight, as under ZeRO."""
    network = nn.Sequential(StdConv2d(weight.shape[1], weight.shape[0], weight.shape[2], ws_eps=epsilon))
    shape, sums = tuple(weight.shape), []
    edges = [0, *borders, weight.numel()]

    def collect(both: Tensor) -> Tensor:
        sums.append(both.clone())
        return both

    def sum_up(both: Tensor) -> Tensor:
        return both.copy_(torch.stack(sums).sum(0))

    parts = [
        [Piece("0.weight", shape, start, stop, weight.flatten()[start:stop].clone(), 0)]
        for start, stop in pairwise(edges)
    ]
    for part in parts:
        amplification(part, standardised(network), collect, CPU)
    results = [amplification(part, standardised(network), sum_up, CPU)["0.weight"] for part in parts]
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
def test_it_is_the_root_mean_square_over_the_deviation_wherever_ranks_cut(mean: float) -> None:
    weight = drawn(mean)
    rows = weight.double().flatten(1)
    expected = rows.square().mean(1).sqrt() / rows.std(1, correction=0)
    for borders in ([], [288 * 10, 288 * 40], [1, 288 * 7 + 5, 288 * 7 + 9, 288 * 64 - 1], [0, 0]):
        found = of_parts(weight, borders)
        assert found == pytest.approx(expected, rel=1e-6), borders


@pytest.mark.parametrize("mean", [0.0, 2.0, LIMIT, 30.0])
def test_the_error_that_it_foretells_is_the_error(mean: float) -> None:
    """Rounding errors are uniform, up to ROUNDING of the next power of two: 0.2 to 0.6 of the bound in the mean."""
    weight = drawn(mean)
    error = standardize(weight.bfloat16(), 1e-10) - standardize(weight, 1e-10)
    measured = error.square().flatten(1).mean(1).sqrt().double()
    bound = of_parts(weight, []) * ROUNDING
    assert ((measured / bound > 0.2) & (measured / bound < 0.7)).all()
    assert error.abs().max() <= 2 * bound.max() * (1 + standardize(weight, 1e-10).abs().max())


def test_zeros_are_harmless_and_the_worst_filter_is_found() -> None:
    weight = drawn(0.0)
    weight[3] = 0
    weight[7] += 1.0
    found = of_parts(weight, [1000])
    assert found[3] == 0
    name, number, factor = worst({"a": torch.ones(3), "b": found})
    assert (name, number) == ("b", 7) and factor == pytest.approx(20, rel=0.2)
    assert worst({}) == ("", 0, 0.0)


@pytest.mark.parametrize("name", ["BiT-tiny", "resnetv2_50x1_bit"])
def test_every_standardised_convolution_is_looked_at_and_drawn_ones_are_harmless(name: str) -> None:
    network = create_model(name, 5)
    init_weights(network, 0)
    found = standardised(network)
    wanted = [n for n, p in network.named_parameters() if p.dim() == 4 and not n.startswith("head")]
    assert sorted(found) == sorted(wanted)
    pieces = [Piece(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in network.named_parameters()]
    _, _, factor = worst(amplification(pieces, found, lambda both: both, CPU))
    assert 1 <= factor < 2


def test_autocast_standardises_in_float32_and_rounds_afterwards() -> None:
    """Trap 9 cannot happen under single and ddp: to the bit what rounding afterwards gives, far from rounding first."""
    layer = StdConv2d(32, 64, 3, ws_eps=1e-10)
    layer.weight.data.copy_(drawn(30.0))
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    half = x.bfloat16()
    after = F.conv2d(half, standardize(layer.weight, 1e-10).bfloat16(), padding=1)
    assert torch.equal(found, after)
    first = copy.deepcopy(layer).bfloat16()(half)
    scale = float(after.detach().float().square().mean().sqrt())
    exact = F.conv2d(half.float(), standardize(layer.weight, 1e-10), padding=1)
    assert float((after - exact).square().mean().sqrt()) < 0.01 * scale
    assert float((first - exact).square().mean().sqrt()) > 0.03 * scale
