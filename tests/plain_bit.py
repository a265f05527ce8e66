"""The published network as plain PyTorch, for comparisons: means and variances are written out, nothing is clever."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standardised(weight: Tensor, eps: float) -> Tensor:
    """Each filter less its mean, over sqrt(variance + eps)."""
    axes = tuple(range(1, weight.dim()))
    mean = weight.mean(axes, keepdim=True)
    variance = ((weight - mean) ** 2).mean(axes, keepdim=True)
    return (weight - mean) / torch.sqrt(variance + eps)


class PlainBiT(nn.Module):
    """Logits from the parameters of another network, by their published names; differentiable in them."""

    def __init__(self, network: nn.Module, eps: float = 1e-10) -> None:
        super().__init__()
        self.of = dict(network.named_parameters())
        self.eps = eps
        self.units = sorted({name.rsplit(".", 2)[0] for name in self.of if name.startswith("body.")})

    def forward(self, x: Tensor) -> Tensor:
        """[b, c_in or 1, h, w] -> [b, classes]."""
        root = self.of["root.conv.weight"]
        if x.shape[1] == 1:
            x = torch.cat([x] * root.shape[1], dim=1)
        x = F.conv2d(x, standardised(root, self.eps), stride=2, padding=3)
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        for name in self.units:
            x = self._unit(name, x)
        x = F.relu(self._norm("head.gn", x)).mean((2, 3), keepdim=True)
        return F.conv2d(x, self.of["head.conv.weight"], self.of["head.conv.bias"]).flatten(1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.of[f"{name}.weight"], self.of[f"{name}.bias"])

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, standardised(self.of[f"{name}.weight"], self.eps), stride=stride, padding=padding)

    def _unit(self, name: str, x: Tensor) -> Tensor:
        stride = 2 if name.endswith("unit01") and not name.startswith("body.block1") else 1
        out = F.relu(self._norm(f"{name}.gn1", x))
        shortcut = x
        if f"{name}.downsample.weight" in self.of:
            shortcut = self._conv(f"{name}.downsample", out, stride)
        out = self._conv(f"{name}.conv1", out)
        out = self._conv(f"{name}.conv2", F.relu(self._norm(f"{name}.gn2", out)), stride, 1)
        out = self._conv(f"{name}.conv3", F.relu(self._norm(f"{name}.gn3", out)))
        return out + shortcut
