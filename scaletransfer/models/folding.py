"""Evaluation with weights that are standardised once, in place of once a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scaletransfer.models.convolution import StdConv2d, standardize


@contextmanager
def folded(network: nn.Module) -> Iterator[None]:
    """Inside, every `StdConv2d` (ours, and the weight-standardised convolutions of timm) uses a weight that was
    standardised on entry: the same numbers as without, bit for bit, where the weights do not change inside.

    Only for networks whose parameters are whole, not sharded, and only without gradients. The memory of one more copy
    of the convolutions' weights is held meanwhile. Other networks are left as they are.
    """
    ours = [module for module in network.modules() if isinstance(module, StdConv2d)]
    with torch.no_grad():
        for module in ours:
            module.standard = standardize(module.weight, module.ws_eps)
    try:
        with _timm_folded(network):
            yield
    finally:
        for module in ours:
            module.standard = None


@contextmanager
def _timm_folded(network: nn.Module) -> Iterator[None]:
    """Timm's layers compute `conv2d(pad(x), standardised)`: their forwards are exchanged for that of a plain one."""
    theirs = [module for module in network.modules() if type(module).__name__ in ("StdConv2d", "StdConv2dSame")]
    theirs = [module for module in theirs if not isinstance(module, StdConv2d)]
    try:
        for module in theirs:
            module.forward = _Plain(module)  # type: ignore[method-assign]
        yield
    finally:
        for module in theirs:
            del module.forward


class _Plain:
    def __init__(self, module: nn.Module) -> None:
        conv = module
        assert isinstance(conv, nn.Conv2d)
        self.conv, self.same = conv, getattr(conv, "same_pad", False)
        with torch.no_grad():  # the arithmetic of timm.layers.std_conv
            rows = conv.weight.reshape(1, conv.out_channels, -1)
            eps = float(conv.eps)  # type: ignore[arg-type]
            weight = nn.functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=eps)
            self.weight = weight.reshape_as(conv.weight)

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.same:
            from timm.layers.padding import pad_same

            x = pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation))
        padding = conv.padding
        return nn.functional.conv2d(x, self.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
