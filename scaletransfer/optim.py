"""SGD with adaptive gradient clipping that means the same on every engine.

Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, section 4.1) compares, unit by unit, the norm of the
gradient with the norm of the weights. A *unit* is an output filter or row: the slices along the first dimension of a
tensor with two or more dimensions; a vector or scalar is one unit.

ZeRO hands an optimizer flat one-dimensional partitions and FSDP2 hands it shards, so shapes alone would silently give
another training. The engine therefore tells the optimizer by ``set_layout`` which part of which parameter lies where;
sums of squares are then taken per unit over the pieces, added over the ranks in one all-reduce, and the pieces scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

FLOOR = 1e-6
"""Smallest norm that a gradient is divided by (timm's and the published code's constant)."""


@dataclass(frozen=True)
class Segment:
    """The half-open range [start, stop) of a flattened parameter, at ``offset`` in the flat tensor that holds it.

    ``stop == start`` says that this rank holds nothing of the parameter: it is listed all the same, so that every
    rank counts the same units.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int

    @property
    def units(self) -> int:
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def unit_size(self) -> int:
        return math.prod(self.shape) // max(1, self.units)

    def runs(self) -> Iterable[tuple[int, int, int, int]]:
        """Cuts the range at unit boundaries: (begin, end, first unit, units), begin and end inside the piece.

        At most three runs: the rest of a unit that an earlier rank began, whole units, the beginning of the next.
        """
        if self.stop <= self.start:
            return
        size, position = self.unit_size, self.start
        if position % size:
            end = min(self.stop, (position // size + 1) * size)
            yield position - self.start, end - self.start, position // size, 1
            position = end
        whole = (self.stop - position) // size
        if whole > 0:
            yield position - self.start, position - self.start + whole * size, position // size, whole
            position += whole * size
        if position < self.stop:
            yield position - self.start, self.stop - self.start, position // size, 1


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, and a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of this rank's part; never a copy. Units stay whole and in order, in channels-last too."""
    mine = local(tensor).detach()
    if mine.dim() == 4 and not mine.is_contiguous() and mine.is_contiguous(memory_format=torch.channels_last):
        mine = mine.permute(0, 2, 3, 1)
    return mine.view(-1)


def square_sums(values: Tensor, segment: Segment, out: Tensor, whole: bool = False) -> None:
    """Adds the squares of ``values`` (1-D, this rank's piece) per unit to ``out`` [units] (or [1] when ``whole``)."""
    if whole:
        out[0] += torch.linalg.vector_norm(values, dtype=out.dtype).square()
        return
    for begin, end, unit, count in segment.runs():
        rows = values[begin:end].view(count, -1)
        out[unit : unit + count] += torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype).square()


def scale_units(values: Tensor, segment: Segment, scale: Tensor) -> None:
    """Multiplies ``values`` (1-D, this rank's piece) in place by the ``scale`` [units] of its unit."""
    for begin, end, unit, count in segment.runs():
        values[begin:end].view(count, -1).mul_(scale[unit : unit + count, None].to(values.dtype))


@dataclass
class ClipStats:
    """What one optimizer step saw, before clipping: 0-d tensors, summed over parameter groups."""

    square_norm: Tensor
    clipped: Tensor
    units: int


class SGD_AGC(torch.optim.Optimizer):
    """SGD whose gradients are clipped unit by unit to ``clipping`` times the norm of the unit's weights.

    Per unit: if ||g|| > clipping * max(||w||, eps), g is multiplied by clipping * max(||w||, eps) / max(||g||, 1e-6).
    Weight decay is added after clipping, then momentum as in ``torch.optim.SGD`` (the first buffer is the gradient).
    All hyper-parameters can be given per group; ``clipping=None`` makes a group plain SGD. A parameter without a
    gradient is skipped. Gradients are changed in place.

    Args:
        params: parameters or groups.
        lr: learning rate, momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.
        clipping: largest ratio of gradient norm to weight norm (arXiv 2102.06171, equation 3).
        eps: floor of the weight norm, so that zero-initialised weights can move.

    Raises:
        ValueError: a hyper-parameter outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        clipping: float | None = 1e-2,
        eps: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clipping": clipping,
            "eps": eps,
        }
        self._layout: dict[int, Sequence[Segment]] = {}
        self._own: set[int] = set()  # ids of the tensors it was given: an engine may step others in their place
        self._group: dist.ProcessGroup | None = None
        self._stats: list[ClipStats] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        merged = {**self.defaults, **param_group}
        for name in ("lr", "momentum", "dampening", "weight_decay", "eps"):
            if not merged[name] >= 0:
                raise ValueError(f"SGD_AGC {name}={merged[name]}: must be at least 0")
        if merged["clipping"] is not None and not merged["clipping"] > 0:
            raise ValueError(f"SGD_AGC clipping={merged['clipping']}: must be above 0, or None for plain SGD")
        if merged["nesterov"] and (merged["momentum"] <= 0 or merged["dampening"] != 0):
            raise ValueError("SGD_AGC nesterov needs momentum above 0 and no dampening")
        super().add_param_group(param_group)
        self._own.update(id(p) for p in self.param_groups[-1]["params"])

    def set_layout(self, layout: dict[Tensor, Sequence[Segment]], group: dist.ProcessGroup | None) -> None:
        """Says what the tensors that this optimizer steps are made of.

        Args:
            layout: for each tensor, the segments of *all* parameters that are spread over the ranks together with it,
                in the same order on every rank.
            group: the ranks over which those parameters are spread; sums of squares are all-reduced there.
        """
        self._layout = {id(tensor): segments for tensor, segments in layout.items()}
        self._kept = list(layout)  # an id names a tensor only as long as the tensor lives
        self._group = group

    def pop_stats(self) -> ClipStats | None:
        """The statistics since the last call (ZeRO steps one group or sub-group at a time), or None."""
        stats, self._stats = self._stats, []
        if not stats:
            return None
        return ClipStats(
            square_norm=torch.stack([s.square_norm for s in stats]).sum(),
            clipped=torch.stack([s.clipped for s in stats]).sum(),
            units=sum(s.units for s in stats),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            sgd(
                params,
                [p.grad for p in params],
                buffers,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
            )
            if group["momentum"]:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer
        return loss

    def _segments(self, tensor: Tensor) -> Sequence[Segment]:
        known = self._layout.get(id(tensor))
        if known is not None:
            return known
        if isinstance(tensor, DTensor) or self._layout or id(tensor) not in self._own:
            raise ValueError(
                "SGD_AGC steps a sharded or flat tensor of unknown layout: call set_layout once the engine has sharded"
            )
        return [Segment(tuple(tensor.shape), 0, tensor.numel(), 0)]

    def _clip(self) -> None:
        jobs = [
            (group, p, segment) for group in self.param_groups for p in group["params"] for segment in self._segments(p)
        ]
        if not jobs:
            return
        units = [1 if group["clipping"] is None else segment.units for group, _, segment in jobs]
        first = jobs[0][1]
        dtype = torch.promote_types(first.dtype, torch.float32)
        sums = torch.zeros(2, sum(units), dtype=dtype, device=first.device)
        pieces = list(zip(jobs, sums[0].split(units), sums[1].split(units), strict=True))
        for (group, p, segment), grad_sum, weight_sum in pieces:
            if p.grad is None or segment.stop == segment.start:
                continue
            whole = group["clipping"] is None
            square_sums(_piece(p.grad, segment), segment, grad_sum, whole)
            if not whole:
                square_sums(_piece(p, segment), segment, weight_sum)
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        self._stats.append(self._scale(pieces, sums))

    def _scale(self, pieces: list[Any], sums: Tensor) -> ClipStats:
        clipped = torch.zeros((), dtype=torch.int64, device=sums.device)
        counted = 0
        for (group, p, segment), grad_sum, weight_sum in pieces:
            if group["clipping"] is None:
                continue
            counted += segment.units
            norm = grad_sum.sqrt()
            limit = group["clipping"] * weight_sum.sqrt().clamp_min(group["eps"])
            over = norm > limit
            clipped += over.sum()
            if p.grad is not None and segment.stop > segment.start:
                scale = torch.where(over, limit / norm.clamp_min(FLOOR), torch.ones_like(norm))
                scale_units(_piece(p.grad, segment), segment, scale)
        return ClipStats(square_norm=sums[0].sum(), clipped=clipped, units=counted)


def _piece(tensor: Tensor, segment: Segment) -> Tensor:
    """1-D view of the part of ``tensor`` that holds ``segment``."""
    return flat(tensor)[segment.offset : segment.offset + segment.stop - segment.start]


def split_head(
    named: Iterable[tuple[str, Tensor]], head_weight: str, head_bias: str | None, exempt: str
) -> list[dict[str, Any]]:
    """Parameter groups in which the head is not clipped.

    Args:
        named: parameters with their names.
        head_weight: name of the classifier's weight; head_bias: of its bias, if it has one.
        exempt: "corrected" exempts both, "paper" the weight only (the published code clipped the bias).

    Raises:
        ValueError: no parameter is called ``head_weight``.
    """
    names = {head_weight} | ({head_bias} if exempt == "corrected" and head_bias else set())
    params = dict(named)
    if head_weight not in params:
        raise ValueError(f"the model has no parameter {head_weight!r}, so its head cannot be left unclipped")
    body = [p for name, p in params.items() if name not in names]
    return [
        {"params": body},
        {"params": [params[name] for name in params if name in names], "clipping": None},
    ]
