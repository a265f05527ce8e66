"""Bytes of parameters, gradients and optimizer state on a rank: what the storages hold, and what a strategy should."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from scaletransfer.shares import Shape, held
from scaletransfer.units import local

if TYPE_CHECKING:
    from scaletransfer.engine.build import Engine

ZERO1_BF16 = "BF16_Optimizer"
"""DeepSpeed's choice for ZeRO-1 in bf16 with fp32 accumulation: whole fp32 gradients, split masters and momentum."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: what they really hold, however many views there are."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        if storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@dataclass
class Bytes:
    """Bytes of parameters, gradients and optimizer state on one rank."""

    parameters: int
    gradients: int
    state: int


def expected_bytes(engine: Engine, momentum: int) -> Bytes:
    """What the strategy should hold on this rank by ``shares``, of shapes, ranks and precision.

    Counted are parameters with fp32 masters, the gradients that live between backward and step, and ``momentum``
    tensors of optimizer state for each: whole, or a rank's share with each engine's own rounding.
    """
    strategy = engine.strategy
    found = held(
        strategy.engine,
        _groups(engine),
        strategy.world,
        shards=strategy.shards,
        rank=engine.rank,
        precision=engine.precision,
        momentum=momentum,
    )
    return Bytes(found.parameters + found.masters, found.gradients, found.momentum)


def _groups(engine: Engine) -> list[list[Shape]]:
    """Whole shapes; where the optimizer's parameter groups are cut one by one (ZeRO-1 and 2), group by group."""
    if engine.strategy.zero_stage not in (1, 2):
        return [list(engine.shapes.values())]
    found: dict[int, list[Shape]] = {}
    for piece in engine.pieces:
        found.setdefault(id(piece.holder), []).append(piece.shape)
    return list(found.values())


def measured_parameters(engine: Engine) -> int:
    """Bytes of the storages that hold parameters and masters."""
    tensors: list[Tensor] = [piece.holder for piece in engine.pieces]
    if not engine.strategy.fsdp:
        for p in engine.module.parameters():
            if not p.requires_grad:  # frozen: it has no master, gradient or state
                continue
            tensors.append(p.data)
            if hasattr(p, "ds_tensor"):
                tensors.append(p.ds_tensor)
    return storage_bytes(tensors)


def made_gradients(engine: Engine) -> list[Tensor]:
    """What backward made and the optimizer is to be given, between the last backward and the step."""
    if type(engine.zero).__name__ == ZERO1_BF16:  # bf16 gradients are still there beside the fp32 sums that count
        return list(engine.zero.fp32_groups_gradient_flat_partition)
    if engine.strategy.offload:
        return [engine.zero.grad_partitions_flat_buffer]
    made = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.zero is not None:
        for grads in engine.zero.averaged_gradients.values():
            made += [g for g in grads or () if isinstance(g, Tensor)]
    return made


def measured_gradients(engine: Engine) -> int:
    """Bytes of the storages that hold gradients between the last backward and the step."""
    held = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.strategy.offload:
        held += [piece.holder.grad for piece in engine.pieces if piece.holder.grad is not None]
    return storage_bytes([*held, *made_gradients(engine)])


def within(measured: int, expected: int) -> bool:
    """5 % and 256 KiB for alignment, padding of flat partitions and persistent scalars."""
    return abs(measured - expected) <= 0.05 * expected + 256 * 1024
