"""Norms and scaling of units (output filters), however an engine cuts and lays out the parameters.

A *unit* is an output filter or row: the slices along the first dimension of a tensor with two or more dimensions; a
vector or scalar is one unit. An engine keeps parameters whole (ddp), by rows (FSDP2) or in flat partitions whose
borders fall inside a filter (ZeRO). A ``UnitPlan`` is made once from that layout; every step then takes few, large
operations: neighbours in a flat partition are reduced together in blocks that no unit's border cuts, vectors of their
own in one multi-tensor call. One number a block is all that is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WIDE_BLOCK, SMALL_SPAN, NARROW_BLOCK = 128, 2**18, 16
"""Neighbours share a span if its blocks stay WIDE_BLOCK elements wide, which reduces at the speed of memory (measured:
35 GB/s against 26 GB/s with 64 and 37 GB/s with 4,096 on one core), or, in a span of at most SMALL_SPAN elements, where
the number of calls costs more than that, NARROW_BLOCK wide."""


@dataclass(frozen=True)
class Segment:
    """The half-open range [start, stop) of a flattened parameter, at ``offset`` in the flat tensor that holds it.

    ``stop == start`` says that this rank holds nothing of the parameter: it is listed all the same, so that every
    rank counts the same units.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int

    @property
    def units(self) -> int:
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def unit_size(self) -> int:
        return math.prod(self.shape) // max(1, self.units)

    def runs(self) -> Iterable[tuple[int, int, int, int]]:
        """Cuts the range at unit boundaries: (begin, end, first unit, units), begin and end inside the piece.

        At most three runs: the rest of a unit that an earlier rank began, whole units, the beginning of the next.
        """
        if self.stop <= self.start:
            return
        size, position = self.unit_size, self.start
        if position % size:
            end = min(self.stop, (position // size + 1) * size)
            yield position - self.start, end - self.start, position // size, 1
            position = end
        whole = (self.stop - position) // size
        if whole > 0:
            yield position - self.start, position - self.start + whole * size, position // size, whole
            position += whole * size
        if position < self.stop:
            yield position - self.start, self.stop - self.start, position // size, 1


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, and a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of this rank's part; never a copy. Units stay whole and in order, in channels-last too."""
    mine = local(tensor).detach()
    if mine.dim() == 4 and not mine.is_contiguous() and mine.is_contiguous(memory_format=torch.channels_last):
        mine = mine.permute(0, 2, 3, 1)
    return mine.view(-1)


@dataclass
class _Span:
    """Neighbouring units in one tensor: elements from ``offset`` on, ``counts[i]`` of them for unit ``first + i``."""

    tensor: int
    offset: int
    first: int
    counts: list[int]
    block: int
    total: int
    lengths: Tensor | None = None
    """Blocks of each unit, int64 [units]; None: one block each."""

    def joined(self, other: _Span) -> bool:
        """Takes ``other`` in where it goes on right behind, and their common blocks are wide enough."""
        block, total = math.gcd(self.block, other.block), self.total + other.total
        if (self.tensor, self.offset + self.total, self.first + len(self.counts)) != (
            other.tensor,
            other.offset,
            other.first,
        ):
            return False
        if not (
            block >= WIDE_BLOCK or (total <= SMALL_SPAN and block >= NARROW_BLOCK) or block == self.block == other.block
        ):
            return False
        self.counts += other.counts
        self.block, self.total = block, total
        return True

    @property
    def units(self) -> slice:
        return slice(self.first, self.first + len(self.counts))

    def rows(self, tensor: Tensor) -> Tensor:
        """[blocks, block] view of its elements."""
        return tensor[self.offset : self.offset + self.total].view(-1, self.block)


class UnitPlan:
    """Which elements of a list of flat tensors belong to which unit.

    Args:
        segments: for each tensor, what it is made of. Units are numbered through in that order, those of empty
            segments too, so that every rank numbers them alike.
        apart: for each tensor, whether it is told by unit; otherwise each of its segments counts as one unit, of
            which this rank may hold any part, and which is never scaled.
        device: of the tensors.
    """

    def __init__(self, segments: Sequence[Sequence[Segment]], apart: Sequence[bool], device: torch.device) -> None:
        self.first: list[int] = [0]
        """Number of each tensor's first unit, and at the end the number of units."""
        spans: list[_Span] = []
        self._wholes: list[_Span] = []
        for tensor, (parts, by_unit) in enumerate(zip(segments, apart, strict=True)):
            number = self.first[-1]
            for part in parts:
                if not by_unit:
                    size = part.stop - part.start
                    if size:
                        self._wholes.append(_Span(tensor, part.offset, number, [size], size, size))
                    number += 1
                    continue
                for begin, end, unit, count in part.runs():
                    size = (end - begin) // count
                    run = _Span(tensor, part.offset + begin, number + unit, [size] * count, size, end - begin)
                    if not (spans and spans[-1].joined(run)):
                        spans.append(run)
                number += part.units
            self.first.append(number)
        self._spans = [span for span in spans if len(span.counts) > 1]
        self._singles = [span for span in spans if len(span.counts) == 1]
        for span in self._spans:
            lengths = [count // span.block for count in span.counts]
            if max(lengths) > 1:
                span.lengths = torch.tensor(lengths, device=device)
        self._indices = [self._index(spans, device) for spans in (self._singles, self._wholes)]

    @staticmethod
    def _index(spans: Sequence[_Span], device: torch.device) -> Tensor:
        return torch.tensor([span.first for span in spans], dtype=torch.int64, device=device)

    @property
    def units(self) -> int:
        return self.first[-1]

    def square_sums(self, tensors: Sequence[Tensor | None], out: Tensor, wholes: bool = True) -> None:
        """Writes the sum of squares of this rank's elements of each unit to ``out`` [units], of zeros.

        Args:
            tensors: flat tensors as given to the plan; None leaves the units of one as they are.
            wholes: also for tensors that are not told by unit.
        """
        for span, rows in _held(self._spans, tensors):
            if span.lengths is None:
                torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype, out=out[span.units])
                continue
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype).square_()
            out[span.units] = torch.segment_reduce(squares, "sum", lengths=span.lengths, unsafe=True).sqrt_()
        for spans, index in zip((self._singles, self._wholes if wholes else []), self._indices, strict=True):
            held = _held(spans, tensors)
            if held:
                if len(held) < len(spans):
                    index = self._index([span for span, _ in held], out.device)
                norms = torch._foreach_norm([rows for _, rows in held], 2, dtype=out.dtype)
                out[index] = torch.stack(norms)
        out.square_()

    def scale(self, tensors: Sequence[Tensor | None], scale: Tensor) -> None:
        """Multiplies this rank's elements of each unit in place by ``scale`` [units]."""
        for span, rows in _held(self._spans, tensors):
            factors = scale[span.units].to(rows.dtype)
            if span.lengths is not None:
                factors = factors.repeat_interleave(span.lengths, output_size=len(rows))
            rows.mul_(factors[:, None])
        held = _held(self._singles, tensors)
        if held:
            index = self._indices[0]
            if len(held) < len(self._singles):
                index = self._index([span for span, _ in held], scale.device)
            singles = [rows for _, rows in held]
            torch._foreach_mul_(singles, scale[index].to(singles[0].dtype).unbind())  # type: ignore[arg-type]


def _held(spans: Sequence[_Span], tensors: Sequence[Tensor | None]) -> list[tuple[_Span, Tensor]]:
    """The spans whose tensor is there, with their rows."""
    found = ((span, tensors[span.tensor]) for span in spans)
    return [(span, span.rows(tensor)) for span, tensor in found if tensor is not None]
