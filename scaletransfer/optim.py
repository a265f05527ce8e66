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

from scaletransfer.units import Segment, UnitPlan, flat, flattens, local

FLOOR = 1e-6
"""Smallest norm that a gradient is divided by (timm's and the published code's constant)."""
CACHED = 2**20
"""Elements that a CPU clips and steps together: gradients, weights and momentum of a chunk take 12 MB of its cache."""
_REGISTERS = 64
"""A multiple of the elements that any vector register holds."""


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
        self._device: torch.device | None = None
        self._plans: dict[tuple[tuple[int, bool], ...], tuple[UnitPlan, list[Tensor]]] = {}
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

    def set_layout(
        self,
        layout: dict[Tensor, Sequence[Segment]],
        group: dist.ProcessGroup | None,
        device: torch.device | None = None,
    ) -> None:
        """Says what the tensors that this optimizer steps are made of.

        Args:
            layout: for each tensor, the segments of *all* parameters that are spread over the ranks together with it,
                in the same order on every rank.
            group: the ranks over which those parameters are spread; sums of squares are all-reduced there.
            device: where the group can reduce; by default where the tensors lie (an engine may keep them elsewhere).
        """
        self._layout = {id(tensor): segments for tensor, segments in layout.items()}
        self._kept = list(layout)  # an id names a tensor only as long as the tensor lives
        self._group, self._device = group, device
        self._plans.clear()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks over which sums of squares are added up."""
        return self._group

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
        tensors = [p for group in self.param_groups for p in group["params"]]
        if tensors:
            self._stats.append(self._step(tensors))
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

    def _plan(self, tensors: Sequence[Tensor]) -> UnitPlan:
        """The plan for these tensors: made at the first step, and again when an engine steps others."""
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        apart = [self.param_groups[number]["clipping"] is not None for number in groups]
        key = tuple(zip(map(id, tensors), apart, strict=True))
        if key not in self._plans:
            segments = [self._segments(p) for p in tensors]
            # An id names a tensor only as long as the tensor lives, so the tensors are kept too.
            mine = [local(p) for p in tensors]
            most = CACHED if mine[0].device.type == "cpu" else None
            self._plans[key] = (UnitPlan(mine, segments, apart, groups, most), list(tensors))
        return self._plans[key][0]

    def _step(self, tensors: Sequence[Tensor]) -> ClipStats:
        """Clips and steps chunk by chunk; where units are spread over ranks, all norms come first."""
        plan = self._plan(tensors)
        held = [self._held(p, group) for group in self.param_groups for p in group["params"]]
        gradients = [one.gradient if one else None for one in held]
        weights = [one.weight if one else None for one in held]
        first = local(tensors[0])
        norms = torch.zeros(2, plan.units, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        limit, scale = torch.full_like(norms[0], math.inf), torch.ones_like(norms[0])

        def judge(group: dict[str, Any], units: slice) -> None:
            limit[units] = norms[1][units].clamp_min(group["eps"]).mul_(group["clipping"])
            shorter = limit[units] / norms[0][units].clamp_min(FLOOR)
            scale[units] = torch.where(norms[0][units] > limit[units], shorter, 1.0)

        if self._group is not None:
            plan.square_sums(gradients, norms[0])
            plan.square_sums(weights, norms[1], wholes=False)
            there = norms.to(self._device or norms.device)
            dist.all_reduce(there, group=self._group)
            norms.copy_(there).sqrt_()
        counted, last = 0, 0
        for group in self.param_groups:
            units = slice(plan.first[last], plan.first[last + len(group["params"])])
            last += len(group["params"])
            if group["clipping"] is not None:
                counted += units.stop - units.start
                if self._group is not None:
                    judge(group, units)
        for chunk in plan.chunks:
            group = self.param_groups[chunk.group]
            clips = group["clipping"] is not None
            if self._group is None:
                chunk.norms(gradients, norms[0])
                if clips:
                    chunk.norms(weights, norms[1])
                    judge(group, chunk.units)
            if clips:
                chunk.scale(gradients, scale)
            _update(group, [(held[tensor], end) for tensor, end in chunk.ends.items()])
        return ClipStats(square_norm=norms[0].square().sum(), clipped=(norms[0] > limit).sum(), units=counted)

    def _held(self, p: Tensor, group: dict[str, Any]) -> _Held | None:
        """What this rank steps of a parameter; None without a gradient."""
        if p.grad is None:
            return None
        weight, gradient, buffer, fresh = local(p), local(p.grad), None, False
        if group["momentum"]:
            state = self.state[p]
            fresh = state.get("momentum_buffer") is None
            if fresh:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = local(state["momentum_buffer"])
        if not flattens(gradient):
            gradient = gradient.contiguous()
        return _Held(weight, gradient, buffer, fresh)


class _Held:
    """A tensor that is stepped from its beginning to its end, part after part.

    torch's fused kernel walks through memory, so the tensors must lie in it alike; its default takes what does not. The
    last few elements, which do not fill the kernel's registers, it rounds otherwise than the default.
    """

    def __init__(self, weight: Tensor, gradient: Tensor, buffer: Tensor | None, fresh: bool) -> None:
        self.weight, self.gradient, self.buffer, self.fresh = weight, gradient, buffer, fresh
        alike = weight.dtype == gradient.dtype and weight.stride() == gradient.stride()
        if buffer is not None:
            alike = alike and buffer.dtype == weight.dtype and buffer.stride() == weight.stride()
        self._rest = weight.numel() % _REGISTERS
        self._alike = alike and flattens(weight) and weight.device.type in ("cpu", "cuda")
        self._done = 0

    def until(self, end: int) -> list[tuple[bool, tuple[Tensor, Tensor, Tensor | None]]]:
        """What may be stepped when all before element ``end`` is clipped: (by the fused kernel or not, the parts)."""
        size, rest = self.weight.numel(), self._rest
        last = end == size
        if not size:
            return []
        if not self._alike:
            return [(False, (self.weight, self.gradient, self.buffer))] if last else []
        start, stop = self._done, size - rest if last else end - end % _REGISTERS
        self._done = stop
        if start == 0 and stop == size:
            return [(True, (self.weight, self.gradient, self.buffer))]
        w, g, b = flat(self.weight), flat(self.gradient), None if self.buffer is None else flat(self.buffer)
        cuts = [(True, slice(start, stop))] if stop > start else []
        cuts += [(False, slice(stop, size))] if last and rest else []
        return [(fused, (w[cut], g[cut], None if b is None else b[cut])) for fused, cut in cuts]


def _update(group: dict[str, Any], reached: Sequence[tuple[_Held | None, int]]) -> None:
    """``torch.optim.SGD`` on parts of tensors, in one pass over memory where torch has a fused kernel."""
    calls: dict[tuple[bool, bool], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for held, end in reached:
        for fused, part in held.until(end) if held else ():
            calls.setdefault((fused, held.fresh), []).append(part)  # type: ignore[union-attr]
    for (fused, fresh), parts in calls.items():
        sgd(
            [weight for weight, _, _ in parts],
            [gradient for _, gradient, _ in parts],
            [buffer for _, _, buffer in parts],
            fused=fused,
            foreach=False if fused else None,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            # torch's first buffer is the gradient itself, which is what comes of zeros without dampening
            dampening=0.0 if fresh else group["dampening"],
            nesterov=group["nesterov"],
            maximize=False,
        )


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
