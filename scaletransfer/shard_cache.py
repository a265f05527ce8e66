"""Copies of remote files on a disk of this node, shared by all its processes: whole shards, and small indexes.

A file is named by a hash of its URL, size and sha256, so a shard that was replaced is another file.  It is downloaded
under a temporary name that is locked (`flock`) while somebody writes it: of many processes and threads one downloads
and the others wait.  It takes its final name once size and sha256 are right.  A killed process leaves an unlocked
temporary file, which the next one takes over or removes.

Shards together stay within `cache_bytes`, downloads included: the least recently opened ones are removed first.  A
shard that is open somewhere can be removed; its space is free once it is closed.  What the cache cannot take (a shard
larger than the limit, all room taken by downloads, a full disk) is read by ranges.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scaletransfer import storage
from scaletransfer.storage_errors import DiskFull, shown
from scaletransfer.storage_settings import ReadCounters, RemoteSettings

_PARTIAL = ".part"


def folder_of(remote: RemoteSettings) -> Path:
    """The cache folder, absolute; it may not exist yet."""
    return Path(remote.cache_dir or "~/.cache/scaletransfer").expanduser().absolute()


def fetch(url: str, path: Path, size: int, sha256: str, remote: RemoteSettings) -> None:
    """Make `path` a copy of the object `url`, of `size` bytes, unless it has that size: the whole of it, or nothing.

    Raises ValueError that names the URL if what was downloaded has another hash, for what `storage` raises, and for
    a folder that cannot be written or is full.
    """
    with _folder_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _has(path, size):
            return
        partial = _partial(path)
        writer = _lock(partial, wait=True)
        assert writer is not None
        try:
            if _has(path, size):  # another process was quicker
                partial.unlink()
                return
            _download(url, partial, size, sha256, remote, None)
            os.replace(partial, path)
        finally:
            _unlock(writer)


def keep(data: bytes, path: Path) -> None:
    """Write a small file into the cache; several processes may, with the same content."""
    with _folder_named(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _has(path, len(data)):
            own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            own.write_bytes(data)
            os.replace(own, path)


class ShardCache:
    """Whole shards in `folder_of(remote)/shards`."""

    def __init__(self, remote: RemoteSettings, counters: ReadCounters | None = None) -> None:
        self.remote, self.counters = remote, counters
        self.folder = folder_of(remote) / "shards"
        self._warned = False

    def open(self, url: str, size: int, sha256: str, *, download: bool = True) -> int | None:
        """A descriptor of the whole shard, downloaded if it has to be; None where it must be read by ranges.

        size, sha256: as the index says.  With `download` false only what is there is opened.  Raises ValueError if
        the shard behind the URL is not the one of the index, for what `storage` raises, and for a folder that cannot
        be written.
        """
        path = self.path(url, size, sha256)
        with _folder_named(self.folder):
            while True:
                found = _opened(path, size)
                if found is not None:
                    storage.count(self.counters, cache_hits=1)
                    return found
                if not download or size > self.remote.cache_bytes:
                    return None
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    writer = self._begin(path, size)
                    if writer is None:  # another one downloads it
                        _wait(_partial(path))
                        continue
                    if writer < 0:
                        return None
                    try:
                        return self._finish(url, path, size, sha256)
                    finally:
                        _unlock(writer)
                except DiskFull as error:
                    if not self._warned:
                        self._warned = True
                        text = f"{error}; its shards are read by ranges instead: free some space there"
                        warnings.warn(text, stacklevel=2)
                    return None

    def path(self, url: str, size: int, sha256: str) -> Path:
        """Where that shard is kept."""
        name = hashlib.sha256(f"{url}\n{size}\n{sha256}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.tar"

    def _begin(self, path: Path, size: int) -> int | None:
        """The locked temporary file of a download, with its room reserved; None if another one has it (or has just
        finished), -1 if there is no room."""
        partial = _partial(path)
        with self._alone():
            writer = _lock(partial, wait=False)
            if writer is None:
                return None
            try:
                done, fits = path.exists(), self._room(size, partial)
                if fits and not done:
                    os.posix_fallocate(writer, 0, max(1, size))
                    return writer
            except OSError as error:
                partial.unlink(missing_ok=True)
                _unlock(writer)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskFull(f"the disk of {self.folder} is full") from error
                raise
            partial.unlink()
            _unlock(writer)
            return None if done else -1

    def _room(self, size: int, own: Path) -> bool:
        """Remove what was not opened for longest until `size` more bytes fit; whether they do."""
        kept: list[tuple[float, int, Path]] = []
        total = size
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if path == own:
                continue
            if path.suffix == _PARTIAL:
                _remove_forsaken(path)
            with suppress(FileNotFoundError):
                stat = path.stat()
                total += stat.st_size
                if path.suffix == ".tar":
                    kept.append((stat.st_mtime, stat.st_size, path))
        for _, freed, old in sorted(kept):
            if total <= self.remote.cache_bytes:
                break
            old.unlink(missing_ok=True)
            total -= freed
        return total <= self.remote.cache_bytes

    def _finish(self, url: str, path: Path, size: int, sha256: str) -> int:
        """Download into the temporary file, which is ours; a descriptor of the finished one."""
        partial = _partial(path)
        _download(url, partial, size, sha256, self.remote, self.counters)
        found = os.open(partial, os.O_RDONLY)  # before it has its name, under which it could be removed
        with self._alone():  # a listing must not miss a file that moves
            os.replace(partial, path)
        storage.count(self.counters, cache_misses=1)
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else adds or removes shards."""
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            _unlock(lock)


def _download(
    url: str, partial: Path, size: int, sha256: str, remote: RemoteSettings, counters: ReadCounters | None
) -> None:
    """Fill the locked file `partial` and check it; it is removed if it is not right."""
    digest = hashlib.sha256()
    try:
        storage.download(url, partial, remote, counters, bytes=size, seen=digest.update)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(
                f"{shown(url)} is damaged or of another index (sha256 differs): copy the folder there again, or "
                "check it with `scaletransfer shards verify`"
            )
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _opened(path: Path, size: int) -> int | None:
    """A descriptor of the file, which counts as used now; None if it is absent or has not `size` bytes."""
    try:
        found = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(found).st_size != size:
        os.close(found)
        path.unlink(missing_ok=True)
        return None
    with suppress(PermissionError):  # somebody else's file
        os.utime(found)
    return found


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _lock(path: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of the file (made if absent); None if another has it and `wait` is false."""
    while True:
        found = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(found, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(found)
            return None
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(found).st_ino:
                return found
        _unlock(found)  # it was finished or removed while we waited


def _unlock(found: int) -> None:
    # not by closing alone: a process forked meanwhile has the descriptor too, and with it the lock
    fcntl.flock(found, fcntl.LOCK_UN)
    os.close(found)


def _wait(partial: Path) -> None:
    """Until nobody holds the lock; what its holder left, if it was killed, is removed."""
    found = _lock(partial, wait=True)
    assert found is not None
    partial.unlink(missing_ok=True)
    _unlock(found)


def _remove_forsaken(partial: Path) -> None:
    """Remove the temporary file of a process that is gone."""
    found = _lock(partial, wait=False)
    if found is not None:
        partial.unlink(missing_ok=True)
        _unlock(found)


@contextmanager
def _folder_named(folder: Path) -> Iterator[None]:
    """A folder that cannot be used is a sentence that names the option."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder}: {error.strerror or error}; set data.remote.cache_dir to a folder that can be "
            "written"
        ) from error
