"""A data set behind a URL as a folder on this machine: tables and archives are copied, images stay where they are.

In the place of an image lies a file without content (sparse: it takes no room) of the image's size, so that whoever
asks for names and sizes finds what the data set's own folder would show. `image_files` fetches the bytes of such an
image from the URL, which the mirror names in a file at its root.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from scaletransfer import storage
from scaletransfer.files import cache_folder, drop_if_empty, inside, json_bytes, lack_of_space_named, write_atomically
from scaletransfer.storage_errors import DiskFull, MissingObject, StorageError, shown

MARK = ".scaletransfer-mirror.json"
IMAGES = {"bmp", "dcm", "dib", "dicom", "gif", "jfif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"}
"""Suffixes of what is not copied, whatever its letters' case."""
_BAD_SIGNS = re.compile(r"[\\\x00-\x1f\x7f]")
_SAVED_AFTER = 64 << 20  # bytes of a copied file after which that is written down at once
_NAME_LENGTH = 20  # hex digits of the URL's hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """What `open_mirror` made."""

    folder: Path
    """To be given where the data set's folder is asked for."""
    images: int
    """Images that stay behind the URL."""
    files: int
    """Other files, which are copied."""
    copied: int
    """Bytes that this call has copied."""


def open_mirror(url: str) -> Mirror:
    """Make the mirror of the folder `url`, or bring the one of an earlier call up to date by one listing.

    Files that have changed or gone there change or go here. It lies in the cache folder; several processes may ask for
    it at once.  Raises ValueError for a URL that holds nothing or names that are no plain paths, ConnectionError
    where the storage does not answer.
    """
    url = url.rstrip("/")
    folder = cache_folder() / "mirrors" / hashlib.sha256(url.encode()).hexdigest()[:_NAME_LENGTH]
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # tables name patients
    with reaching(), lack_of_space_named(folder), _locked(folder.with_name(f"{folder.name}.lock")):
        listed = storage.list_files(url)
        if not listed:
            raise ValueError(f"{shown(url)} holds no files: check the bucket and the folder in the URL")
        for name in listed:
            if _BAD_SIGNS.search(name) or "//" in name or name.startswith(MARK):
                raise ValueError(f"{shown(url)} holds {name!r}, which is no plain path; rename it there")
            inside(name, folder)
        copied = _update(folder, url, listed)
    mirrored_url.cache_clear()
    images = sum(map(is_image, listed))
    return Mirror(folder=folder, images=images, files=len(listed) - images, copied=copied)


def is_image(name: str) -> bool:
    """Whether a file of this name stays behind the URL."""
    return name.rpartition(".")[2].lower() in IMAGES


@lru_cache(maxsize=64)
def mirrored_url(root: Path) -> str:
    """The URL that the folder `root` is a mirror of; "" for every other folder.  One look a process and folder."""
    try:
        return str(json.loads((root / MARK).read_bytes())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def read_mirrored(root: Path, name: str) -> bytes:
    """The bytes of the image `name` of the mirror `root`, from its URL.

    Raises FileNotFoundError where the mirror has none, OSError where the storage gives another number of bytes than it
    listed, or none.
    """
    size = (root / name).stat().st_size
    if not size:
        return b""
    where = storage.join(mirrored_url(root), name)
    with reaching():
        data = storage.read_bytes(where)
    if len(data) != size:
        raise OSError(f"{shown(where)} had {size} bytes when it was listed and now has {len(data)}; start again")
    return data


@contextmanager
def reaching() -> Iterator[None]:
    """What a storage refuses comes out as ConnectionError: not a mistake in data or options, for which a build that
    has begun would be given up."""
    try:
        yield
    except (StorageError, MissingObject, DiskFull) as error:
        raise ConnectionError(str(error)) from error


def _update(folder: Path, url: str, listed: Mapping[str, tuple[int, str]]) -> int:
    """Bytes copied."""
    known = _known(folder, url)
    there = dict(_files(folder))
    for name in there.keys() - listed.keys():
        (folder / name).unlink(missing_ok=True)
        for parent in Path(name).parents[:-1]:
            drop_if_empty(folder / parent)  # to some sources an empty folder is a class
    tags: dict[str, str] = {}
    copied = unsaved = 0
    try:
        for name, (size, tag) in listed.items():
            path = folder / name
            if is_image(name):
                if there.get(name) != size:
                    _placeholder(path, size)
                continue
            if there.get(name) != size or known.get(name) != tag:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.tmp")
                temporary.unlink(missing_ok=True)
                storage.download(storage.join(url, name), temporary, bytes=size)
                os.replace(temporary, path)
                copied += size
                unsaved += size
            tags[name] = tag
            if unsaved > _SAVED_AFTER:
                unsaved = 0
                _save(folder, url, known | tags)
    except BaseException:
        _save(folder, url, known | tags)
        raise
    if tags != known or not (folder / MARK).exists():
        _save(folder, url, tags)
    return copied


def _known(folder: Path, url: str) -> dict[str, str]:
    """{name: tag} of the files that were copied."""
    try:
        content = json.loads((folder / MARK).read_bytes())
        return dict(content["files"]) if content["url"] == url else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _save(folder: Path, url: str, tags: Mapping[str, str]) -> None:
    write_atomically(folder / MARK, json_bytes({"url": url, "files": dict(tags)}))


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of what lies in the mirror, its mark excepted."""
    for where, _, names in os.walk(folder):
        base = os.path.relpath(where, folder)
        for name in names:
            path = name if base == "." else f"{base}/{name}"
            if path != MARK:
                yield path, os.stat(os.path.join(where, name)).st_size


def _placeholder(path: Path, size: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.truncate(descriptor, size)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; some network file systems have no locks, and there it is as well as it can be."""
    with path.open("a+b") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
