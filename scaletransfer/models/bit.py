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

from scaletransfer.models.compilation import compiled_call
from scaletransfer.models.convolution import StdConv2d

GROUPS = 32
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
        self.compiled = False

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in, h, w] -> [b, c_out, ceil(h / stride), ceil(w / stride)]."""
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing here draws random numbers, so their state need not be saved.
            out: Tensor = checkpoint(self._run, x, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if not self.compiled or not torch.is_grad_enabled():  # to compile for evaluation takes longer than it saves
            return self._unit(x)
        out: Tensor = compiled_call(type(self)._unit, self, x)
        return out

    def _unit(self, x: Tensor) -> Tensor:
        """The arithmetic. What nobody needs again is overwritten, as new memory costs more than the operation."""
        out = F.relu(self.gn1(x), inplace=True)
        # The shortcut starts behind the first norm and ReLU where it changes shape, else at the input.
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.gn2(out), inplace=True))
        out = self.conv3(F.relu(self.gn3(out), inplace=True))
        return out.add_(shortcut)


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
        """Logits [b, num_classes] of images [b, in_channels, h, w]; grey images [b, 1, h, w] stand for equal channels.

        Raises ValueError when the images have another number of channels.
        """
        if x.shape[1] not in (1, self.in_channels):
            raise ValueError(
                f"{self.architecture.name} takes images of {self.in_channels} channels (or 1), not {x.shape[1]}."
            )
        x = self.head(self.body(self.root(x)))
        # clone: FSDP2 hangs its backward hook on the output and does not like a view there.
        return x.flatten(1).clone()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What is a layer, as timm's functions ask for it: the root, the residual units (coarse: blocks), the head."""
        units = r"^body\.block(\d+)" if coarse else [(r"^body\.block(\d+)\.unit(\d+)", None), (r"^head\.gn", (99999,))]
        return {"stem": r"^root", "blocks": units}

    def set_compiled(self, enable: bool = True) -> None:
        """Run each residual unit through torch.compile in training, or stop doing so. Equal units are compiled once."""
        for module in self.modules():
            if isinstance(module, PreActBottleneck):
                module.compiled = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each residual unit in backward (less memory, a third more time), or stop doing so."""
        for module in self.modules():
            if isinstance(module, PreActBottleneck):
                module.checkpointing = enable
