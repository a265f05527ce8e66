"""Reads images out of shards by (shard, offset, size): files on a disk by pread, files behind URLs by one ranged
request a sample or from a copy of the whole shard (`shard_cache`).

Which of the two a URL gets is `RemoteSettings.mode`: `range`, `cache`, or `auto`: the cache if all splits that this
reader was asked for so far fit in it together, else ranges (and what is in the cache anyway is read there).
"""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32  # the same number as zlib's in an eighth of the time

from scaletransfer import image_files, storage
from scaletransfer.foreign_members import Naming, OtherMember, is_foreign, read_member
from scaletransfer.image_files import INSIDE
from scaletransfer.index import ShardIndex
from scaletransfer.index_fields import ShardInfo
from scaletransfer.sample_table import rows_twice
from scaletransfer.shard_cache import ShardCache
from scaletransfer.storage_errors import shown
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

_OPEN_FILES = 64
_SHARE = 8  # a reader keeps at most one in so many of the descriptors that a process may have: others need some too
_TAR_BLOCK = 512
_REGULAR = ord("0")  # type of a regular file in a tar header
_CUT_SHARD = "it is truncated, make the shards again"
_readers: weakref.WeakSet[ShardReader] = weakref.WeakSet()


class _File:
    """An open descriptor, the reads that use it now, and whether it is still kept for later ones."""

    __slots__ = ("handle", "kept", "users")

    def __init__(self, handle: int) -> None:
        self.handle, self.users, self.kept = handle, 0, True


class ShardReader:
    """Reads byte ranges of shard files; a few files stay open.

    Threads may share it.  After a fork the child has its own files and counters from 0, and so has a copy made by
    pickling.

    Attributes:
        counters: what was read since it was made.
    """

    def __init__(self, remote: RemoteSettings | None = None) -> None:
        self.remote = remote or storage.DEFAULT
        self._start()

    def _start(self) -> None:
        self.counters = ReadCounters()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._files: OrderedDict[str, _File] = OrderedDict()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _OPEN_FILES if allowed < 0 else max(1, min(_OPEN_FILES, allowed // _SHARE))
        weakref.finalize(self, _close_all, self._files)
        self._cache = ShardCache(self.remote, self.counters)
        self._shards: dict[str, ShardInfo] = {}
        self._splits: dict[tuple[str, str], int] = {}  # (index digest, split) -> bytes
        _readers.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.remote = state["remote"]
        self._start()

    def expect(self, index: ShardIndex, split: str) -> None:
        """Say which shards will be read by URL, so that whole ones can be kept and checked; `read_image` does."""
        shards = index.splits[split].shards
        with self._lock:
            self._splits[index.digest, split] = sum(shard.bytes for shard in shards)
            self._shards.update({index.place(split, number): shard for number, shard in enumerate(shards)})

    def read(self, place: str, offset: int, size: int, why: str = _CUT_SHARD) -> bytes:
        """Exactly `size` bytes at `offset` of `place`, a path or a URL.

        Raises:
            ValueError: the file is shorter (`why` ends the sentence), or what `storage` and `shard_cache` raise.
            FileNotFoundError: a file on a disk is gone.
        """
        return bytes(self.view(place, offset, size, why))

    def view(self, place: str, offset: int, size: int, why: str = _CUT_SHARD) -> memoryview:
        """`read` without new memory: what it gives is overwritten by the next call in the same thread."""
        with self._lock:
            file = self._files.get(place)
            if file is not None:
                self._files.move_to_end(place)
                file.users += 1
        if file is None:
            file = self._open(place)
        if file is None:
            data = memoryview(storage.read_range(place, offset, size, self.remote, self.counters))
            with self._lock:
                self.counters.bytes_read += len(data)
        else:
            data, done = self._memory(size), 0
            try:
                done = os.preadv(file.handle, [data], offset)
                data = data[:done]
            finally:
                with self._lock:
                    self.counters.bytes_read += done
                    file.users -= 1
                    if not file.users and not file.kept:
                        os.close(file.handle)
        if len(data) != size:
            where = shown(place)
            raise ValueError(f"{where} ends inside an image (offset {offset}, {len(data)} of {size} bytes): {why}")
        return data

    def _memory(self, size: int) -> memoryview:
        """Memory of this thread: new pages for each image cost several times what copying it does."""
        held: memoryview | None = getattr(self._local, "held", None)
        # much too large is no good either: one huge image must not hold its memory for ever
        if held is None or len(held) < size or len(held) > max(1 << 22, 8 * size):
            held = self._local.held = memoryview(bytearray(size + size // 4))
        return held[:size]

    def _open(self, place: str) -> _File | None:
        """The file, in use once by the caller; None for a URL that is to be read by ranges."""
        handle = self._open_remote(place) if storage.is_url(place) else os.open(place, os.O_RDONLY)
        if handle is None:
            return None
        with self._lock:
            file = self._files.get(place)
            if file is None:
                file = self._files[place] = _File(handle)
            else:  # another thread was quicker
                os.close(handle)
            file.users += 1
            while len(self._files) > self._most:
                old = self._files.popitem(last=False)[1]
                old.kept = False
                if not old.users:
                    os.close(old.handle)
        return file

    def _open_remote(self, url: str) -> int | None:
        local = storage.local_path(url)
        if local is not None:
            return os.open(local, os.O_RDONLY)
        shard, mode = self._shards.get(url), self.remote.mode
        if shard is None or mode == "range":
            return None
        whole = mode == "cache" or sum(self._splits.values()) <= self.remote.cache_bytes
        return self._cache.open(url, shard.bytes, shard.sha256, download=whole)

    def _after_fork(self) -> None:
        # No other thread lives here, whatever it held in the parent. The descriptors are this process's own copies.
        _close_all(self._files)
        self._start()


def _close_all(files: OrderedDict[str, _File]) -> None:
    """Close what a reader kept open, once: it has ended, or is another one's after a fork."""
    while files:
        os.close(files.popitem()[1].handle)


def _after_fork() -> None:
    for reader in list(_readers):
        reader._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def read_image(reader: ShardReader, index: ShardIndex, split: str, row: int) -> bytes:
    """The bytes of the image file of one table row; raises what `read_view` raises."""
    return bytes(read_view(reader, index, split, row))


class Entry(NamedTuple):
    """What a row of a sample table says of where an image is, and of its bytes; see `ShardIndex.table`."""

    shard: int
    offset: int
    size: int
    key: int
    crc: int


def entries_of(rows: NDArray[Any]) -> list[Entry]:
    """The entries of rows of a sample table."""
    return list(map(Entry, *(rows[name].tolist() for name in Entry._fields)))


def known_whole(index: ShardIndex, entry: Entry | None) -> bool:
    """Whether what `read_view` gave is surely undamaged: make_shards had decoded it, and its CRC-32 was compared."""
    return entry is not None and entry.crc != 0 and not index.in_memory and not is_foreign(index.encoder)


def read_view(
    reader: ShardReader, index: ShardIndex, split: str, row: int, entry: Entry | None = None
) -> bytes | memoryview:
    """The bytes of the image file of one table row; overwritten by the next call in the same thread.

    entry: that of the row, where it is at hand: looking up one row alone takes longer than reading from memory does.

    Raises:
        ValueError: the file is shorter than the index says, or a shard holds something else there; what `storage`
            and `shard_cache` raise for a URL.
        FileNotFoundError: the file is gone.
    """
    shard, offset, size, key, crc = entry or entries_of(index.table(split)[row : row + 1])[0]
    place = index.place(split, shard)
    if index.in_memory:
        if INSIDE in (name := index.splits[split].shards[shard].file):
            return image_files.read_image(index.folder, name)
        return reader.view(place, offset, size, "it was changed after it was listed")
    if index.url and (index.digest, split) not in reader._splits:
        reader.expect(index, split)
    if is_foreign(index.encoder):
        naming, file = Naming.of(index.encoder), index.splits[split].shards[shard].file
        try:
            member = read_member(partial(reader.read, place), naming, file, key, offset, size)
        except OtherMember as error:
            raise ValueError(f"{shown(place)}: {error}") from None
        if crc and crc32(member) != crc:
            mend = "or, if it was changed on purpose, index the tars again: scaletransfer shards index DIR --overwrite"
            raise ValueError(f"{_damaged(index, split, row)} again, {mend}")
        return member
    # The tar header before the image names the sample: another data set's shard may well have the same size.
    data = reader.view(place, offset - _TAR_BLOCK, size + _TAR_BLOCK)
    wanted = f"{index.source}-{key:016x}.{index.image.extension}"
    head = bytes(data[:157])
    # A link or device, or another size, is no image by that name, whatever bytes follow.
    if not head.startswith(wanted.encode() + b"\0") or head[124:135] != b"%011o" % size or head[156] != _REGULAR:
        raise ValueError(
            f"{shown(place)} does not hold {wanted} at offset {offset}: it is the shard of another data set, "
            "or was changed; make the folder again with make_shards --overwrite"
        )
    image = data[_TAR_BLOCK:]
    if crc and crc32(image) != crc:
        raise ValueError(f"{_damaged(index, split, row)} again, or mend it with `scaletransfer shards verify --repair`")
    return image


def _damaged(index: ShardIndex, split: str, row: int) -> str:
    where = image_place(index, split, row)
    return f"{where} is damaged (its CRC-32 differs from the sample table's): copy the shard"


def check_once(index: ShardIndex, split: str, allowed: int | None = None) -> frozenset[int]:
    """Rows of a split that are another row's sample once more, which an epoch would see twice.

    Raises:
        ValueError: there are more than `allowed` (None: than 0, and no setting allows any); the sentence names the
            first pair, their shards and offsets.
    """
    keys = np.ascontiguousarray(index.table(split)["key"])
    rows = rows_twice(keys)
    if len(rows) > (allowed or 0):
        first = int(np.flatnonzero(keys == keys[rows[0]])[0])
        raise ValueError(
            f"{image_place(index, split, int(rows[0]))} is the same sample as {image_place(index, split, first)}, and "
            f"{len(rows)} row(s) of {index.splits[split].table_file or index.where} are so: an epoch would see them "
            "twice; make the folder again with make_shards --overwrite"
            + ("" if allowed is None else ", or, to leave up to N of them out, set data.max_bad_samples=N")
        )
    return frozenset(rows.tolist())


def image_place(index: ShardIndex, split: str, row: int) -> str:
    """Where the image of a table row lies, for error sentences: its file, or its key, shard and offset."""
    entry = index.table(split)[row]
    place = shown(index.place(split, int(entry["shard"])))
    if index.in_memory:
        return place
    return f"image {index.keys(split, [row])[0]} in {place} at offset {int(entry['offset'])}"
