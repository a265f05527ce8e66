"""Weights that an engine rounds to bf16 before the network standardises them, and where that does harm.

Under ``single`` and ``ddp`` autocast leaves weights alone: a filter is standardised in float32 and rounded afterwards.
FSDP2's mixed precision and DeepSpeed hand the network weights that are rounded already. Rounding errs by a part of the
weight, standardising divides by the deviation of its filter: the error grows with the filter's root mean square over
its deviation. That is about 1 in a network that was trained with weight standardisation (whose gradient never moves a
filter's mean), and the error no larger than that of rounding afterwards. Of a filter that lies far from zero, nothing
is left but the error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from scaletransfer.engine.pieces import Piece

ROUNDING = 2.0**-8
"""The largest relative error of a number in bf16."""
LIMIT = 8.0
"""The most by which rounding first may be worse than rounding afterwards: an error of 3 % of a filter's deviation."""
_CLASSES = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
"""Convolutions that standardise their weight, ours and timm's."""


def standardised(module: nn.Module) -> dict[str, float]:
    """The epsilon of each parameter that is standardised in forward, by the parameter's name."""
    return {
        f"{name}.weight": float(getattr(part, "ws_eps", None) or part.eps)  # type: ignore[arg-type]
        for name, part in module.named_modules()
        if type(part).__name__ in _CLASSES
    }


def amplification(
    pieces: Sequence[Piece], epsilons: Mapping[str, float], add: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, Tensor]:
    """How much worse rounding before standardising is than afterwards, float64 [filters] by a parameter's name.

    It is sqrt(mean of squares / (variance + epsilon)) of each filter: 1 at least, and 0 where a filter is all zeros.

    Args:
        pieces: this rank's parts of the float32 values; a filter may lie on several ranks.
        epsilons: see ``standardised``; other parameters are left out.
        add: adds a tensor up in place over the ranks that share a copy of the model. All of them call this.
    """
    chosen = [piece for piece in pieces if piece.name in epsilons]
    firsts = list(accumulate((piece.shape[0] for piece in chosen), initial=0))
    sums, squares = both = torch.zeros(2, firsts[-1], dtype=torch.float64, device=device)
    for piece, first in zip(chosen, firsts[:-1], strict=True):
        for begin, end, unit, count in piece.segment().runs():
            rows, place = piece.value()[begin:end].view(count, -1), slice(first + unit, first + unit + count)
            sums[place] += rows.sum(1, dtype=torch.float64)
            squares[place] += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    add(both)
    found = {}
    for piece, first, end in zip(chosen, firsts[:-1], firsts[1:], strict=True):
        size = piece.segment().unit_size
        mean, square = sums[first:end] / size, squares[first:end] / size
        variance = (square - mean.square()).clamp_min(0)
        found[piece.name] = (square / (variance + epsilons[piece.name])).sqrt()
    return found


def worst(found: Mapping[str, Tensor]) -> tuple[str, int, float]:
    """Name of the parameter, number of the filter and amplification where it is largest; ("", 0, 0.0) of nothing."""
    if not found:
        return "", 0, 0.0
    name = max(found, key=lambda name: float(found[name].max()))
    number = int(found[name].argmax())
    return name, number, float(found[name][number])
