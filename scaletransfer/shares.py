"""What each engine holds on a rank between two steps: pure arithmetic on shapes, for the planner and for the engines.

``engine.holdings`` compares live storages with it, ``plan_bytes`` adds activations, gathered blocks and buckets. Each
engine rounds a rank's share in its own way: FSDP2 by rows, ZeRO-3 by parameter, ZeRO-1 and 2 by flat group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

FLOAT = 4
"""Bytes of a float32 number: masters, momentum and reduced gradients always are."""
PERSISTENT = 100_000
"""ZeRO-3 keeps parameters of at most so many numbers whole (DeepSpeed's stage3_param_persistence_threshold)."""
ALIGNED = 2
"""A rank's part of a flat group is a multiple of so many numbers (DeepSpeed's nccl_start_alignment_factor)."""
COPY_BLOCK = 1 << 26
"""Numbers in a block of the host memory that a checkpoint is copied to before it is written (256 MiB)."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on one rank."""

    parameters: int
    """What the network computes with, between two steps."""
    masters: int
    """float32 copies beside them, which the optimizer steps; 0 where it steps the parameters themselves."""
    gradients: int
    """What lives between the last backward and the optimizer's step."""
    momentum: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.parameters + self.masters + self.gradients + self.momentum


def shard_rows(rows: int, world: int, rank: int) -> tuple[int, int]:
    """First and last (exclusive) row of a rank under ``Shard(0)``: ``torch.chunk``'s rule, later ranks may be empty."""
    chunk = -(-rows // world)
    return min(rows, rank * chunk), min(rows, (rank + 1) * chunk)


def row_share(shapes: Sequence[Shape], world: int) -> int:
    """Numbers of a rank under FSDP2. Every rank's storage has the first one's size: later ones are padded to it."""
    return sum(shard_rows(rows(shape), world, 0)[1] * row_size(shape) for shape in shapes)


def rows(shape: Shape) -> int:
    """Length of the dimension that FSDP2 splits; a scalar is one row."""
    return shape[0] if shape else 1


def row_size(shape: Shape) -> int:
    """Numbers in one row."""
    return math.prod(shape[1:])


def flat_share(shapes: Sequence[Shape], world: int) -> int:
    """Numbers of a rank in a flat group that is cut into equal parts (ZeRO-1 and 2)."""
    return -(-sum(map(math.prod, shapes)) // (ALIGNED * world)) * ALIGNED


def cut_parameters(groups: Sequence[Sequence[Shape]], world: int, rank: int) -> int:
    """Numbers of the parameters that lie in a rank's part of the flat groups, wholly or partly (ZeRO-1 and 2).

    groups: shapes in the order of the optimizer's parameter groups.
    """
    found = 0
    for shapes in groups:
        share, start = flat_share(shapes, world), 0
        for size in map(math.prod, shapes):
            found += size if start < (rank + 1) * share and start + size > rank * share else 0
            start += size
    return found


def parameter_share(shapes: Sequence[Shape], world: int) -> int:
    """Numbers of a rank under ZeRO-3, which cuts every parameter evenly and pads each part."""
    return sum(-(-math.prod(shape) // world) for shape in shapes)


def persistent(shapes: Sequence[Shape], threshold: int = PERSISTENT) -> int:
    """Numbers of the small parameters that ZeRO-3 keeps whole beside their parts."""
    return sum(size for size in map(math.prod, shapes) if size <= threshold)


def held(
    engine: str,
    groups: Sequence[Sequence[Shape]],
    world: int,
    *,
    shards: int | None = None,
    rank: int = 0,
    precision: str = "fp32",
    momentum: int = 1,
    threshold: int = PERSISTENT,
) -> Held:
    """What an engine holds on a rank.

    Args:
        engine: its name; what zero3_offload holds on the host is counted as well.
        groups: shapes of the trained parameters, one list a parameter group of the optimizer.
        world: ranks; shards: of them, those that share one copy of the state under hsdp (default: all).
        rank: differs in what ZeRO-1 and 2 keep of parameters that are cut.
        precision: "fp32" or "bf16", or "fp64", which DeepSpeed does not offer; momentum: one number a parameter;
            threshold: see ``PERSISTENT``.
    """
    shapes = [shape for group in groups for shape in group]
    whole = sum(map(math.prod, shapes))
    if engine in ("single", "ddp", "fsdp2", "hsdp"):
        share = whole if engine in ("single", "ddp") else row_share(shapes, shards or world)
        size = (8 if precision == "fp64" else FLOAT) * share
        return Held(parameters=size, masters=0, gradients=size, momentum=size * momentum)
    compute = 2 if precision == "bf16" else FLOAT
    if engine in ("zero1", "zero2"):
        share = sum(flat_share(group, world) for group in groups)
        if precision == "bf16":
            # Accumulated in fp32 in a buffer of its own: under ZeRO-1 whole and beside the bf16 gradients (DeepSpeed's
            # BF16_Optimizer), this rank's share alone under ZeRO-2.
            gradients = whole + whole // 2 if engine == "zero1" else share
        else:
            # Views of what backward made: a parameter that is cut at a part's end is held whole on both sides.
            gradients = cut_parameters(groups, world, rank)
        return Held(
            parameters=compute * whole,
            masters=FLOAT * share,
            gradients=FLOAT * gradients,
            momentum=FLOAT * share * momentum,
        )
    assert engine in ("zero3", "zero3_offload"), engine
    share = parameter_share(shapes, world)
    # Partitions in float32 are the masters themselves (engine.zero_memory), but with offload.
    shared = precision != "bf16" and engine == "zero3"
    # With offload a second copy: where micro-batches are added up, and what the optimizer is given.
    copies = 2 if engine == "zero3_offload" else 1
    return Held(
        parameters=compute * (share + persistent(shapes, threshold)),
        masters=0 if shared else FLOAT * share,
        gradients=copies * FLOAT * share,
        momentum=FLOAT * share * momentum,
    )


def copied(
    engine: str,
    groups: Sequence[Sequence[Shape]],
    world: int,
    *,
    shards: int | None = None,
    momentum: bool = True,
    pinned: bool = False,
) -> int:
    """Bytes of host memory that a rank keeps for copies of what it writes into checkpoints while training goes on.

    float32 weights and momentum of what it holds, or of an even part of that where other ranks hold the same
    (``engine.checkpoint_copy``).

    Args:
        engine, groups, world, shards, momentum: as for ``held``.
        pinned: it is copied from a GPU; torch rounds each block of pinned memory up to a power of two.
    """
    share = held(engine, groups, world, shards=shards).momentum // FLOAT
    replicas = world if engine == "ddp" else world // (shards or world) if engine == "hsdp" else 1
    blocks, rest = divmod(-(-share // replicas) * (2 if momentum else 1), COPY_BLOCK)
    if pinned and rest:
        rest = 1 << (rest - 1).bit_length()
    return FLOAT * (blocks * COPY_BLOCK + rest)
