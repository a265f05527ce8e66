"""Habits with files that modules share: atomic writes, names that stay in a folder, checked JSON fields.

Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

_LACKS = {
    errno.ENOSPC: "the disk is full (or has no more inodes): free some space there",
    errno.EDQUOT: "your quota of disk space is used up: free some space there",
    errno.EFBIG: "a file grew beyond the allowed size: raise the limit (ulimit -f)",
}


def json_bytes(content: Any) -> bytes:
    """The one textual form of our JSON files: sorted keys, one space of indent, ASCII, no NaN."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, also after a crash.

    An error leaves the old file, and no other.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def lack_of_space_named(folder: Path) -> Iterator[None]:
    """An OSError inside that means that `folder` cannot hold more comes out with a sentence that says the mend."""
    try:
        yield
    except OSError as error:
        what = _LACKS.get(error.errno or 0)
        if what is None:
            raise
        mend = "and run the same command again; what is finished stays"
        raise OSError(error.errno, f"{what}, {mend}", str(folder)) from error


def drop_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing; any other stays."""
    with suppress(OSError):
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where we keep what can be made again: $XDG_CACHE_HOME/scaletransfer, or ~/.cache/scaletransfer."""
    # The XDG specification: a relative path there is invalid and must be ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "scaletransfer"


def plain_name(name: str, path: Path | str) -> str:
    """`name` if it is the name of a file in the same folder as `path`; else ValueError (`path` names it)."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{path} names the file {name!r}, which is not a plain name inside the folder")
    return name


def inside(name: str, folder: Path) -> str:
    """`name`, a posix path, if it stays inside `folder`; else ValueError."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise ValueError(f"{folder}: the file name {name!r} leaves the folder")
    return name


def check_size(path: Path, expected: int) -> None:
    """ValueError, with both sizes, if the shard `path` is absent or does not have `expected` bytes."""
    try:
        actual: int | None = path.stat().st_size
    except FileNotFoundError:
        actual = None
    check_bytes(path, actual, expected)


def check_bytes(place: Path | str, actual: int | None, expected: int) -> None:
    """The same for a shard at a path or URL whose size was found to be `actual`; None: it is absent."""
    if actual is None:
        raise ValueError(f"{place} is missing; copy the folder again, or make it again with make_shards --overwrite")
    if actual != expected:
        what = "truncated" if actual < expected else "not the file that the index describes"
        raise ValueError(
            f"{place} is {what}: {actual} bytes where index.json says {expected}; "
            "copy it again, or make the folder again with make_shards --overwrite (tars that others made: index them "
            "again with scaletransfer shards index --overwrite)"
        )


def field_of(content: Any, key: str, kind: type, path: Path | str, where: str = "") -> Any:
    """`content[key]` of the JSON file `path`, checked: there, of type `kind`, and not negative if an int.

    Raises ValueError that names the file and the field (`where` is the field's prefix, "splits.train.").
    """
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{path}: field '{where}{key}' is missing; make the folder again with make_shards")
    value = content[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path}: field '{where}{key}' must be {kind.__name__}, not {type(value).__name__}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{path}: field '{where}{key}' is negative")
    return value


def strings_of(content: Mapping[str, Any], key: str, path: Path | str) -> list[str]:
    """The list of strings `content[key]` of the JSON file `path`; ValueError if it is anything else."""
    values = field_of(content, key, list, path)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{path}: field {key!r} must hold strings only")
    return list(values)
