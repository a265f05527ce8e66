"""Compare a folder of shards with its index, completely: bytes, members, labels, tables, and that images decode."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer.files import check_size, json_bytes
from scaletransfer.foreign_members import is_foreign
from scaletransfer.foreign_verify import foreign_problems
from scaletransfer.index import ShardIndex, load_index, read_index
from scaletransfer.sample_table import count_patients, label_totals
from scaletransfer.shard_build import timm_description, wids_description
from scaletransfer.shard_image import Encoding, UnusableImage, prepare
from scaletransfer.shard_output import INFO_NAME
from scaletransfer.shard_pool import run_all
from scaletransfer.shard_scan import (
    LARGEST_IMAGE,
    LARGEST_LABEL,
    Entry,
    Label,
    entries,
    label_extension,
    parse_label,
    read_member,
)
from scaletransfer.storage import download, is_url, join, local_path, read_bytes
from scaletransfer.storage_errors import MissingObject, shown
from scaletransfer.tars import Damaged

_SHOWN = 20
"""Unexpected members of one shard, or keys that are there twice, that are named; there may be thousands."""


def verify(
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    decode: bool = True,
    progress: Callable[[int], object] = lambda samples: None,
) -> list[str]:
    """Compare a folder of shards with its index; the problems found, one sentence each, in the order of the shards.

    Checked: sizes and sha256 of shards and tables; names, kind, order, place and size of tar members (whatever is not
    an image or a label of the table is named with its byte); labels, view and patient of every sample against the
    table; totals, numbers of samples and patients; unique keys, over all splits; the side files; stray shards.  With
    `decode` every image is decoded completely: what make_shards would leave out is named, and so are images that are
    larger, deeper or more colourful than the index says, or hold metadata that was to be removed.

    Nothing is unpickled, extracted or followed, and no header makes it allocate more than the file holds.
    workers: processes; progress: called with numbers of samples.  `folder` may be a URL: each shard is then copied
    into a temporary file while it is looked at.  Raises ValueError if the server cannot be reached.
    """
    try:
        index = _open(os.fspath(folder))
    except ValueError as error:
        return [str(error)]
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    problems, sound = _tables(index)
    run = uuid.uuid4().hex
    looks = [
        _Look(
            folder=index.folder,
            url=index.url,
            run=run,
            split=split,
            number=number,
            decode=decode,
            samples=range(shard.samples),
        )
        for split, info in index.splits.items()
        for number, shard in enumerate(info.shards)
    ]
    order = {(look.split, look.number): place for place, look in enumerate(looks)}
    with closing(run_all(_look, looks, workers, progress)) as results:
        found = sorted(results, key=lambda result: order[result["split"], result["number"]])
    for result in found:
        problems += result["problems"]
    problems += _keys(index, sound)
    problems += _patients(index.folder, [result["patients"] for result in found])
    return problems + list(_side_files(index))


def _open(folder: str) -> ShardIndex:
    """The index, whatever became of the files that it names; of a URL, those have to be there."""
    local = local_path(folder) if is_url(folder) else folder
    return load_index(folder) if local is None else read_index(local)


def shard_problem(path: Path, size: int, sha256: str) -> str:
    """Why the file `path` is not the shard with this size and hash, as a sentence; "" if it is."""
    try:
        check_size(path, size)
    except ValueError as error:
        return str(error)
    if not path.is_file():
        return f"{path} is not a file; copy the folder again"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return f"{path}: sha256 differs from index.json; copy the file again"
    return ""


def side_files(index: ShardIndex) -> dict[str, bytes]:
    """Name and content of the files for other readers."""
    wids = {f"wids-{s}.json": json_bytes(wids_description(index.source, s, info)) for s, info in index.splits.items()}
    return {INFO_NAME: json_bytes(timm_description(index.splits)), **wids}


def table_of(index: ShardIndex, split: str) -> NDArray[Any]:
    """`index.table(split)`; ValueError for a table that is not there as well."""
    try:
        return index.table(split)
    except OSError as error:
        path = index.folder / index.splits[split].table_file
        raise ValueError(f"{path} cannot be read ({error.strerror}); copy the folder again") from None


def _tables(index: ShardIndex) -> tuple[list[str], list[str]]:
    """(problems, splits whose table is sound)."""
    problems, sound = [], []
    for split, info in index.splits.items():
        try:
            table = table_of(index, split)
        except ValueError as error:
            problems.append(str(error))
            continue
        sound.append(split)
        if label_totals(table, index.task, index.label_names) != info.totals:
            problems.append(f"{index.folder}: the totals of the split {split} in index.json are not those of its table")
        if count_patients(table) != info.patients:
            problems.append(f"{index.folder}: the number of patients of the split {split} is not that of its table")
        counts = np.bincount(table["shard"], minlength=len(info.shards))
        for shard, rows in zip(info.shards, counts.tolist(), strict=True):
            if shard.samples != rows:
                what = f"{shard.samples} samples in index.json, {rows} in the table"
                problems.append(f"{index.folder / shard.file}: {what}")
        if np.any(np.diff(table["shard"]) < 0):
            problems.append(f"{index.folder / info.table_file}: the rows are not in the order of the shards")
    return problems, sound


def _keys(index: ShardIndex, splits: Sequence[str]) -> list[str]:
    """A problem for each key that is there more than once."""
    if not splits:
        return []
    keys = np.concatenate([index.table(split)["key"] for split in splits])
    starts = np.cumsum([0] + [len(index.table(split)) for split in splits])
    order = np.argsort(keys, kind="stable")
    twice = np.unique(keys[order][1:][np.diff(keys[order]) == 0])
    problems = [f"{index.folder}: {len(twice) - _SHOWN} more keys are there twice"] if len(twice) > _SHOWN else []
    for key in twice[:_SHOWN].tolist():
        places = []
        for row in np.flatnonzero(keys == key).tolist():
            split = splits[int(np.searchsorted(starts, row, "right")) - 1]
            entry = index.table(split)[row - starts[splits.index(split)]]
            file = index.splits[split].shards[int(entry["shard"])].file
            places.append(f"{file} at byte {int(entry['offset'])}")
        problems.append(f"{index.folder}: the key {index.source}-{key:016x} is in {' and in '.join(places)}")
    return problems


def _patients(folder: Path, pairs: Sequence[NDArray[Any]]) -> list[str]:
    """One code a number and one number a code, over all splits."""
    both = np.unique(np.concatenate(pairs)) if pairs else np.zeros(0, _PAIR)
    for field, what in (("code", "more than one number in the tables"), ("number", "more than one code in the tars")):
        values, counts = np.unique(both[field], return_counts=True)
        for value in values[counts > 1][:_SHOWN].tolist():
            name = f"code {value:016x}" if field == "code" else f"number {value}"
            return [f"{folder}: the patient with the {name} has {what}"]
    return []


def _side_files(index: ShardIndex) -> Iterator[str]:
    if is_foreign(index.encoder):
        return  # it has none, and other tars may lie beside those that are indexed
    for name, content in side_files(index).items():
        if _content(index, name, len(content)) != content:
            where = join(shown(index.url), name) if index.url else index.folder / name
            yield f"{where} is missing or does not fit index.json"
    if index.url:
        return  # what else is there is not in the way of a reader
    known = {shard.file for info in index.splits.values() for shard in info.shards}
    for name in sorted(os.listdir(index.folder)):
        if name.endswith((".tar", ".tmp")) and name not in known:
            yield f"{index.folder / name} does not belong to the index"


def _content(index: ShardIndex, name: str, size: int) -> bytes | None:
    """What a side file holds; None where it is missing or has another size."""
    if index.url:
        try:
            return read_bytes(join(index.url, name))
        except MissingObject:
            return None
    path = index.folder / name
    return path.read_bytes() if path.is_file() and path.stat().st_size == size else None


_PAIR = np.dtype([("code", "<u8"), ("number", "<i4")])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """One shard to look at; picklable."""

    folder: Path
    """With index.json and tables; with the shards, unless there is a `url`."""
    url: str
    run: str
    """Of one call of `verify`: another one opens the folder anew."""
    split: str
    number: int
    decode: bool
    samples: range


@lru_cache(maxsize=1)
def _opened(folder: Path, run: str) -> ShardIndex:
    return read_index(folder)


def _look(look: _Look, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """{split, number, problems, patients: pairs of code and number} of one shard."""
    index = _opened(look.folder, look.run)
    path = index.path(look.split, look.number)
    if look.url:
        with tempfile.TemporaryDirectory(prefix="verify-shards-") as folder:
            copy, url = Path(folder) / path.name, join(look.url, path.name)
            download(url, copy)
            check = _Check(index, look, copy)
            check.run(progress)
        check.problems = [text.replace(str(copy), shown(url)) for text in check.problems]
    else:
        check = _Check(index, look, path)
        check.run(progress)
    pairs = np.asarray(sorted(check.patients), dtype=_PAIR) if check.patients else np.zeros(0, _PAIR)
    return {"split": look.split, "number": look.number, "problems": check.problems, "patients": pairs}


class _Check:
    """What is wrong with one shard."""

    def __init__(self, index: ShardIndex, look: _Look, path: Path) -> None:
        self.index, self.look, self.path = index, look, path
        self.problems: list[str] = []
        self.truncated = False
        self.patients: set[tuple[int, int]] = set()
        self.encoding = Encoding(size=index.image.size, private=index.encoder.get("metadata") == "removed")
        try:
            table = table_of(index, look.split)
            self.rows: NDArray[Any] | None = table[table["shard"] == look.number]
        except ValueError:
            self.rows = None  # said once, by _tables

    def run(self, progress: Callable[[int], object] | None) -> None:
        shard = self.index.splits[self.look.split].shards[self.look.number]
        problem = shard_problem(self.path, shard.bytes, shard.sha256)
        if problem:
            self.problems.append(problem)
        if is_foreign(self.index.encoder):
            if self.path.is_file() and self.rows is not None:
                decode, told = self.look.decode, progress or (lambda samples: None)
                self.problems += foreign_problems(self.index, self.path, self.rows, decode=decode, progress=told)
            return
        if not self.path.is_file():
            if progress:
                progress(shard.samples)
            return
        self.truncated = self.path.stat().st_size < shard.bytes
        members = self._members()
        seen = 0
        for image, text in self._samples(members):
            self._sample(image, text, seen)
            seen += 1
            if progress:
                progress(1)
        if progress:
            progress(max(0, shard.samples - seen))

    def _say(self, entry: Entry, text: str) -> None:
        self.problems.append(f"{self.path} at byte {entry.at}: {text}")

    def _members(self) -> list[Entry]:
        """All members, as far as headers can be followed."""
        members = []
        try:
            for entry in entries(self.path):
                members.append(entry)
        except Damaged as error:
            if not self.truncated:  # which says enough
                self.problems.append(str(error))
        return members

    def _samples(self, members: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
        """Pairs of image and label, if the members are those that they should be; else what is wrong with them."""
        extensions = (self.index.image.extension, label_extension(self.index))
        if self.rows is None:
            keys = [entry.name.removesuffix(f".{extensions[0]}") for entry in members[::2]]
        else:
            keys = [f"{self.index.source}-{key:016x}" for key in self.rows["key"].tolist()]
        names = [f"{key}.{extension}" for key in keys for extension in extensions]
        expected, found = set(names), [entry.name for entry in members]
        there = set(found)
        for entry in members:
            if entry.fault:
                self._say(entry, f"member {entry.name!r} does not belong here: {entry.fault}")
        unexpected = [entry for entry in members if entry.name not in expected and not entry.fault]
        for entry in unexpected[:_SHOWN]:
            self._say(entry, f"unexpected member {entry.name!r}")
        if len(unexpected) > _SHOWN:
            self.problems.append(f"{self.path}: {len(unexpected) - _SHOWN} more unexpected members")
        missing = [name for name in names if name not in there]
        if missing and not self.truncated:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            self.problems.append(f"{self.path}: member {missing[0]!r} is missing{more}")
        counts = Counter(found)
        for entry in members:
            if counts[entry.name] > 1:
                self._say(entry, f"member {entry.name!r} is there twice")
        if found == names:
            yield from zip(members[::2], members[1::2], strict=True)
        elif sorted(found) == sorted(names):
            self.problems.append(f"{self.path}: the members are not in the order of the table")

    def _sample(self, image: Entry, text: Entry, number: int) -> None:
        if image.fault or text.fault:
            return
        row = None if self.rows is None else self.rows[number]
        if row is not None and (image.offset, image.size) != (int(row["offset"]), int(row["size"])):
            self._say(image, f"{image.name!r} does not lie where the table says")
        try:
            label = parse_label(self.index, read_member(self.path, text, LARGEST_LABEL))
        except Damaged as error:
            self.problems.append(str(error))
        except ValueError as error:
            self._say(text, f"{text.name!r} does not say what the table says: {error}")
        else:
            if row is not None and not self._same(label, row):
                self._say(text, f"{text.name!r} does not say what the table says")
        if self.look.decode:
            self._image(image, row)

    def _same(self, label: Label, row: Any) -> bool:
        if isinstance(label.labels, int):
            return label.labels == int(row["label"])
        if self.index.label_kind == "tokens":
            states = [int(name in label.labels) for name in self.index.label_names]
        else:
            states = list(label.labels)  # type: ignore[arg-type]
        view = self.index.views[row["view"]] if row["view"] >= 0 else ""
        number = int(row["patient"])
        if label.patient:
            self.patients.add((int(label.patient, 16), number))
        same_patient = (number >= 0) == bool(label.patient)
        return states == row["labels"].tolist() and view == label.view and same_patient

    def _image(self, entry: Entry, row: Any) -> None:
        """Decode as make_shards does before it stores an image."""
        described = self.index.image
        try:
            data = read_member(self.path, entry, LARGEST_IMAGE)
            prepared = prepare(data, described.extension, self.encoding)
        except Damaged as error:
            self.problems.append(str(error))
        except (UnusableImage, ValueError) as reason:
            self._say(entry, f"the image {entry.name!r} cannot be used: {reason}")
        else:
            if row is not None and row["crc"] not in (0, zlib.crc32(data)):
                self._say(entry, f"the image {entry.name!r} does not have the CRC-32 of the table")
            if prepared.channels > described.channels:
                self._say(entry, f"the image {entry.name!r} has colour, and index.json says grey")
            if prepared.bit_depth != described.bit_depth:
                bits = f"{prepared.bit_depth} bits, and index.json says {described.bit_depth}"
                self._say(entry, f"the image {entry.name!r} has {bits}")
            elif described.bit_depth == 16 and prepared.pixel_max > described.pixel_max:
                values = f"{prepared.pixel_max}, larger than the {described.pixel_max} of index.json"
                self._say(entry, f"the image {entry.name!r} has the value {values}")
            if prepared.data != data:
                what = f"a short side above {described.size}" if described.size else "metadata"
                self._say(entry, f"the image {entry.name!r} has {what}, which index.json excludes")
