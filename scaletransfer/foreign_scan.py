"""One pass over a WebDataset tar that somebody else made: where its images are, whose they are, what their labels say.

The tar is untrusted: what `tars` refuses is refused, and members that are neither image nor label are only hashed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import multiprocessing
import os
import re
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import BinaryIO

import braceexpand

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
_SPLIT_OF_NAME = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}
_LARGEST_IMAGE = 1 << 31
_CHUNK = 1 << 20


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
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    """Keys."""
    sums: array[int] = field(default_factory=lambda: array("I"))
    """CRC-32 of each image."""
    extensions: set[str] = field(default_factory=set)
    """Of its images."""
    labels: list[Label] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def choose_splits(names: Sequence[str], text: str | None, folder: Path) -> dict[str, list[str]]:
    """{split: names of its tars, sorted}.  names: of the tars in `folder`; text: the option --splits, or None.

    A tar belongs to the first pattern that fits.  Without the option a tar's name tells, where it begins with a split's
    (`train-0000.tar`, `val_3.tar`); if none does, all are `train`.

    Raises ValueError for a pattern that fits none, what is no SPLIT=PATTERN, and names of which some begin so only.
    """
    found: dict[str, list[str]] = {}
    if text is None:
        splits = [_SPLIT_OF_NAME.get(re.split(r"[^a-z]", name, maxsplit=1)[0], "") for name in names]
        if any(splits) and not all(splits):
            odd, other = names[splits.index("")], names[next(i for i, split in enumerate(splits) if split)]
            raise ValueError(
                f"{folder} holds {other} and {odd}, which names no split: say what they are, for example "
                "--splits 'train=train-*.tar,valid=val-*.tar'"
            )
        for name, split in zip(names, splits, strict=True):
            found.setdefault(split or "train", []).append(name)
        return found
    left = list(names)
    for part in text.split(","):
        split, equals, pattern = part.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", split) or not equals or not pattern or "/" in pattern:
            raise ValueError(
                f"--splits has {part!r}; give SPLIT=PATTERN of file names in the folder, with commas between them, for "
                "example train=train-*.tar,valid=val-*.tar"
            )
        # {00000..00041}, as webdataset writes lists of tars
        patterns = list(braceexpand.braceexpand(pattern))
        chosen = [name for name in left if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
        if not chosen:
            raise ValueError(f"--splits: no tar in {folder} is named {pattern!r} (or an earlier pattern took it)")
        left = [name for name in left if name not in set(chosen)]
        found[split] = sorted([*found.get(split, []), *chosen])
    return found


def tars_of(folder: Path) -> list[str]:
    """Names of the tars in `folder`, sorted; ValueError where there is none."""
    if not folder.is_dir():
        what = "give a folder on this machine; its index can be copied beside the remote tars"
        raise ValueError(f"{folder} is not a folder: {what}" if "://" in str(folder) else f"{folder} is not a folder")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    found = [name for name in names if name.endswith(".tar")]
    if not found:
        packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))]
        hint = f"; {packed[0]} is compressed: unpack it to a plain .tar, which is read at offsets" if packed else ""
        raise ValueError(f"{folder} holds no .tar{hint}")
    return found


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
    """One tar: its hash, then its headers, labels, and the CRC-32 of its images."""
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
    shard.sums.append(_crc(file, image))
    shard.extensions.add(extension)
    shard.labels.append(label)


def _crc(file: BinaryIO, image: Member) -> int:
    """CRC-32 of its bytes, which training compares; piece by piece, since whoever made the tar chose their number."""
    crc, end = 0, image.offset + image.size
    for start in range(image.offset, end, _CHUNK):
        crc = zlib.crc32(os.pread(file.fileno(), min(_CHUNK, end - start), start), crc)
    return crc
