"""Decoded images on a disk, for runs that look at the same ones again and again: seeds, shots and starts of a target.

A store is one file for a split of a target, decoded and resized in one way (``bit_resize``). It has a slot for each row
of the sample table, filled when the row is first decoded; slots that nobody filled are holes and take no space. A slot
is a head of 64 bytes, little-endian, then the pixels [c, H, W]:

    uint32 CRC-32 of all that follows, uint32 height, uint32 width, uint32 0, int64 size and int64 mtime_ns of the file

The CRC makes the file safe without a lock: what two processes, a crash or a network file system leave half-written is
no image, and is decoded again. The name holds a digest of everything that pixels depend on but the files of a folder
of images themselves, whose sizes and times stand in the slots. A store may be deleted at any time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from scaletransfer.decode import decode_at
from scaletransfer.image_files import file_of
from scaletransfer.index import ShardIndex
from scaletransfer.loader import Pending, ShardDataset
from scaletransfer.mirrors import mirrored_url

VERSION = 1
SUFFIX = ".slots"
_HEAD = struct.Struct("<IIIIqq")
_HEAD_BYTES = 64
_PAGE = 4096  # slots begin on pages: a hole stays one, and writers on other hosts touch other pages
_LEFT_FREE = 2 * 10**9
"""Bytes of the disk that are left to checkpoints and everybody else."""
_DECODERS = ("torch", "torchvision", "pillow", "simplejpeg")
Resize = Callable[[Tensor], Tensor | None]


class DecodedStore:
    """Pixels of the rows of one split. Made in, or found in, ``folder``; several processes may use it at once.

    Args:
        facts: what the pixels depend on, beside the index and the split: the same facts, the same pixels.
        largest: (bytes) of one image at most; larger ones are not kept.
        budget: bytes that all stores of the folder may take.

    Raises:
        ValueError: the folder cannot be made or written.
    """

    def __init__(
        self, folder: Path, index: ShardIndex, split: str, facts: dict[str, Any], largest: int, budget: int
    ) -> None:
        self.folder, self.index, self.split, self.budget = folder, index, split, budget
        self.largest = largest
        self.stride = -(-(_HEAD_BYTES + largest) // _PAGE) * _PAGE
        made_of = {
            **facts,
            "version": VERSION,
            "index": index.digest,
            "split": split,
            "stride": self.stride,
            "decoders": {name: version(name) for name in _DECODERS},
        }
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / f"{index.source}-{split}-{digest}{SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ValueError(f"data.cache {folder} cannot be written ({error.strerror}): name another folder") from None
        weakref.finalize(self, os.close, self._file)
        self._loose = index.in_memory and not mirrored_url(index.folder)
        self._full = False

    def _stamp(self, row: int) -> tuple[int, int]:
        """Size and time of the file that a row's image lies in; (0, 0) where the index binds its bytes."""
        if not self._loose:
            return 0, 0
        shard = int(self.index.table(self.split)["shard"][row])
        found = os.stat(self.index.folder / file_of(self.index.splits[self.split].shards[shard].file))
        return found.st_size, found.st_mtime_ns

    def get(self, row: int, channels: int, depth: int) -> np.ndarray | None:
        """uint8 or uint16 [c, H, W], or None where the row was not kept, or has changed since."""
        head = os.pread(self._file, _HEAD_BYTES, row * self.stride)
        if len(head) < _HEAD_BYTES:
            return None
        crc, height, width, _, size, mtime = _HEAD.unpack(head[: _HEAD.size])
        count = channels * height * width * depth // 8
        if not 0 < count <= self.largest:
            return None
        pixels = np.empty((channels, height, width), np.uint8 if depth == 8 else np.uint16)
        read = os.preadv(self._file, [pixels.data.cast("B")], row * self.stride + _HEAD_BYTES)
        if read != count or crc32(pixels, crc32(head[4:])) != crc:
            return None
        try:
            return pixels if self._stamp(row) == (size, mtime) else None
        except OSError:
            return None  # it is gone: reading it says so

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Keep [c, H, W] for a row, unless it is too large or the space is used up."""
        pixels = np.ascontiguousarray(pixels)
        if pixels.nbytes > self.largest or self._no_room(pixels.nbytes):
            return
        try:
            size, mtime = self._stamp(row)
            head = _HEAD.pack(0, *pixels.shape[-2:], 0, size, mtime).ljust(_HEAD_BYTES, b"\0")
            crc = crc32(pixels, crc32(head[4:]))
            whole: list[bytes | memoryview] = [struct.pack("<I", crc) + head[4:], pixels.data.cast("B")]
            os.pwritev(self._file, whole, row * self.stride)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self._stop(f"{error.strerror}")

    def _no_room(self, more: int) -> bool:
        if not self._full:
            disk = os.statvfs(self.folder)
            if taken_by(self.folder) + more > self.budget:
                self._stop(f"data.cache_gb={self.budget / 1e9:g} is used up")
            elif disk.f_bavail * disk.f_frsize < _LEFT_FREE:
                self._stop("the disk is nearly full")
        return self._full

    def _stop(self, why: str) -> None:
        self._full = True
        print(f"note: no more decoded images are kept in {self.folder}: {why}", file=sys.stderr, flush=True)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """One process at a time: what another one decodes meanwhile need not be decoded here."""
        handle = os.open(self.path, os.O_RDWR)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another run that decodes the same images", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: both decode, and write the same
            yield
        finally:
            with _no_locks():
                fcntl.flock(handle, fcntl.LOCK_UN)  # loader processes hold the descriptor as well
            os.close(handle)


@contextmanager
def _no_locks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def taken_by(folder: Path) -> int:
    """Bytes that the stores of a folder take on its disk."""
    if not folder.is_dir():
        return 0
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder) if entry.name.endswith(SUFFIX))


class StoredDataset(ShardDataset):
    """A dataset of one source that takes decoded images from a store, and puts into it what is not there.

    ``store`` and ``resize`` (``bit_resize`` of the transform's settings) are set once it is made: see ``keep_in``.
    """

    store: DecodedStore
    resize: Resize

    def keep_in(self, folder: Path, budget: int, resize: Resize, facts: dict[str, Any], pixels: int) -> StoredDataset:
        """Use the store of these ``facts`` in a folder; pixels: height x width of a resized image at most."""
        source, how = self.sources[0], self._decoding[0]
        assert len(self.sources) == 1 and self.transform is not None
        facts = {**facts, "channels": self.channels, "depth": how.depth}
        facts |= {"deep_white": how.deep_white, "white": how.white}
        largest = pixels * self.channels * how.depth // 8
        self.store = DecodedStore(folder, source.index, source.split, facts, largest, budget)
        self.resize = resize
        return self

    def load(self, pending: Pending, number: int) -> None:
        """As ``ShardDataset.load``, from the store where it has the row."""
        pixels = self.store.get(pending.where[number][1], self.channels, self._decoding[0].depth)
        if pixels is None:
            super().load(pending, number)
        else:
            super().use(pending, number, torch.from_numpy(pixels))

    def use(self, pending: Pending, number: int, planes: Tensor) -> None:
        """Keep what was decoded, resized, and go on with that: the transform gives the same for it."""
        super().use(pending, number, self._kept(pending.where[number][1], planes))

    def _kept(self, row: int, planes: Tensor) -> Tensor:
        resized = self.resize(planes)
        if resized is None:
            return planes
        self.store.put(row, resized.numpy())
        return resized

    def fill(self, row: int) -> bool:
        """Decode a row into the store unless it is there; False where it cannot be read or decoded."""
        if self.store.get(row, self.channels, self._decoding[0].depth) is not None:
            return True
        try:
            pixels = decode_at(self._read(self.sources[0], row, None), self.channels, self._decoding[0])
        except ValueError:
            return False
        planes = torch.from_numpy(pixels)
        self._kept(row, planes[None] if self.channels == 1 else planes.movedim(-1, 0))
        return True
