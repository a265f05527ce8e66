"""Looks at images before a run: can all of them be decoded, and how large are they?

Both read the images where the loader reads them: loose files or shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scaletransfer.decode import decode, image_size
from scaletransfer.image_files import INSIDE
from scaletransfer.image_files import read_image as read_image_file
from scaletransfer.index import ShardIndex
from scaletransfer.loader import Source
from scaletransfer.shard_reader import ShardReader, image_place, read_image
from scaletransfer.streams import dead_workers_named

_BATCH = 16  # images a worker process answers for at a time
_NAMED = 5  # unreadable images that the sentence names
_HEAD = 64 * 1024  # bytes; headers end before, but for large EXIF, most TIFF and all WebP
_THREADS = 16


def check_images(
    sources: Sequence[Source],
    rows: Sequence[NDArray[np.integer]],
    *,
    channels: int,
    depth: int,
    workers: int,
    fill: Sequence[Callable[[int], bool]] = (),
) -> None:
    """Decode every given image once, so that a run does not end at a broken one after hours.

    rows[i] are rows of the table of sources[i] (repeated rows are decoded once).  channels and depth are those that
    the run decodes to.  `workers` processes decode, at most one a core; with 0 this one does.  Progress is
    shown on a terminal.
    fill: for each source what decodes a row into a cache, if it isn't there yet, and says whether that went well.

    Raises ValueError that names the first five images that cannot be read, with reasons, and how many there are; or
    that a process has died.
    """
    places = [(number, int(row)) for number, chosen in enumerate(rows) for row in np.unique(chosen)]
    workers = min(workers, os.cpu_count() or 1)
    loader = DataLoader(
        _Problems(sources, places, channels, depth, fill),
        batch_size=_BATCH,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    problems: list[str] = []
    with dead_workers_named(), tqdm(total=len(places), unit="img", desc="checking images", disable=None) as bar:
        for batch in loader:
            problems += [problem for problem in batch if problem]
            bar.update(len(batch))
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        loose = all(source.index.in_memory for source in sources)
        mend = "replace or remove them, or make shards, which leave such images out"
        raise ValueError(
            f"{len(problems)} of {len(places)} images cannot be read: {'; '.join(problems[:_NAMED])}{more}: "
            f"{mend if loose else 'the shards are damaged, make them again'}"
        )


def probe_areas(index: ShardIndex, split: str, rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Height and width in pixels of the images of table rows, int64 [n, 2], from their headers alone.

    Reads 64 KiB of each image, and the whole of those whose header is longer.  Raises ValueError that names the
    first image that has no readable header, and for a file that is gone.
    """

    reader = ShardReader()

    def piece(place: str, offset: int, size: int) -> bytes:
        if index.url:
            return reader.read(place, offset, size)
        with open(place, "rb") as file:  # of a loose file that has become shorter, what there is
            file.seek(offset)
            return file.read(size)

    def size(row: int) -> tuple[int, int]:
        entry = index.table(split)[row]
        shard, offset, whole = int(entry["shard"]), int(entry["offset"]), int(entry["size"])
        if index.in_memory and INSIDE in (name := index.splits[split].shards[shard].file):
            return image_size(read_image_file(index.folder, name))
        place = index.place(split, shard)
        try:
            data = piece(place, offset, min(_HEAD, whole))
            try:
                return image_size(data)
            except ValueError:
                return image_size(data + piece(place, offset + len(data), whole - len(data)))
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"{image_place(index, split, row)} cannot be read ({reason}): replace or remove it, or make the "
                "shards again"
            ) from error

    index.table(split)  # opened and checked once, not by each thread
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(size, (int(row) for row in rows)))
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


class _Problems(Dataset[str]):
    """One sentence part for each image that cannot be used, "" for the others."""

    def __init__(
        self,
        sources: Sequence[Source],
        places: Sequence[tuple[int, int]],
        channels: int,
        depth: int,
        fill: Sequence[Callable[[int], bool]],
    ) -> None:
        self.sources, self.places, self.fill = tuple(sources), places, tuple(fill)
        self.channels, self.depth = channels, depth
        self.reader = ShardReader()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> str:
        which, row = self.places[number]
        source = self.sources[which]
        if self.fill and self.fill[which](row):
            return ""
        try:
            data = read_image(self.reader, source.index, source.split, row)
        except (ValueError, OSError) as error:
            return str(error)
        try:
            decode(data, self.channels, self.depth, source.index.image.deep_white)
        except ValueError as error:
            return f"{image_place(source.index, source.split, row)} ({error})"
        return ""
