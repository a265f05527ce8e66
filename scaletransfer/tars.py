"""Where the files of a plain tar lie, also of a tar inside of a tar: one pass over the headers, which reads no file.

Archives are untrusted: a name that leaves its folder, a link, a device, two files of one name, or a size that reaches
outside of the archive is refused.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

_LARGEST_HEADER = 1 << 20
"""Bytes that tarfile may ask for at once: extended headers of one file.  A hostile header claims any number."""
_BUFFER = 4096
_LONGEST_NAME = 4096
_SHOWN = 200
"""Characters of a name in a sentence."""
_BAD_SIGNS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


class Damaged(ValueError):
    """An archive that is cut off, damaged or hostile; the sentence names it."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """As in the tar, without a leading "./"."""
    offset: int
    """Of its first byte, from the beginning of the outermost file."""
    size: int


def members(path: Path, start: int = 0, size: int | None = None) -> list[Member]:
    """The regular files of the plain tar `path`, or of the tar that lies in it from byte `start` on (`size` bytes), in
    its order.  Kept: a second call reads nothing, unless the file was changed.

    Raises Damaged, naming the file, for what is no plain tar, is cut off or damaged, or holds what `member_name`
    refuses, links, devices, sparse files, or two files of one name; FileNotFoundError.
    """
    status = os.stat(path)
    packed = _scanned(str(path), status.st_size, status.st_mtime_ns, start, status.st_size if size is None else size)
    return [Member(*fields) for fields in zip(packed.names.split("\0"), packed.offsets, packed.sizes, strict=False)]


def walk(path: Path) -> Iterator[Member]:
    """The same one by one, of a tar with more members than should be kept.  Two files of one name are not noticed."""
    return _headers(path, 0, os.stat(path).st_size)


def member_name(name: str, path: Path, at: int | None = None) -> str:
    """`name` of a member of `path` as a plain relative path; Damaged if it is absolute, leaves its folder by "..",
    or holds a backslash, a sign that breaks lines, or what is not Unicode, or is endless.  `at`: the byte
    where its header is."""
    pure = PurePosixPath(name)
    if (
        not pure.parts
        or pure.is_absolute()
        or ".." in pure.parts
        or _BAD_SIGNS.search(name)
        or len(name) > _LONGEST_NAME
    ):
        where = "" if at is None else f" at byte {at}"
        raise Damaged(
            f"{path} names the file {name[:_SHOWN]!r}{where}, which is no plain name inside of it; download it again."
        )
    return pure.as_posix()


def packed_files(path: Path, names: Collection[str], largest: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of those files of the tar.gz `path` that are among `names` and there, in its order, in one pass;
    the first of two of one name.

    Raises Damaged, naming the file, for what is no tar.gz or is damaged before the last of `names`, and for a link or
    more than `largest` bytes in the place of one of them.
    """
    wanted = set(names)
    try:
        with gzip.open(path, "rb") as stream:
            view = Guarded(stream, path, 0, None, largest)
            with tarfile.open(fileobj=view, mode="r:") as tar:  # type: ignore[call-overload]
                while wanted and (info := tar.next()) is not None:
                    name = PurePosixPath(info.name).as_posix()
                    if name not in wanted:
                        continue
                    wanted.remove(name)
                    if not info.isreg() or info.issparse() or not 0 <= info.size <= largest:
                        raise Damaged(f"{path}: {name} is no plain file of a possible size; download it again.")
                    content = tar.extractfile(info)
                    assert content is not None, "a regular file has content"
                    yield name, content.read()
    except Damaged:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, RecursionError, ValueError, IndexError) as error:
        raise Damaged(f"{path} is not a readable tar.gz file ({error}); download it again.") from error


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...


class Guarded:
    """A file from byte `start` on, to `start` + `size` unless that is None, for tarfile: it refuses to read more than
    `largest` bytes at once (Damaged, naming `path`)."""

    def __init__(self, stream: _Readable, path: Path, start: int, size: int | None, largest: int) -> None:
        self._stream, self._path, self._start, self._size, self._largest = stream, path, start, size, largest
        self._at = 0
        stream.seek(start)

    def tell(self) -> int:
        """Position, from `start`."""
        return self._at

    def seek(self, position: int) -> int:
        """Go to a position, from `start`."""
        if position < 0:
            raise Damaged(f"{self._path} is damaged: a header points before its beginning; download it again.")
        self._at = position
        self._stream.seek(self._start + position)
        return position

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, which must be said."""
        if not 0 <= size <= self._largest:
            raise Damaged(f"{self._path} is damaged: a header claims {size} bytes; download it again.")
        left = size if self._size is None else min(size, max(0, self._size - self._at))
        data = self._stream.read(left)
        self._at += len(data)
        return data


@dataclass(frozen=True, slots=True)
class _Packed:
    """A million members in tens of megabytes."""

    names: str
    offsets: array[int]
    sizes: array[int]


@cache
def _scanned(path: str, length: int, changed: int, start: int, size: int) -> _Packed:
    """`length` and `changed` stand for the file's content."""
    if start + size > length:
        raise Damaged(f"{path} ends inside of a file that it holds; download it again.")
    found = list(_headers(Path(path), start, size))
    seen: set[str] = set()
    for member in found:
        if member.name in seen:
            raise Damaged(f"{path} holds two files of the name {member.name}; download it again.")
        seen.add(member.name)
    offsets, sizes = array("q", (m.offset for m in found)), array("q", (m.size for m in found))
    return _Packed("\0".join(m.name for m in found), offsets, sizes)


def _headers(path: Path, start: int, size: int) -> Iterator[Member]:
    with open(path, "rb", buffering=_BUFFER) as raw:
        if hasattr(os, "posix_fadvise"):
            # The system would read ahead, and with it the images between the headers.
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        view = Guarded(raw, path, start, size, _LARGEST_HEADER)
        try:
            with tarfile.open(fileobj=view, mode="r:") as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # else tarfile keeps a kilobyte for each
                    if not info.isdir():
                        yield _checked(info, path, start, size)
                end = tar.offset
        except Damaged:
            raise
        # RecursionError: a chain of extended headers; the others: numbers in them that are none
        except (tarfile.TarError, RecursionError, ValueError, IndexError, OverflowError, EOFError) as error:
            near = f"near byte {start + view.tell()}"
            raise Damaged(f"{path} is not a readable plain tar ({error}, {near}); download it again.") from error
        # tarfile takes a damaged header for the end; the true one is a block of zeros.
        view.seek(end)
        if view.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            where = f"at byte {start + end}"
            raise Damaged(f"{path} is cut off or damaged {where}: no end mark of a tar there; download it again.")


def _checked(info: tarfile.TarInfo, path: Path, start: int, size: int) -> Member:
    at, shown = start + info.offset, info.name[:_SHOWN]
    if not info.isreg() or info.issparse():
        raise Damaged(f"{path}: {shown!r} at byte {at} is a link, a device or a sparse file; download it again.")
    if info.size < 0 or info.offset_data + info.size > size:
        claimed = f"which claims {info.size} bytes at byte {at}"
        raise Damaged(f"{path} ends inside of {shown!r}, {claimed}, or is damaged; download it again.")
    return Member(member_name(info.name, path, at), start + info.offset_data, info.size)
