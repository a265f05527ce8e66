"""One network in the forms of others, written from their own names and not through our mapping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def scatter(network: nn.Module, seed: int = 0) -> None:
    """Values that differ in every tensor, with filters of so small a variance that eps shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise * 0.01 if value.ndim == 4 else noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))


def google_arrays(timm_network: nn.Module) -> dict[str, np.ndarray]:
    """The arrays of Google's .npz for a resnetv2_*_bit of timm, the inverse of timm's own `_load_weights`."""
    net, found = timm_network, {}

    def put(key: str, value: Tensor) -> None:
        value = value.detach()
        found[f"resnet/{key}"] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).contiguous().numpy()

    put("root_block/standardized_conv2d/kernel", net.stem.conv.weight)
    put("group_norm/gamma", net.norm.weight)
    put("group_norm/beta", net.norm.bias)
    put("head/conv2d/kernel", net.head.fc.weight)
    put("head/conv2d/bias", net.head.fc.bias)
    for i, stage in enumerate(net.stages, 1):
        for j, block in enumerate(stage.blocks, 1):
            for number, letter in enumerate("abc", 1):
                unit = f"block{i}/unit{j:02d}/{letter}"
                put(f"{unit}/standardized_conv2d/kernel", getattr(block, f"conv{number}").weight)
                put(f"{unit}/group_norm/gamma", getattr(block, f"norm{number}").weight)
                put(f"{unit}/group_norm/beta", getattr(block, f"norm{number}").bias)
            if block.downsample is not None:
                put(f"block{i}/unit{j:02d}/a/proj/standardized_conv2d/kernel", block.downsample.conv.weight)
    return found


def published_state(timm_network: nn.Module) -> dict[str, Tensor]:
    """The same tensors in the names of the published PyTorch code."""
    found = {}
    for name, value in timm_network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stages":
            inner = ["downsample"] if parts[4] == "downsample" else [parts[4].replace("norm", "gn")]
            parts = ["body", f"block{int(parts[1]) + 1}", f"unit{int(parts[3]) + 1:02d}", *inner, parts[-1]]
        elif parts[0] == "stem":
            parts[0] = "root"
        elif parts[0] == "norm":
            parts[:1] = ["head", "gn"]
        else:
            parts[1] = "conv"
        found[".".join(parts)] = value
    return found


def with_optimizer(state: dict[str, Tensor], path: Path) -> None:
    """The published dict: model, optimizer with a momentum of every tensor, epoch."""
    momenta = {number: {"momentum_buffer": torch.zeros_like(v)} for number, v in enumerate(state.values())}
    groups = [{"lr": 0.01, "momentum": 0.9, "params": list(range(len(momenta)))}]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state, "optimizer": {"state": momenta, "param_groups": groups}, "epoch": 89}, path)
