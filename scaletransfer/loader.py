"""Shards + order -> batches. The whole state is one integer, the number of samples seen.

A batch is a dictionary: ``image`` uint8 (uint16 for 16-bit shards) [b, c, H, W] with c = 1 for grey, ``target``
float32 [b, L] with NaN for unknown or int64 [b], ``position`` int64 [b], ``key`` int64 [b] (the 16 hex digits of the
sample's key, reinterpreted as signed), ``bytes`` int64 [] read from the shards for this batch.

An image is read by (shard, offset, size) from the sample table: one pread, nothing that belongs to another rank.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scaletransfer import image_files, labels
from scaletransfer.decode import decode
from scaletransfer.image_files import INSIDE
from scaletransfer.index import ShardIndex
from scaletransfer.order import Positions, rank_positions, sample_seed
from scaletransfer.transforms import seeded

Batch = dict[str, Tensor]
_OPEN_FILES = 64
_TAR_BLOCK = 512
_LOOKED_UP = 64  # targets at once in the search for a known one: the first few nearly always have one
_CUT_SHARD = "it is truncated, make the shards again"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One folder of shards as a training source: its split, and how its raw labels become targets."""

    index: ShardIndex
    split: str
    policy: labels.LabelPolicy
    names: tuple[str, ...]
    """Target names of the whole run: the order of the columns of ``target``."""

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
                f"{first.folder} and {other.folder} were made with different salts, so their patients cannot be "
                "compared: make both with the same --salt-file"
            )
    if first.task == "multiclass":
        names = first.label_names
        for other in indexes[1:]:
            if other.label_names != names:
                raise ValueError(
                    f"{other.folder} has other classes than {first.folder}: their class lists must be equal"
                )
    else:
        vocabularies = [labels.vocabulary(i.source, policy, i.label_names) for i in indexes]
        how = "union" if findings == "union" else "intersection"
        names = vocabularies[0] if len(vocabularies) == 1 else labels.combine(vocabularies, how)
        if not names:
            raise ValueError("the sources have no finding in common: set data.findings to union")
    if expected is not None and tuple(expected) != tuple(names):
        raise ValueError(
            f"data.expect_labels is {list(expected)} but the shards give {list(names)}: these are the shards of "
            "another data set, or the label policy differs"
        )
    return tuple(names)


class ShardReader:
    """Reads byte ranges of shard files; a few files stay open. Picklable: workers open their own."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": OrderedDict()}

    def read(self, path: str, offset: int, size: int, why: str = _CUT_SHARD) -> bytes:
        """Exactly ``size`` bytes at ``offset``. ValueError if the file is shorter, FileNotFoundError if it is gone."""
        handle = self._files.pop(path, None)
        if handle is None:
            handle = os.open(path, os.O_RDONLY)
        self._files[path] = handle
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise ValueError(f"{path} ends inside an image (offset {offset}, {len(data)} of {size} bytes): {why}")
        return data


class ShardDataset(Dataset[Batch]):
    """Batches by position. ``__getitems__`` takes the positions of one micro-batch and gives the finished batch.

    Args:
        sources: the sources of the run, in the order of ``order``.
        order: position -> (source, row); None for validation, where position is the row of the concatenated sources.
        transform: decoded [c, H, W] tensor -> tensor of one size; its randomness is drawn from torch's generator,
            seeded here by (seed, position).
        channels: 1 (grey) or 3.
        seed: of the run.
        depth: 8 for uint8 images, 16 for uint16; None takes each source's own from its index.
        pixel_max: the value that stands for white in 16-bit batches, to which images of every source are scaled;
            None takes the largest of the sources. 8-bit batches have 255.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Positions | None,
        transform: Callable[[Tensor], Tensor],
        channels: int,
        seed: int,
        depth: int | None = None,
        pixel_max: int | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.order = order
        self.transform = transform
        self.channels, self.depth = channels, depth
        whites = [source.index.image.white(depth or source.index.image.bit_depth) for source in self.sources]
        self.pixel_max = pixel_max or max(whites)
        self.seed = seed
        self.reader = ShardReader()
        self._starts = np.concatenate([[0], np.cumsum([len(s.index.table(s.split)) for s in self.sources])])

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
        where = np.asarray(positions, dtype=np.int64)
        source, row = self.locate(where)
        images, sizes, keys = [], 0, np.empty(len(where), dtype=np.int64)
        targets: np.ndarray | None = None
        for number, chosen in enumerate(self.sources):
            mine = np.flatnonzero(source == number)
            if len(mine) == 0:
                continue
            values = chosen.targets(row[mine])
            if targets is None:
                targets = np.empty((len(where), *values.shape[1:]), dtype=values.dtype)
            targets[mine] = values
            keys[mine] = chosen.index.table(chosen.split)["key"][row[mine]].view(np.int64)
        for position, number, line in zip(where, source, row, strict=True):
            image, size = self._image(int(position), self.sources[number], int(line))
            images.append(image)
            sizes += size
        assert targets is not None
        return {
            "image": torch.stack(images),
            "target": torch.from_numpy(targets),
            "position": torch.from_numpy(where),
            "key": torch.from_numpy(keys),
            "bytes": torch.tensor(sizes),
        }

    def _image(self, position: int, source: Source, row: int) -> tuple[Tensor, int]:
        index = source.index
        data = read_image(self.reader, index, source.split, row)
        try:
            depth = self.depth or index.image.bit_depth
            decoded = decode(data, self.channels, depth, index.image.deep_white, self.pixel_max)
        except ValueError as error:
            where = image_place(index, source.split, row)
            mend = (
                "replace or remove it, or make shards, which leave such images out"
                if index.in_memory
                else "the shard is damaged, check it with `scaletransfer shards verify`"
            )
            raise ValueError(f"{where} cannot be decoded ({error}): {mend}") from error
        with seeded(sample_seed(self.seed, position)):
            return self.transform(decoded), len(data)


def read_image(reader: ShardReader, index: ShardIndex, split: str, row: int) -> bytes:
    """The bytes of the image file of one table row.

    Raises:
        ValueError: the file is shorter than the index says, or a shard holds something else there.
        FileNotFoundError: the file is gone.
    """
    entry = index.table(split)[row]
    path = str(index.path(split, int(entry["shard"])))
    offset, size = int(entry["offset"]), int(entry["size"])
    if index.in_memory:
        if INSIDE in (name := index.splits[split].shards[int(entry["shard"])].file):
            return image_files.read_image(index.folder, name)
        return reader.read(path, offset, size, "it was changed after it was listed")
    # The tar header before the image names the sample: another data set's shard may well have the same size.
    data = reader.read(path, offset - _TAR_BLOCK, size + _TAR_BLOCK)
    wanted = f"{index.keys(split, [row])[0]}.{index.image.extension}"
    if data[:100].split(b"\0", 1)[0] != wanted.encode():
        raise ValueError(
            f"{path} does not hold {wanted} at offset {offset}: it is the shard of another data set, or was "
            "changed; make the folder again with make_shards --overwrite"
        )
    return data[_TAR_BLOCK:]


def image_place(index: ShardIndex, split: str, row: int) -> str:
    """Where the image of a table row lies, for error sentences: its file, or its key, shard and offset."""
    entry = index.table(split)[row]
    path = index.path(split, int(entry["shard"]))
    if index.in_memory:
        return str(path)
    return f"image {index.keys(split, [row])[0]} in {path} at offset {int(entry['offset'])}"


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


def make_loader(dataset: ShardDataset, sampler: Sampler[list[int]], workers: int, prefetch: int) -> DataLoader[Batch]:
    """Torch's DataLoader over micro-batches; with 0 workers the training process decodes.

    Workers are started afresh for each loader and hold no state, so a resumed run needs none of theirs.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_finished,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
    )


def batches(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; an error in a worker process comes out as the sentence that it was there.

    Raises:
        ValueError: what ``ShardDataset`` raises, and a shard file that is gone.
    """
    try:
        yield from loader
    except (ValueError, OSError) as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        # torch wraps the worker's whole traceback into the message; its last line is "ValueError: <sentence>"
        raise ValueError(text.strip().splitlines()[-1].split(": ", 1)[-1]) from error


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """A loader process that was killed becomes one sentence.

    torch raises a RuntimeError for it from a signal handler, wherever the training process is at that moment: this
    belongs around the whole loop.

    Raises:
        ValueError: a loader process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads data has died ({str(error).splitlines()[0]}): the machine may be short of memory; "
            "lower data.workers or data.prefetch and start the same command again"
        ) from error


def _finished(batch: Any) -> Any:
    """``__getitems__`` has already made the batch."""
    return batch
