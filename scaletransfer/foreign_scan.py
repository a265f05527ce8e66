"""One pass over a WebDataset tar that somebody else made: where its images are, whose they are, what their labels say.

The tar is untrusted: what `tars` refuses is refused, and members that are neither image nor label are not read.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO

from scaletransfer import keys
from scaletransfer.foreign_labels import SOURCES, Label, LabelRule
from scaletransfer.foreign_members import (
    KEYS_OF,
    LONGEST_HEADERS,
    Naming,
    in_extended_headers,
    in_header,
    split_name,
)
from scaletransfer.shard_pool import die_with_parent
from scaletransfer.tars import Member, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_LARGEST_IMAGE = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is read from foreign tars, and how it is called."""

    name: str
    """Of the data set, in keys."""
    labels: LabelRule
    label_names: tuple[str, ...] | None = None
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    skip_incomplete: bool = False
    """Samples without image or label are left out and counted, instead of refused."""
    keys_of: str = KEYS_OF[0]
    licence: str = "not stated"

    def __post_init__(self) -> None:
        keys.key(self.name, "", b"")  # a name that can stand in keys
        for text in self.extensions:
            if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text):
                raise ValueError(f"--image-ext has {text!r}; give extensions such as jpg,png in lower case")
            if text == self.labels.extension:
                raise ValueError(f"--image-ext has {text!r}, which is the label's extension")


@dataclass(slots=True)
class Shard:
    """One tar: its samples in order."""

    bytes: int
    sha256: str
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Keys."""
    extensions: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def scan_tars(paths: Sequence[Path], settings: Settings, naming: Naming, workers: int) -> Iterator[Shard]:
    """The tars in the order of `paths`; `workers` processes work ahead.

    Raises ValueError, in one sentence with file, member and offset, for what `tars.walk` refuses, a sample without
    image or label (unless they are left out), with two images or in two places, and a label that is none.
    """
    if workers <= 1 or len(paths) <= 1:
        yield from (_scan(path, settings, naming) for path in paths)
        return
    context = multiprocessing.get_context("spawn")  # as in `shard_pool`
    with ProcessPoolExecutor(min(workers, len(paths)), context, initializer=die_with_parent) as pool:
        ahead: deque[Future[Shard]] = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(_scan, path, settings, naming))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that reads tars has died: the machine may be short of memory; lower --workers and start the "
                "same command again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _scan(path: Path, settings: Settings, naming: Naming) -> Shard:
    """One tar: its hash, then its headers and labels."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            shard = Shard(os.fstat(file.fileno()).st_size, digest)
            for stem, members in _samples(path):
                _add(shard, path, file, stem, members, settings, naming)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    return shard


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(stem, members by extension) of each sample: as webdataset has it, consecutive members of one stem."""
    seen: set[str] = set()
    stem, members = "", dict[str, Member]()
    for member in walk(path):
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != stem:
            if members:
                yield stem, members
            stem, members = parts[0], {}
            if stem in seen:
                raise ValueError(
                    f"{path}: the member {member.name!r} at byte {member.offset} belongs to a sample that ended before "
                    "it: the members of a sample must follow each other, and each sample needs a name of its own"
                )
            seen.add(stem)
        if parts[1] in members:
            raise ValueError(
                f"{path} holds two members of the name {member.name!r} (case apart), at byte "
                f"{members[parts[1]].offset} and at byte {member.offset}: which one counts cannot be known"
            )
        members[parts[1]] = member
    if members:
        yield stem, members


def _add(
    shard: Shard,
    path: Path,
    file: BinaryIO,
    stem: str,
    members: Mapping[str, Member],
    settings: Settings,
    naming: Naming,
) -> None:
    first = next(iter(members.values()))
    where = f"{path}: the sample {stem!r} at byte {first.offset}"
    images = [(text, members[text]) for text in settings.extensions if text in members]
    if len(images) > 1:
        raise ValueError(
            f"{where} has {len(images)} images ({', '.join(text for text, _ in images)}): say by --image-ext which one "
            "is meant"
        )
    label = None
    if (member := members.get(settings.labels.extension)) is not None:
        described = f"{path}: the member {member.name!r} at byte {member.offset}"
        if member.size > settings.labels.largest:
            raise ValueError(
                f"{described} has {member.size:,} bytes; labels of up to {settings.labels.largest:,} are read"
            )
        try:
            label = settings.labels.parse(os.pread(file.fileno(), member.size, member.offset))
        except ValueError as error:
            raise ValueError(f"{described} {error}") from None
    missing = ""
    if not images or images[0][1].size == 0:
        missing = "no image" if not images else "an empty image"
    elif label is None:
        missing = "no label"
    if missing:
        if not settings.skip_incomplete:
            what = SOURCES if missing == "no label" else f"images are members .{', .'.join(settings.extensions)}"
            has = ", ".join(f".{text}" for text in list(members)[:8])
            raise ValueError(f"{where} has {missing} (it has {has}); --skip-incomplete leaves it out; {what}")
        shard.left_out[missing] += 1
        return
    assert label is not None
    extension, image = images[0]
    if image.size > _LARGEST_IMAGE:
        raise ValueError(f"{path}: the member {image.name!r} at byte {image.offset} is no image of {image.size} bytes")
    number = naming.number(stem, path.name)
    block = os.pread(file.fileno(), BLOCKSIZE, image.offset - BLOCKSIZE)

    def read(offset: int, size: int) -> bytes:
        return os.pread(file.fileno(), size, offset)

    # what training checks at each read
    if not in_header(block, naming, path.name, number, image.size) and not in_extended_headers(
        read, naming, path.name, number, image.offset, image.size
    ):
        raise ValueError(
            f"{path}: the tar header of {image.name!r} before byte {image.offset} is of a kind that is not read here "
            f"(more than {LONGEST_HEADERS // 1024} KiB of extended headers, say); write the tar again"
        )
    shard.offsets.append(image.offset)
    shard.sizes.append(image.size)
    shard.numbers.append(number)
    shard.extensions.append(extension)
    shard.labels.append(label)
