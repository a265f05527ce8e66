"""Where each named parameter lives on this rank, whatever the engine: the base of clipping and of checkpoints.

A piece is a half-open range of a parameter, flattened in C order, inside a tensor ("holder") that the base optimizer
steps. Every engine reduces to that: DDP holds whole parameters, FSDP2 rows of them, ZeRO flat partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from scaletransfer.shares import shard_rows
from scaletransfer.units import Segment, flat


@dataclass(frozen=True)
class Piece:
    """``holder``'s elements [offset, offset + stop - start) are elements [start, stop) of parameter ``name``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    holder: Tensor
    offset: int

    def __len__(self) -> int:
        return self.stop - self.start

    def value(self) -> Tensor:
        """1-D view of the (fp32 master) values."""
        return flat(self.holder)[self.offset : self.offset + len(self)]

    def of(self, like_holder: Tensor) -> Tensor:
        """1-D view of the same part of a tensor shaped like the holder: its gradient or momentum."""
        return flat(like_holder)[self.offset : self.offset + len(self)]

    def segment(self) -> Segment:
        return Segment(self.shape, self.start, self.stop, self.offset)


def plain_pieces(module: nn.Module) -> list[Piece]:
    """Single and ddp: every parameter whole."""
    return [Piece(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in module.named_parameters() if p.requires_grad]


def fsdp2_pieces(module: nn.Module) -> list[Piece]:
    """fsdp2 and hsdp: rows of each parameter, ``Shard(0)`` over the last mesh dimension."""
    pieces = []
    for name, p in module.named_parameters():
        assert isinstance(p, DTensor) and p.placements[-1] == Shard(0), name
        assert p.placements[:-1] in ((), (Replicate(),)), name
        rows = p.shape[0] if p.dim() else 1
        first, last = shard_rows(rows, p.device_mesh.size(-1), p.device_mesh.get_local_rank(p.device_mesh.ndim - 1))
        row = p.numel() // max(1, rows)
        assert p.to_local().numel() == (last - first) * row, name
        pieces.append(Piece(name, tuple(p.shape), first * row, last * row, p, 0))
    return pieces


def zero12_pieces(module: nn.Module, zero: Any) -> list[Piece]:
    """ZeRO-1 and 2: ranges inside one flat fp32 partition per parameter group.

    DeepSpeed hangs the place of a parameter's fragment on the parameter (``_hp_mapping``); parameters without one have
    nothing on this rank and are listed with an empty range, so that all ranks list the same. ZeRO-1 in bf16 with fp32
    accumulation is another class in DeepSpeed (``BF16_Optimizer``) with the same partition under other names.
    """
    bf16 = type(zero).__name__ == "BF16_Optimizer"
    groups = zero.bf16_groups if bf16 else zero.bit16_groups
    holders = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    names = {id(p): name for name, p in module.named_parameters()}
    pieces = []
    for group, holder in zip(groups, holders, strict=True):
        for p in group:
            mapping = getattr(p, "_hp_mapping", None)
            start, stop, offset = 0, 0, 0
            if mapping is not None:
                inside, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                start, stop, offset = inside.start, inside.start + inside.numel, held.start
            pieces.append(Piece(names[id(p)], tuple(p.shape), int(start), int(stop), holder, int(offset)))
    return pieces


def zero3_pieces(module: nn.Module, zero: Any, rank: int) -> list[Piece]:
    """ZeRO-3: every parameter cut evenly over all ranks, in one flat fp32 tensor per sub-group."""
    names = {id(p): name for name, p in module.named_parameters()}
    pieces = []
    for group in zero.fp16_groups:
        for p in group:
            number, offset, held = zero.grad_position[zero.get_param_id(p)]
            start = min(p.ds_numel, rank * held)
            stop = min(p.ds_numel, start + held)
            holder = zero.fp32_partitioned_groups_flat[number]
            pieces.append(Piece(names[id(p)], tuple(p.ds_shape), int(start), int(stop), holder, int(offset)))
    return pieces


def check_cover(pieces: Sequence[Piece], module: nn.Module) -> None:
    """Every trainable parameter is listed exactly once. (That the ranges of all ranks tile it is checked on saving.)"""
    listed = sorted(piece.name for piece in pieces)
    expected = sorted(name for name, p in module.named_parameters() if p.requires_grad)
    if listed != expected:
        odd = sorted(set(listed) ^ set(expected))
        raise RuntimeError(f"the engine holds other parameters than the model has: {odd[:5]}")


def layout(pieces: Sequence[Piece]) -> dict[Tensor, Sequence[Segment]]:
    """For ``SGD_AGC.set_layout``: the segments of each holder, in the order that all ranks share."""
    held: dict[int, list[Segment]] = {}
    for piece in pieces:
        held.setdefault(id(piece.holder), []).append(piece.segment())
    return {piece.holder: held[id(piece.holder)] for piece in pieces}


STATES = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What checkpoints call the tensors that an optimizer keeps for a parameter, and what torch does."""


def states_of(optimizer: torch.optim.Optimizer, piece: Piece) -> dict[str, Tensor]:
    """1-D views of what the optimizer keeps for the piece, by their names in checkpoints; {} before the first step."""
    state = optimizer.state.get(piece.holder, {})
    return {kind: piece.of(state[key]) for kind, key in STATES.items() if state.get(key) is not None}


def momentum_of(optimizer: torch.optim.Optimizer, piece: Piece) -> Tensor | None:
    """1-D view of the piece's momentum, or None before the first step or without momentum."""
    return states_of(optimizer, piece).get("momentum")


def set_state(optimizer: torch.optim.Optimizer, piece: Piece, kind: str, values: Tensor) -> None:
    """Writes a piece's state of a kind of ``STATES``, making the holder's tensor (zeros) where there is none yet."""
    state, key = optimizer.state[piece.holder], STATES[kind]
    if state.get(key) is None:
        state[key] = torch.zeros_like(piece.holder)
    target = piece.of(state[key])
    target.copy_(values.to(target.dtype))


def updates_of(optimizer: torch.optim.Optimizer) -> int | None:
    """How many updates an optimizer that counts them (AdamW) has made; None for others."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counts) if counts else None
