"""The BiT network: ResNet-v2 with GroupNorm and weight standardisation (arXiv 1912.11370).

Names, shapes and arithmetic are those of the published PyTorch checkpoints, so that these load as they are:
`root.conv.weight`, `body.block1.unit01.{gn1,conv1,gn2,conv2,gn3,conv3,downsample}`, `head.gn`, `head.conv`.
The network knows nothing of parallelism, data or training. Engines wrap it by `PreActBottleneck`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GROUPS = 32
TIMM_WS_EPS = 1e-8
"""What timm's networks add to the variance when they standardise a weight; ours, as published and Google's, 1e-10."""
PUBLISHED = tuple(
    f"BiT-{kind}-R{size}" for kind in "SM" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")
)
_UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a name stands for: residual `units` of the four blocks, `base` channels after the root."""

    name: str
    units: tuple[int, int, int, int]
    base: int
    published: bool


def parse_name(name: str) -> Architecture | None:
    """Return the architecture that `name` stands for, or None when it is not a BiT name.

    Known are `BiT-{S,M}-R{50,101,152}x{width}` with any width of 1 or more, and `BiT-tiny`: one unit a block
    and half of R50x1's channels, 2 million parameters, for tests and the demo.
    """
    if name == "BiT-tiny":
        return Architecture(name=name, units=(1, 1, 1, 1), base=32, published=False)
    match = re.fullmatch(r"BiT-[SM]-R(50|101|152)x([1-9][0-9]*)", name)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2])
    return Architecture(name=name, units=_UNITS[depth], base=64 * width, published=name in PUBLISHED)


def standardize(weight: Tensor, eps: float) -> Tensor:
    """Subtract each filter's mean and divide by its deviation, sqrt(biased variance + eps).

    weight: [rows, ...], any floating dtype, also 0 rows; statistics run over all but the first dimension. As
    a row needs nothing but itself, a shard of whole rows gives the same rows as the whole tensor. The result
    is float32, or float64 for float64 input: a bf16 weight loses nothing more here. Layer norm is this
    arithmetic as one operation.
    """
    return _standardized(weight, eps)[0].view_as(weight)


def _standardized(weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`standardize`'s result as rows [rows, n]; the weight as such rows; their means and inverse deviations."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    rows = weight.flatten(1)
    result, mean, inverse = torch.native_layer_norm(rows, list(rows.shape[1:]), None, None, eps)
    if eps == TIMM_WS_EPS and len(rows):
        # as timm's StdConv2d computes it, so that its weights give its logits to the last bit
        result = F.batch_norm(rows[None], None, None, training=True, momentum=0.0, eps=eps)[0]
    return result, rows, mean, inverse


class _StandardizedConvolution(torch.autograd.Function):
    """A convolution of which backward standardises the weight again.

    Left to autograd, every layer would keep its standardised weight from forward to backward: the whole model once
    more, also where an engine has spread the parameters over ranks. Here the parameter alone is kept, which sharding
    engines free and gather again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, stride: int, padding: int) -> Tensor:
        """[b, c_in, h, w] and the raw weight -> [b, c_out, h', w'], in the dtype of x."""
        ctx.save_for_backward(x, weight)
        ctx.how = eps, [stride] * 2, [padding] * 2
        standard = _standardized(weight, eps)[0].view_as(weight).to(x.dtype)
        return F.conv2d(x, standard, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the raw weight."""
        x, weight = ctx.saved_tensors
        eps, stride, padding = ctx.how
        result, rows, mean, inverse = _standardized(weight, eps)
        standard = result.view_as(weight).to(x.dtype)
        del result
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_standard, _ = torch.ops.aten.convolution_backward(
            grad, x, standard, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        del standard
        if grad_standard is None:
            return grad_x, None, None, None, None
        grad_rows, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_standard.to(rows.dtype).reshape(rows.shape),
            rows,
            list(rows.shape[1:]),
            mean,
            inverse,
            None,
            None,
            [True, False, False],
        )
        return grad_x, grad_rows.view_as(weight).to(weight.dtype), None, None, None


class StdConv2d(nn.Conv2d):
    """A convolution whose weight is standardised at every call. Use `ws_eps` 1e-8 to agree with timm."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, ws_eps: float) -> None:
        # Padding is symmetric, as in PyTorch's own convolutions: 3 for the root's 7x7, 1 for 3x3.
        super().__init__(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.ws_eps = ws_eps
        self.standard: Tensor | None = None
        """The standardised weight, while `folding.folded` holds it for evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, h', w'], in the dtype of x (or of autocast)."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if self.standard is not None:
            return F.conv2d(x, self.standard.to(x.dtype), None, self.stride, self.padding)
        weight, stride, padding = self.weight, self.stride[0], self.padding[0]
        made: Tensor = _StandardizedConvolution.apply(x, weight, self.ws_eps, stride, padding)
        return made


class GroupNorm(nn.GroupNorm):
    """GroupNorm that stays in bf16 where its input is, under autocast too.

    Autocast on CUDA would compute it in float32 and keep, for backward, a float32 input, a float32 ReLU output and
    the bf16 copy of that for the convolution: twice the memory that fp32 training takes between two convolutions.
    Engines that hold bf16 weights (FSDP2, ZeRO) run it in bf16 anyway; sums inside are float32 either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, ...] -> the same shape and dtype."""
        if x.dtype != torch.bfloat16 or self.weight.dtype == x.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PreActBottleneck(nn.Module):
    """A residual unit: GroupNorm and ReLU come before each convolution, the stride sits on the 3x3.

    With `checkpointing` the forward keeps its input alone and computes the rest again in backward. This
    happens inside `forward`, so hooks of FSDP2 and ZeRO-3 on the unit stay outside, parameter names do not
    change, and of the standardised weights nothing lives longer than one unit's backward.
    """

    def __init__(self, c_in: int, c_out: int, *, stride: int = 1, ws_eps: float) -> None:
        super().__init__()
        c_mid = c_out // 4
        self.gn1 = GroupNorm(GROUPS, c_in)
        self.conv1 = StdConv2d(c_in, c_mid, 1, ws_eps=ws_eps)
        self.gn2 = GroupNorm(GROUPS, c_mid)
        self.conv2 = StdConv2d(c_mid, c_mid, 3, stride=stride, ws_eps=ws_eps)
        self.gn3 = GroupNorm(GROUPS, c_mid)
        self.conv3 = StdConv2d(c_mid, c_out, 1, ws_eps=ws_eps)
        self.downsample: StdConv2d | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = StdConv2d(c_in, c_out, 1, stride=stride, ws_eps=ws_eps)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, ceil(h / stride), ceil(w / stride)]."""
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing here draws random numbers, so their state need not be saved.
            out: Tensor = checkpoint(self._unit, x, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._unit(x)

    def _unit(self, x: Tensor) -> Tensor:
        out = F.relu(self.gn1(x))
        # The shortcut starts behind the first norm and ReLU where it changes shape, else at the input.
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.gn2(out)))
        out = self.conv3(F.relu(self.gn3(out)))
        return out + shortcut


class Classifier(nn.Conv2d):
    """The head's convolution, by a name of its own: with many classes the largest tensor, which engines wrap apart."""


class BiT(nn.Module):
    """BiT for `num_classes` outputs; see `create_model` for names.

    `published` says whether this size is one of the released checkpoints.
    """

    def __init__(
        self, architecture: Architecture, num_classes: int, *, in_channels: int = 3, ws_eps: float = 1e-10
    ) -> None:
        super().__init__()
        if num_classes < 1 or in_channels < 1 or not ws_eps > 0:
            raise ValueError(
                f"{architecture.name} needs num_classes and in_channels of 1 or more and ws_eps above 0, "
                f"not {num_classes}, {in_channels} and {ws_eps}."
            )
        self.architecture = architecture
        self.published = architecture.published
        self.num_classes = num_classes
        self.in_channels = in_channels
        base = architecture.base
        self.root = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(in_channels, base, 7, stride=2, ws_eps=ws_eps),
                # Zeros, then an unpadded pool: padding inside the pool would be minus infinity.
                pad=nn.ConstantPad2d(1, 0.0),
                pool=nn.MaxPool2d(3, stride=2),
            )
        )
        self.body = nn.Sequential()
        c_in = base
        for block, count in enumerate(architecture.units, start=1):
            c_out = base * 2 ** (block + 1)
            units = nn.Sequential()
            for unit in range(1, count + 1):
                stride = 2 if unit == 1 and block > 1 else 1
                units.add_module(f"unit{unit:02d}", PreActBottleneck(c_in, c_out, stride=stride, ws_eps=ws_eps))
                c_in = c_out
            self.body.add_module(f"block{block}", units)
        self.head = nn.Sequential(
            OrderedDict(
                gn=GroupNorm(GROUPS, c_in),
                relu=nn.ReLU(),
                avg=nn.AdaptiveAvgPool2d(1),
                conv=Classifier(c_in, num_classes, 1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, num_classes] of images [b, in_channels, h, w]; grey images [b, 1, h, w] are repeated.

        Raises ValueError when the images have another number of channels.
        """
        if x.shape[1] != self.in_channels:
            if x.shape[1] != 1:
                raise ValueError(
                    f"{self.architecture.name} takes images of {self.in_channels} channels (or 1), not {x.shape[1]}."
                )
            x = x.expand(-1, self.in_channels, -1, -1)
        x = self.head(self.body(self.root(x)))
        # clone: FSDP2 hangs its backward hook on the output and does not like a view there.
        return x.flatten(1).clone()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What is a layer, as timm's functions ask for it: the root, the residual units (coarse: blocks), the head."""
        units = r"^body\.block(\d+)" if coarse else [(r"^body\.block(\d+)\.unit(\d+)", None), (r"^head\.gn", (99999,))]
        return {"stem": r"^root", "blocks": units}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each residual unit in backward (less memory, a third more time), or stop doing so."""
        for module in self.modules():
            if isinstance(module, PreActBottleneck):
                module.checkpointing = enable
