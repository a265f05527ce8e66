"""Norms and scaling of units (output filters), however an engine cuts and lays out the parameters.

A *unit* is an output filter or row: the slices along the first dimension of a tensor with two or more dimensions; a
vector or scalar is one unit. An engine keeps parameters whole (ddp), by rows (FSDP2) or in flat partitions whose
borders fall inside a filter (ZeRO). A ``UnitPlan`` is made once from that layout; every step then takes few, large
operations: neighbours in a flat partition are reduced together in blocks that no unit's border cuts, vectors of their
own in one multi-tensor call. One number a block is all that is allocated. On a CPU the plan is cut into chunks that
stay in the cache from one operation to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WIDE_BLOCK, SMALL_SPAN, NARROW_BLOCK = 128, 2**18, 16
"""Neighbours share a span if its blocks stay WIDE_BLOCK elements wide, which reduces at the speed of memory (measured:
35 GB/s against 26 GB/s with 64 and 37 GB/s with 4,096 on one core), or, in a span of at most SMALL_SPAN elements, where
the number of calls costs more than that, NARROW_BLOCK wide."""
CHUNK = 2**18
"""Numbers whose norm a CPU takes at once in float64, of which it makes a copy: 2 MiB, which stay in its cache."""


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


def flattens(tensor: Tensor) -> bool:
    """Whether `flat` can give a view of this rank's part."""
    mine = local(tensor)
    last = mine.dim() == 4 and mine.is_contiguous(memory_format=torch.channels_last)
    return last or mine.is_contiguous()


def flat(tensor: Tensor) -> Tensor:
    """One-dimensional view of this rank's part; never a copy. Units stay whole and in order, in channels-last too."""
    mine = local(tensor).detach()
    if mine.dim() == 4 and not mine.is_contiguous() and mine.is_contiguous(memory_format=torch.channels_last):
        mine = mine.permute(0, 2, 3, 1)
    return mine.view(-1)


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """This rank's part in one-dimensional views, small enough that a float64 copy of one costs next to nothing."""
    mine = flat(tensor)
    return mine.split(CHUNK if mine.device.type == "cpu" else 64 * CHUNK)


def square_norm(tensor: Tensor) -> Tensor:
    """Sum of squares of this rank's part: a float64 scalar on its device."""
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in chunks(tensor)]).square().sum()


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
    dims: tuple[int, ...] = (1,)
    """The dimensions of ``rows`` within a unit's block."""
    entire: bool = False
    """It is all of its tensor, with a unit in each row, or a single one in all: no view need be made."""

    def joined(self, other: _Span) -> bool:
        """Takes ``other`` in where it goes on right behind, and their common blocks are wide enough."""
        block, total = math.gcd(self.block, other.block), self.total + other.total
        behind = (self.tensor, self.offset + self.total, self.first + len(self.counts))
        if behind != (other.tensor, other.offset, other.first):
            return False
        small = total <= SMALL_SPAN and block >= NARROW_BLOCK
        if not (block >= WIDE_BLOCK or small or block == self.block == other.block):
            return False
        self.counts += other.counts
        self.block, self.total = block, total
        return True

    def split(self, most: int) -> list[_Span]:
        """It in parts of about ``most`` elements, cut between units."""
        found: list[_Span] = []
        size = offset = start = 0
        for number, count in enumerate([*self.counts, most]):
            if start < number and size + count > most:
                counts = self.counts[start:number]
                place = self.offset + offset
                found.append(_Span(self.tensor, place, self.first + start, counts, self.block, size))
                start, offset, size = number, offset + size, 0
            size += count
        return found

    def settle(self, tensor: Tensor) -> None:
        """Finds what is the same in every step; ``tensor`` is the one that the span lies in."""
        lengths = [count // self.block for count in self.counts]
        if max(lengths) > 1:
            self.lengths = torch.tensor(lengths, device=tensor.device)
        by_row = tensor.dim() >= 2 and tensor.shape[0] == len(lengths)
        if self.lengths is None and self.total == tensor.numel() and (by_row or len(lengths) == 1):
            self.entire, self.dims = True, tuple(range(1, tensor.dim()))

    @property
    def units(self) -> slice:
        return slice(self.first, self.first + len(self.counts))

    def rows(self, tensor: Tensor) -> Tensor:
        """[blocks, ...] view of its elements."""
        if self.entire:
            return tensor
        return flat(tensor)[self.offset : self.offset + self.total].view(-1, self.block)


@dataclass
class Chunk:
    """Units that are stepped together, of tensors of one group: the spans that they lie in."""

    group: int
    spans: list[_Span] = field(default_factory=list)
    wholes: list[_Span] = field(default_factory=list)
    """Of tensors that are not told by unit."""
    ends: dict[int, int] = field(default_factory=dict)
    """Tensor -> the element before which its units belong to this chunk or an earlier one."""
    total: int = 0

    def settle(self, tensors: Sequence[Tensor]) -> None:
        """Finds what is the same in every step; tensors: of the plan."""
        spans = [*self.spans, *self.wholes]
        for span in spans:
            span.settle(tensors[span.tensor])
        edges = [edge for span in spans for edge in (span.units.start, span.units.stop)]
        self.units = slice(min(edges, default=0), max(edges, default=0))
        """The numbers of its units; perhaps of a few others too."""
        self._many = [span for span in self.spans if len(span.counts) > 1]
        self._singles = [span for span in self.spans if len(span.counts) == 1]

    def norms(self, tensors: Sequence[Tensor | None], out: Tensor, wholes: bool = True) -> None:
        """Writes the norm of this rank's elements of each unit to ``out`` [units of the plan]; see ``UnitPlan``."""
        for span, rows in _held(self._many, tensors):
            if span.lengths is None:
                torch.linalg.vector_norm(rows, dim=span.dims, dtype=out.dtype, out=out[span.units])
                continue
            squares = torch.linalg.vector_norm(rows, dim=span.dims, dtype=out.dtype).square_()
            out[span.units] = torch.segment_reduce(squares, "sum", lengths=span.lengths, unsafe=True).sqrt_()
        singles = _held([*self._singles, *(self.wholes if wholes else [])], tensors)
        if singles:
            norms = torch._foreach_norm([rows for _, rows in singles], 2, dtype=out.dtype)
            out[_index(singles, out.device)] = torch.stack(norms)

    def scale(self, tensors: Sequence[Tensor | None], scale: Tensor) -> None:
        """Multiplies this rank's elements of each unit in place by ``scale`` [units of the plan]."""
        scaled: list[Tensor] = []
        factors: list[Tensor] = []
        for span, rows in _held(self._many, tensors):
            factor = scale[span.units].to(rows.dtype)
            if span.lengths is not None:
                factor = factor.repeat_interleave(span.lengths, output_size=len(rows))
            scaled.append(rows)
            factors.append(factor.view(-1, *(1 for _ in span.dims)))
        singles = _held(self._singles, tensors)
        if singles:
            scaled += [rows for _, rows in singles]
            factors += scale[_index(singles, scale.device)].to(scaled[0].dtype).unbind()
        if scaled:
            torch._foreach_mul_(scaled, factors)  # type: ignore[arg-type]


class UnitPlan:
    """Which elements of a list of tensors belong to which unit.

    Args:
        tensors: what this rank holds of each parameter, or flat partitions; of them, only the shapes are looked at.
        segments: for each tensor, what it is made of. Units are numbered through in that order, those of empty
            segments too, so that every rank numbers them alike.
        apart: for each tensor, whether it is told by unit; otherwise each of its segments counts as one unit, of
            which this rank may hold any part, and which is never scaled.
        groups: for each tensor, a number; a chunk has tensors of one group. None: all are of one.
        most: elements of a chunk, but for single units that have more; None: a group is one chunk.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        segments: Sequence[Sequence[Segment]],
        apart: Sequence[bool],
        groups: Sequence[int] | None = None,
        most: int | None = None,
    ) -> None:
        self.first: list[int] = [0]
        """Number of each tensor's first unit, and at the end the number of units."""
        self.chunks: list[Chunk] = []
        for tensor, (parts, by_unit) in enumerate(zip(segments, apart, strict=True)):
            spans: list[_Span] = []
            number = self.first[-1]
            for part in parts:
                if not by_unit:
                    size = part.stop - part.start
                    if size:
                        spans.append(_Span(tensor, part.offset, number, [size], size, size))
                    number += 1
                    continue
                for begin, end, unit, count in part.runs():
                    size = (end - begin) // count
                    run = _Span(tensor, part.offset + begin, number + unit, [size] * count, size, end - begin)
                    if not (spans and spans[-1].joined(run)):
                        spans.append(run)
                number += part.units
            self.first.append(number)
            whole = tensors[tensor]
            if most and by_unit and flattens(whole):
                spans = [part for span in spans for part in (span.split(most) if span.total > most else [span])]
            self._append(tensor, spans, whole.numel(), by_unit, groups[tensor] if groups else 0, most)
        for chunk in self.chunks:
            chunk.settle(tensors)

    def _append(
        self, tensor: int, spans: list[_Span], elements: int, by_unit: bool, group: int, most: int | None
    ) -> None:
        spans = sorted(spans, key=lambda span: span.offset)
        for place in range(max(1, len(spans))):
            span = spans[place] if spans else None
            new = not self.chunks or self.chunks[-1].group != group
            if new or (most and span and self.chunks[-1].total + span.total > most):
                self.chunks.append(Chunk(group))
            chunk = self.chunks[-1]
            if span:
                (chunk.spans if by_unit else chunk.wholes).append(span)
                chunk.total += span.total
            chunk.ends[tensor] = spans[place + 1].offset if place + 1 < len(spans) else elements

    @property
    def units(self) -> int:
        return self.first[-1]

    def square_sums(self, tensors: Sequence[Tensor | None], out: Tensor, wholes: bool = True) -> None:
        """Writes the sum of squares of this rank's elements of each unit to ``out`` [units], of zeros.

        Args:
            tensors: like those given to the plan; None leaves the units of one as they are.
            wholes: also for tensors that are not told by unit.
        """
        for chunk in self.chunks:
            chunk.norms(tensors, out, wholes)
        out.square_()

    def scale(self, tensors: Sequence[Tensor | None], scale: Tensor) -> None:
        """Multiplies this rank's elements of each unit in place by ``scale`` [units]."""
        for chunk in self.chunks:
            chunk.scale(tensors, scale)


def _held(spans: Sequence[_Span], tensors: Sequence[Tensor | None]) -> list[tuple[_Span, Tensor]]:
    """The spans whose tensor is there, with their rows."""
    found = ((span, tensors[span.tensor]) for span in spans)
    return [(span, span.rows(tensor)) for span, tensor in found if tensor is not None]


def _index(held: Sequence[tuple[_Span, Tensor]], device: torch.device) -> Tensor:
    return torch.tensor([span.first for span, _ in held], dtype=torch.int64, device=device)
