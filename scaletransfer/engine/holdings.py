"""Bytes of parameters, gradients and optimizer state on a rank: what the storages hold, and what a strategy should."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from scaletransfer.engine.pieces import shard_rows
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
    """What the strategy should hold on this rank, from shapes, ranks and precision, and from where the
    engine cuts (``pieces``) what ZeRO-1 and 2 hold beyond a share.

    Counted are parameters with fp32 masters, the gradients that live between backward and step, and ``momentum``
    tensors of optimizer state for each: whole, or a rank's share with each engine's own rounding.
    """
    shapes, world, name = engine.shapes.values(), engine.strategy.shards, engine.strategy.engine
    whole = sum(math.prod(shape) for shape in shapes)
    compute, width = engine.compute_dtype.itemsize, engine.master_dtype.itemsize
    if name in ("single", "ddp"):
        return Bytes(width * whole, width * whole, width * whole * momentum)
    if engine.strategy.fsdp:
        rows = ((shape[0], math.prod(shape[1:])) for shape in shapes)
        share = sum(size * (shard_rows(n, world, 0)[1]) for n, size in rows)  # every rank's storage is the first's size
        return Bytes(width * share, width * share, width * share * momentum)
    if name in ("zero1", "zero2"):
        share = -(-whole // world)
        if engine.precision == "bf16":
            # Accumulated in fp32 in a buffer of its own: under ZeRO-1 whole and
            # beside the bf16 gradients, this rank's share alone under ZeRO-2.
            gradients = whole + whole // 2 if name == "zero1" else share
        else:
            # Views of what backward made: a parameter that is cut at a partition's end is held whole on both sides.
            gradients = sum(math.prod(piece.shape) for piece in engine.pieces if len(piece))
        return Bytes(compute * whole + 4 * share, 4 * gradients, 4 * share * momentum)
    share = sum(-(-math.prod(shape) // world) for shape in shapes)
    kept = sum(p.ds_numel for p in engine.zero.persistent_parameters)
    # With offload a second copy: where micro-batches are added up, and what the optimizer is given.
    copies = 2 if engine.strategy.offload else 1
    return Bytes(
        compute * (share + kept) + (0 if _shares_masters(engine) else 4 * share),
        copies * 4 * share,
        4 * share * momentum,
    )


def _shares_masters(engine: Engine) -> bool:
    """Whether ZeRO-3's fp32 masters are the fp32 partitions themselves (releases differ)."""
    masters = {piece.holder.untyped_storage().data_ptr() for piece in engine.pieces}
    parts = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return all(part.untyped_storage().data_ptr() in masters for part in parts)


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
