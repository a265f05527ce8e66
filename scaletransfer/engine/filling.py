"""Gives a network its values by name, wherever its engine keeps them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Values = Callable[[str], Tensor]
"""From a parameter's or buffer's name to its full CPU tensor."""


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that checkpoints hold, by name."""
    kept = set(module.state_dict()) if any(True for _ in module.buffers()) else set()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


@torch.no_grad()
def fill_lasting(module: nn.Module, create: Callable[[], nn.Module]) -> None:
    """Gives buffers that no checkpoint holds (tables of positions in timm's networks) the values they are born with.

    ``meta`` knows none, and what ``to_empty`` finds in memory would train without a word.
    """
    persistent = set(module.state_dict())
    lasting = {name: buffer for name, buffer in module.named_buffers() if name not in persistent}
    if lasting:
        born = dict(create().named_buffers())
        for name, buffer in lasting.items():
            buffer.copy_(born[name])


@torch.no_grad()
def fill(module: nn.Module, source: Values) -> None:
    """Fills parameters and persistent buffers in place; a DTensor takes this rank's rows without communication."""
    persistent = set(module.state_dict())
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        value = source(name)
        if isinstance(tensor, DTensor):
            whole = value.to(device=tensor.device, dtype=tensor.dtype)
            value = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)
