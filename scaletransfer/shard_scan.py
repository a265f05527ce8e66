"""What lies in a shard, read header by header: safe for a file that may be damaged or hostile.

Nothing is extracted, followed or executed; no more is allocated than a header and the one file that is asked for.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from scaletransfer.index import ShardIndex
from scaletransfer.sample_table import TOKEN_SEPARATOR
from scaletransfer.tars import Damaged

LARGEST_IMAGE = 1 << 30
LARGEST_LABEL = 1 << 20
"""Bytes of one member that are read at once; whatever claims more is no image and no label."""

_BLOCK = tarfile.BLOCKSIZE
_NO_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "an extended header",
    tarfile.GNUTYPE_LONGLINK: "an extended header",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
}
_CODE = re.compile(r"[0-9a-f]{16}|")


class Entry(NamedTuple):
    """One member of a tar, whatever it is."""

    name: str
    at: int
    """First byte of its header."""
    offset: int
    """First byte of its content."""
    size: int
    fault: str
    """Why it may not be in a shard, in words; "" for a plain file of a plain name."""


class Label(NamedTuple):
    """What the member beside an image says of it."""

    labels: tuple[int, ...] | tuple[str, ...] | int
    patient: str
    view: str


@dataclass(frozen=True, slots=True)
class Found:
    """A sample as it lies in a shard."""

    key: str
    offset: int
    """First byte of the image."""
    size: int
    label: Label


def entries(path: Path) -> Iterator[Entry]:
    """The members of a plain tar in its order, links and devices as well.

    Raises Damaged, with the byte, where a header is none or claims more bytes than the file has, and where the end
    mark is missing or something stands behind it; OSError.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        length = os.fstat(descriptor).st_size
        at = 0
        while (block := os.pread(descriptor, _BLOCK, at)) != bytes(_BLOCK):
            if len(block) < _BLOCK:
                raise Damaged(f"{path} at byte {at}: the file ends without the end mark of a tar")
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise Damaged(f"{path} at byte {at}: there is no header of a tar ({error})") from None
            offset = at + _BLOCK
            size = 0 if info.type in _NO_CONTENT else info.size
            if not 0 <= size <= length - offset:
                raise Damaged(f"{path} at byte {at}: {info.name!r} claims {size} bytes, and {length - offset} follow")
            yield Entry(info.name, at, offset, size, _fault(info))
            at = offset + -(-size // _BLOCK) * _BLOCK
        if length - at > _BLOCK + tarfile.RECORDSIZE or any(os.pread(descriptor, length - at, at)):
            raise Damaged(f"{path} at byte {at}: something stands behind the end mark of the tar")


def read_member(path: Path, entry: Entry, largest: int) -> bytes:
    """The content of a member; Damaged if it is larger than `largest` or the file has become shorter."""
    if entry.size > largest:
        raise Damaged(f"{path} at byte {entry.at}: {entry.name!r} has {entry.size} bytes, which is too much")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), entry.size, entry.offset)
    if len(data) != entry.size:
        raise Damaged(f"{path} at byte {entry.at}: the file ends inside of {entry.name!r}")
    return data


def label_extension(index: ShardIndex) -> str:
    """Extension of the member that follows an image."""
    return "json" if index.task == "multilabel" else "cls"


def parse_label(index: ShardIndex, content: bytes) -> Label:
    """What a label member says; ValueError if that is not what the format and this index allow."""
    if index.task == "multiclass":
        if not re.fullmatch(rb"0|[1-9][0-9]{0,8}", content) or int(content) >= len(index.label_names):
            raise ValueError("it is no class of the index")
        return Label(int(content), "", "")
    kind = "tokens" if index.label_kind == "tokens" else "labels"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(found, dict) or found.keys() != {kind, "patient", "view"}:
        raise ValueError(f"its keys are not {kind}, patient and view")
    labels, patient, view = found[kind], found["patient"], found["view"]
    if not isinstance(patient, str) or not _CODE.fullmatch(patient) or view not in ("", *index.views):
        raise ValueError("its patient or view cannot be")
    if kind == "tokens":
        names = tuple(labels.split(TOKEN_SEPARATOR)) if isinstance(labels, str) and labels else ()
        if not isinstance(labels, str) or not set(names) <= set(index.label_names):
            raise ValueError("its tokens are not labels of the index")
        return Label(names, patient, view)
    good = isinstance(labels, list) and len(labels) == len(index.label_names)
    if not good or not all(type(state) is int and -2 <= state <= 1 for state in labels):
        raise ValueError("its labels are not the states of the labels of the index")
    return Label(tuple(labels), patient, view)


def samples_in(index: ShardIndex, path: Path) -> list[Found]:
    """The samples of a sound shard, in its order; Damaged, with the byte, where it does not hold to the format."""
    found, image = [], None
    for entry in entries(path):
        name, _, extension = entry.name.partition(".")
        expected = label_extension(index) if image else index.image.extension
        wrong = entry.fault or extension != expected or not is_key(index, name)
        if wrong or (image and name != image.name.partition(".")[0]):
            raise Damaged(f"{path} at byte {entry.at}: unexpected member {entry.name!r}")
        if image is None:
            image = entry
            continue
        try:
            label = parse_label(index, read_member(path, entry, LARGEST_LABEL))
        except Damaged:
            raise
        except ValueError as error:
            raise Damaged(f"{path} at byte {entry.at}: {entry.name!r} cannot be used: {error}") from None
        found.append(Found(name, image.offset, image.size, label))
        image = None
    if image:
        raise Damaged(f"{path} at byte {image.at}: {image.name!r} has no label beside it")
    return found


def is_key(index: ShardIndex, name: str) -> bool:
    """Whether `name` has the form of this index's keys."""
    return re.fullmatch(re.escape(index.source) + "-[0-9a-f]{16}", name) is not None


def _fault(info: tarfile.TarInfo) -> str:
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return f"it is {_KINDS.get(info.type, 'no plain file')}"
    pure = PurePosixPath(info.name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in info.name:
        return "its name leaves the folder"
    if info.name != pure.name or not info.name.isprintable():
        return "its name is no plain name"
    return ""
