"""Shards + order -> batches. The whole state is one integer, the number of samples seen.

A batch is a dictionary: ``image`` uint8 (uint16 for 16-bit shards) [b, c, H, W] with c = 1 for grey, ``target``
float32 [b, L] with NaN for unknown or int64 [b], ``position`` int64 [b], ``key`` int64 [b] (the 16 hex digits of the
sample's key, reinterpreted as signed), ``bytes`` int64 [] read for this batch, ``reads`` int64 [4] (bytes from remote
storage, hits and misses of the cache, retries), ``bad`` (one sentence for each sample that could not be used) and
``bad_key`` int64 [len(bad)].

An image is read by (shard, offset, size) from the sample table: one read, nothing that belongs to another rank.
``streams`` runs all this in threads or processes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from scaletransfer import labels
from scaletransfer.decode import Decoding, decode_at
from scaletransfer.fused import Fused
from scaletransfer.index import ShardIndex
from scaletransfer.losses import UNKNOWN_CLASS
from scaletransfer.order import Positions, rank_positions, sample_seed, sample_uniforms
from scaletransfer.shard_reader import Entry, ShardReader, entries_of, image_place, known_whole, read_view
from scaletransfer.storage_errors import StorageError
from scaletransfer.storage_settings import RemoteSettings
from scaletransfer.transforms import seeded

Batch = dict[str, Any]
_LOOKED_UP = 64  # targets at once in the search for a known one: the first few nearly always have one


@dataclass(frozen=True, kw_only=True)
class Source:
    """One folder of shards as a training source: its split, and how its raw labels become targets."""

    index: ShardIndex
    split: str
    policy: labels.LabelPolicy
    names: tuple[str, ...]
    """Target names of the whole run: the order of the columns of ``target``."""

    @property
    def shards(self) -> tuple[int, ...]:
        """Samples of each shard, in the order of the sample table; of loose files in memory, one each."""
        if not self.index.in_memory:
            return tuple(shard.samples for shard in self.index.splits[self.split].shards)
        shard = self.index.table(self.split)["shard"]
        edges = np.flatnonzero(np.diff(shard)) + 1  # archives of many images lie mixed
        return tuple(np.diff(np.concatenate([[0], edges, [len(shard)]])).tolist())

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, L] with NaN for unknown, or int64 [n], for rows of the sample table."""
        chosen = self.index.table(self.split)[rows]
        if self.index.task == "multiclass":
            return chosen["label"].astype(np.int64)
        own = labels.vocabulary(self.index.source, self.policy, self.index.label_names)
        values = labels.targets(chosen["labels"], self.index.label_names, self.index.source, self.policy)
        return values if own == self.names else labels.project(values, own, self.names)


def target_names(
    indexes: Sequence[ShardIndex], policy: labels.LabelPolicy, findings: str, expected: Sequence[str] | None
) -> tuple[str, ...]:
    """The names of the targets that these indexes train together.

    Raises:
        ValueError: multi-class and multi-label sets together, multi-class sets with different classes, no common
            finding, salts that differ, or names that are not the ``expected`` ones.
    """
    tasks = {index.task for index in indexes}
    if len(tasks) > 1:
        raise ValueError(f"data.train mixes {' and '.join(sorted(tasks))} shards: train them in separate runs")
    first = indexes[0]
    for other in indexes[1:]:
        if other.salt_fingerprint != first.salt_fingerprint:
            raise ValueError(
                f"{first.where} and {other.where} were made with different salts, so their patients cannot be "
                "compared: make both with the same --salt-file"
            )
    if first.task == "multiclass":
        names = first.label_names
        for other in indexes[1:]:
            if other.label_names != names:
                raise ValueError(f"{other.where} has other classes than {first.where}: their class lists must be equal")
    else:
        vocabularies = [labels.vocabulary(i.source, policy, i.label_names) for i in indexes]
        how = "union" if findings == "union" else "intersection"
        names = vocabularies[0] if len(vocabularies) == 1 else labels.combine(vocabularies, how)
        if not names:
            raise ValueError("the sources have no finding in common: set data.findings to union")
    if expected is not None and tuple(expected) != tuple(names):
        raise ValueError(
            f"data.expect_labels is {list(expected)} but the shards give {list(names)}: these are the shards of "
            "another data set, or the label policy differs; if they are meant, set data.expect_labels to null"
        )
    return tuple(names)


@dataclass(kw_only=True)
class Pending:
    """A batch on its way: everything but the pixels is there. Its images may be filled in by several threads."""

    positions: list[int]
    where: list[tuple[int, int]]
    """(source, table row) of each sample."""
    entries: list[Entry | None]
    """What the row says, all there when the batch is begun."""
    target: np.ndarray
    key: np.ndarray
    image: Tensor | None
    """Memory for the pixels, where their shape is known beforehand."""
    loose: list[np.ndarray | None]
    """The pixels of each sample, where it is not."""
    sizes: list[int]
    bad: dict[int, str] = field(default_factory=dict)
    pixels: np.ndarray | None = None
    """``image`` as an array."""


class ShardDataset(Dataset[Batch]):
    """Batches by position. ``__getitems__`` takes the positions of one micro-batch and gives the finished batch.

    Args:
        sources: the sources of the run, in the order of ``order``.
        order: position -> (source, row); None for validation, where position is the row of the concatenated sources.
        transform: a ``Fused``; or decoded [c, H, W] tensor -> tensor of one size, whose randomness is drawn from
            torch's generator, seeded here by (seed, position).
        channels: 1 (grey) or 3. seed: of the run.
        depth: 8 for uint8 images, 16 for uint16; None takes each source's own from its index.
        pixel_max: the value that stands for white in 16-bit batches, to which images of every source are scaled;
            None takes the largest of the sources. 8-bit batches have 255.
        max_bad: samples that may turn out unreadable before one is an error; they have unknown targets.
        twice: of each source, rows to be left out as if unreadable (`shard_reader.check_once`).
        remote: how shards named by a URL are read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Positions | None,
        transform: Callable[[Tensor], Tensor] | Fused,
        channels: int,
        seed: int,
        depth: int | None = None,
        pixel_max: int | None = None,
        *,
        max_bad: int = 0,
        twice: Sequence[frozenset[int]] = (),
        remote: RemoteSettings | None = None,
    ) -> None:
        self.sources, self.order = tuple(sources), order
        self.fused = transform if isinstance(transform, Fused) else None
        self.transform = None if isinstance(transform, Fused) else transform
        self.channels, self.depth = channels, depth
        assert self.fused is None or self.fused.channels == channels
        whites = [source.index.image.white(depth or source.index.image.bit_depth) for source in self.sources]
        self.pixel_max = pixel_max or max(whites)
        self.seed, self.max_bad, self.twice = seed, max_bad, tuple(twice)
        self.reader = ShardReader(remote)
        self._decoding = [self._decoding_of(source.index) for source in self.sources]
        self._starts = np.concatenate([[0], np.cumsum([len(s.index.table(s.split)) for s in self.sources])])
        self._counters, self._counted = self.reader.counters, np.zeros(4, dtype=np.int64)
        self._spare: list[np.ndarray] = []

    def _decoding_of(self, index: ShardIndex) -> Decoding:
        image = index.image
        return Decoding(depth=self.depth or image.bit_depth, deep_white=image.deep_white, white=self.pixel_max)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and table row of each position."""
        if self.order is not None:
            return self.order.locate(positions)
        source = np.searchsorted(self._starts, positions, side="right") - 1
        return source, positions - self._starts[source]

    def nothing_known(self, positions: np.ndarray) -> bool:
        """Whether every target at these positions is unknown, which the sample tables alone say."""
        for first in range(0, len(positions), _LOOKED_UP):
            source, row = self.locate(positions[first : first + _LOOKED_UP])
            for number in np.unique(source):
                values = self.sources[number].targets(row[source == number])
                if values.dtype.kind != "f" or not np.isnan(values).all():
                    return False
        return True

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        pending = self.begin(positions)
        for number in range(len(positions)):
            self.load(pending, number)
        return self.finish(pending)

    def begin(self, positions: Sequence[int], *, pinned: bool = False) -> Pending:
        """A batch without its pixels. pinned: in memory from which a GPU may copy by itself."""
        where = np.asarray(positions, dtype=np.int64)
        source, row = self.locate(where)
        key = np.empty(len(where), dtype=np.int64)
        target: np.ndarray | None = None
        entries: list[Entry | None] = [None] * len(where)
        for number, chosen in enumerate(self.sources):
            mine = np.flatnonzero(source == number)
            if len(mine) == 0:
                continue
            values = chosen.targets(row[mine])
            if target is None:
                target = np.empty((len(where), *values.shape[1:]), dtype=values.dtype)
            target[mine] = values
            rows = chosen.index.table(chosen.split)[row[mine]]
            key[mine] = rows["key"].view(np.int64)
            for place, entry in zip(mine.tolist(), entries_of(rows), strict=True):
                entries[place] = entry
        assert target is not None
        pending = Pending(
            positions=where.tolist(),
            where=list(zip(source.tolist(), row.tolist(), strict=True)),
            entries=entries,
            target=target,
            key=key,
            image=None,
            loose=[None] * len(where),
            sizes=[0] * len(where),
        )
        if self.fused is not None:
            depths = {how.depth for how in self._decoding}
            assert len(depths) == 1, "open_data checks this"
            shape = (len(where), self.channels, self.fused.size, self.fused.size)
            if pinned:  # memory of this kind is kept by torch
                pending.image = torch.empty(
                    shape, dtype=torch.uint8 if depths == {8} else torch.uint16, pin_memory=True
                )
                pending.pixels = pending.image.numpy()
            else:
                pending.pixels = self._memory(shape, np.uint8 if depths == {8} else np.uint16)
                pending.image = torch.from_numpy(pending.pixels)
        return pending

    def _memory(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """Memory for a batch: of one that nobody holds any more, so that its pages need not be made again."""
        spare = self._spare
        while spare and (spare[-1].shape != shape or spare[-1].dtype != dtype):
            spare.pop()
        whole = spare.pop() if spare else np.empty(shape, dtype)
        lent = whole.view()
        # a tensor of it, and every view of that tensor, holds this very object: it is gone when the last of them is
        weakref.finalize(lent, spare.append, whole).atexit = False
        return lent

    def load(self, pending: Pending, number: int) -> None:
        """Read and decode sample ``number`` of a batch into it; several threads may do this at once.

        Raises:
            ValueError: the sample cannot be read or decoded, and none may be bad.
        """
        which, row = pending.where[number]
        source = self.sources[which]
        if self.twice and row in self.twice[which]:
            pending.bad[number] = f"{image_place(source.index, source.split, row)} is another row's sample once more"
            return
        try:
            data = self._read(source, row, pending.entries[number])
            pending.sizes[number] = len(data)
            self._decode(pending, number, source, row, data)
        except StorageError:
            raise  # of the server, not of the sample: the next one fares no better
        except ValueError as error:
            if not self.max_bad:
                raise
            pending.bad[number] = str(error)

    def _decode(self, pending: Pending, number: int, source: Source, row: int, data: bytes | memoryview) -> None:
        try:
            how = self._decoding[pending.where[number][0]]
            if self.fused is not None:
                assert pending.pixels is not None
                uniforms = sample_uniforms(self.seed, pending.positions[number], self.fused.geometry.draws)
                whole = known_whole(source.index, pending.entries[number])
                self.fused(data, how, uniforms, pending.pixels[number], whole=whole)
                return
            planes = torch.from_numpy(decode_at(data, self.channels, how))
        except ValueError as error:
            mend = (
                "replace or remove it, or make shards, which leave such images out"
                if source.index.in_memory
                else "the shard is damaged, check it with `scaletransfer shards verify`"
            )
            where = image_place(source.index, source.split, row)
            raise ValueError(f"{where} cannot be decoded ({error}): {mend}") from error
        self.use(pending, number, planes[None] if self.channels == 1 else planes.movedim(-1, 0))

    def use(self, pending: Pending, number: int, planes: Tensor) -> None:
        """Put decoded [c, H, W] into the batch, contiguous: a batch's strides choose the kernel of a convolution."""
        assert self.transform is not None
        with seeded(sample_seed(self.seed, pending.positions[number])):
            pending.loose[number] = self.transform(planes).contiguous().numpy()

    def _read(self, source: Source, row: int, entry: Entry | None) -> bytes | memoryview:
        """The bytes of an image file; ValueError, naming the shard and the offset, where they cannot be had."""
        try:
            return read_view(self.reader, source.index, source.split, row, entry)
        except OSError as error:
            where, reason = image_place(source.index, source.split, row), error.strerror or type(error).__name__
            raise ValueError(f"{where} cannot be read ({reason}): copy the file again, then start again") from error

    def image_bytes(self) -> int:
        """Bytes of one image of a batch; of pipelines whose result is not known beforehand, of a black image's."""
        if self.fused is not None:
            return self.channels * self.fused.size**2 * self._decoding[0].depth // 8
        return self._black().nbytes

    def _black(self) -> np.ndarray:
        """What torchvision's pipeline makes of a black image: the shape and type of all images."""
        assert self.transform is not None
        dtype = torch.uint16 if self._decoding[0].depth == 16 else torch.uint8
        with seeded(0):
            return self.transform(torch.zeros(self.channels, 64, 64, dtype=dtype)).numpy()

    def finish(self, pending: Pending) -> Batch:
        """The batch, when every sample was loaded."""
        if pending.bad:
            self._spoil(pending)
        image = pending.image
        if image is None:
            image = torch.from_numpy(np.stack([pixels for pixels in pending.loose if pixels is not None]))
        counters = self.reader.counters
        if counters is not self._counters:  # a forked process counts from 0
            self._counters, self._counted = counters, np.zeros(4, dtype=np.int64)
        now = np.array([counters.remote_bytes, counters.cache_hits, counters.cache_misses, counters.retries])
        reads, self._counted = now - self._counted, now
        bad = sorted(pending.bad)
        return {
            "image": image,
            "target": torch.from_numpy(pending.target),
            "position": torch.tensor(pending.positions),
            "key": torch.from_numpy(pending.key),
            "bytes": torch.tensor(sum(pending.sizes)),
            "reads": torch.from_numpy(reads),
            "bad": [pending.bad[number] for number in bad],
            "bad_key": torch.from_numpy(pending.key[bad]),
        }

    def _spoil(self, pending: Pending) -> None:
        """Bad samples: black, and nothing is known of them."""
        unknown = np.nan if pending.target.dtype.kind == "f" else UNKNOWN_CLASS
        black = self._black() if pending.pixels is None else None
        for number in pending.bad:
            pending.target[number] = unknown
            if pending.pixels is not None:
                pending.pixels[number] = 0
            else:
                assert black is not None
                pending.loose[number] = np.zeros_like(black)


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one rank, step after step, from ``samples_seen`` on: pure functions of the position."""

    def __init__(self, samples_seen: int, stop: int, rank: int, world: int, micro: int, global_batch: int) -> None:
        assert samples_seen % global_batch == 0 and stop % global_batch == 0
        self.steps = range(samples_seen // global_batch, stop // global_batch)
        self.rank, self.world, self.micro, self.global_batch = rank, world, micro, global_batch

    def __len__(self) -> int:
        return len(self.steps) * (self.global_batch // (self.world * self.micro))

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from rank_positions(step, self.rank, self.world, self.micro, self.global_batch).tolist()


class EvalSampler(Sampler[list[int]]):
    """Batches for validation: every sample once over all ranks, every rank the same number of batches.

    Where samples run out, a rank repeats sample 0; ``evaluate`` drops what is not its own by position.
    """

    def __init__(self, samples: int, rank: int, world: int, batch: int) -> None:
        self.samples, self.rank, self.world, self.batch = samples, rank, world, batch

    def __len__(self) -> int:
        return math.ceil(self.samples / (self.world * self.batch))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.world + self.rank) * self.batch
            mine = list(range(first, min(self.samples, first + self.batch)))
            yield mine + [0] * (self.batch - len(mine))
