"""The shard index: what a folder of shards holds, and where each image lies in it.

A folder of shards is `index.json` (written last: no index, no shards), one tar file or more a split, and one
sample table a split (`samples-<split>.npy`, no pickle).  `shards/README.md` specifies the format.  The module
needs neither torch nor pandas (and Pillow only in `from_records`), so that both halves of the project use it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer import keys as sample_keys
from scaletransfer.files import (
    check_bytes,
    check_size,
    inside,
    json_bytes,
    write_atomically,
)
from scaletransfer.image_files import file_of
from scaletransfer.index_fields import ShardInfo, SplitInfo, parse_fields, split_order
from scaletransfer.records import (
    ImageInfo,
    RecordLike,
    SourceLike,
    image_sizes,
    key_number,
    place_in_table,
    probe_images,
    sample_keys_of,
)
from scaletransfer.sample_table import (
    count_patients,
    label_rows,
    label_totals,
    open_table,
    patient_numbers,
    table_dtype,
    table_problem,
)
from scaletransfer.shard_cache import fetch, folder_of, keep
from scaletransfer.storage import is_url, join, local_path, read_bytes, sizes_of
from scaletransfer.storage_errors import MissingObject, shown
from scaletransfer.storage_settings import RemoteSettings

FORMAT = "scaletransfer-shards"
FORMAT_VERSION = 2
INDEX_NAME = "index.json"


@dataclass(slots=True, kw_only=True)
class ShardIndex:
    """Contents of index.json, and access to sample tables and files.  Picklable (tables are re-opened)."""

    folder: Path
    source: str
    task: str
    label_names: tuple[str, ...]
    label_kind: str
    views: tuple[str, ...]
    image: ImageInfo
    splits: dict[str, SplitInfo]
    salt_fingerprint: str
    licence: str
    digest: str
    """sha256 of the bytes of index.json (in memory: of its content and tables)."""
    encoder: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    plan_sha256: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of the source's table that gave no sample, by reason."""
    in_memory: bool = False
    url: str = ""
    """The remote folder; `folder` is then a local copy of index.json and the sample tables."""
    _tables: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    _places: dict[tuple[str, int], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def where(self) -> str:
        """The folder as sentences name it: its path or URL."""
        return shown(self.url) or str(self.folder)

    def table(self, split: str) -> NDArray[Any]:
        """The sample table of `split`: a read-only structured array, one row a sample, in shard order.

        Fields: shard <i4 (index into `splits[split].shards`), offset <i8 and size <i8 (bytes of the image
        inside that file), key <u8 (the 16 hex digits), crc <u4 (CRC-32 of the image, 0 = unknown), patient <i4
        (-1 = none; equal codes are equal patients in every split), view <i2 (index into `views`, -1 = none), then
        `labels` i1 (L,) of raw states for a multi-label set or `label` <i4 for a multi-class one.  Checked once
        against index.json.

        Raises ValueError for an unknown split and for a table that is damaged or of another data set.
        """
        info = self._split(split)
        if split not in self._tables:
            path = self.folder / info.table_file
            dtype = table_dtype(self.task, len(self.label_names))
            table = open_table(path, info.table_sha256, info.samples, dtype)
            sizes = [shard.bytes for shard in info.shards]
            samples = [shard.samples for shard in info.shards]
            problem = table_problem(table, sizes, len(self.views), len(self.label_names), samples)
            if problem:
                raise ValueError(f"{path}: {problem}; make the folder again with make_shards --overwrite")
            self._tables[split] = table
        return self._tables[split]

    def path(self, split: str, shard: int) -> Path:
        """Path of file number `shard` of `split`; ValueError if its name leaves the folder, or is behind a URL."""
        if self.url:
            raise ValueError(f"{shown(self.url)} is not on a disk: copy the folder of shards and name the copy")
        return self.folder / inside(self._split(split).shards[shard].file, self.folder)

    def place(self, split: str, shard: int) -> str:
        """The same as text, or the URL of the file where the folder has one: what `ShardReader.read` takes."""
        found = self._places.get((split, shard))
        if found is None:  # asked for with every image
            if self.url:
                found = join(self.url, inside(self._split(split).shards[shard].file, self.folder))
            else:
                found = str(self.path(split, shard))
            self._places[split, shard] = found
        return found

    def keys(self, split: str, rows: Iterable[int] | slice | NDArray[Any]) -> list[str]:
        """Sample keys `<source>-<16 hex digits>` of table rows, in the given order."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        return [f"{self.source}-{digest:016x}" for digest in self.table(split)["key"][chosen].tolist()]

    def _split(self, split: str) -> SplitInfo:
        if split not in self.splits:
            raise ValueError(f"{self.where}: there is no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if not self.in_memory:
            state["_places"], state["_tables"] = {}, {}  # a memory map would travel as a copy of the whole table
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def load_index(folder: str | os.PathLike[str], remote: RemoteSettings | None = None) -> ShardIndex:
    """Open a folder of shards: read index.json and check that every file it names is there in full.

    A folder named by URL is one too: its index and sample tables are copied into the cache folder of `remote`, its
    shards stay where they are (`file://` URLs name folders on a disk).

    Sizes are compared, hashes are not (`shards.verify` does that).  Raises ValueError, in one sentence that
    names the file, if the folder has no index, the index is of another format or version or lacks a field, or
    a shard or table is absent or truncated.
    """
    if is_url(folder):
        local = local_path(os.fspath(folder))
        if local is None:
            return _load_remote(os.fspath(folder).rstrip("/"), remote or RemoteSettings())
        folder = local
    index = read_index(folder)
    for split in index.splits.values():
        for shard in split.shards:
            check_size(index.folder / shard.file, shard.bytes)
        if not (index.folder / split.table_file).is_file():
            raise ValueError(f"{index.folder / split.table_file} is missing; make the folder again with make_shards")
    return index


def read_index(folder: str | os.PathLike[str]) -> ShardIndex:
    """What index.json of a folder says, whatever became of the files that it names; ValueError as in `load_index`."""
    folder = Path(folder)
    path = folder / INDEX_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: unfinished or not a shard folder; run make_shards") from None
    return _parsed(raw, folder, path)


def _parsed(raw: bytes, folder: Path, path: Path | str) -> ShardIndex:
    try:
        content = json.loads(raw)
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; make the folder again with make_shards --overwrite") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not an index of {FORMAT} (field 'format'); give a folder of make_shards")
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise ValueError(
            f"{path} has format_version {version!r}, this program reads {FORMAT_VERSION}; make the folder again"
        )
    return ShardIndex(folder=folder, digest=hashlib.sha256(raw).hexdigest(), **parse_fields(content, path))


def _load_remote(url: str, remote: RemoteSettings) -> ShardIndex:
    """`load_index` of a URL.  index.json is read anew each time; what it names is kept under its hash."""
    path = join(shown(url), INDEX_NAME)
    try:
        raw = read_bytes(join(url, INDEX_NAME), remote)
    except MissingObject:
        raise ValueError(
            f"{path} does not exist: unfinished or not a shard folder, or another bucket; run make_shards"
        ) from None
    digest = hashlib.sha256(raw).hexdigest()
    folder = folder_of(remote) / "indexes" / hashlib.sha256(f"{url}\n{digest}".encode()).hexdigest()[:32]
    index = _parsed(raw, folder, path)
    tables = {split.table_file: split.table_sha256 for split in index.splits.values()}
    shards = {shard.file: shard.bytes for split in index.splits.values() for shard in split.shards}
    there = sizes_of(url, [*tables, *shards], remote)
    for name, expected in shards.items():
        check_bytes(join(shown(url), name), there.get(name), expected)
    for name, sha256 in tables.items():
        if name not in there:
            raise ValueError(f"{join(shown(url), name)} is missing; make the folder again with make_shards")
        fetch(join(url, name), folder / name, there[name], sha256, remote)
    keep(raw, folder / INDEX_NAME)
    index.url = url
    return index


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write index.json atomically (temporary file, fsync, rename); the last act of making a folder.

    `content` holds every field of the format but `format` and `format_version`; it is parsed first, so that
    an index that cannot be read back is never written.
    """
    data = json_bytes({"format": FORMAT, "format_version": FORMAT_VERSION, **content})
    parse_fields(json.loads(data), folder / INDEX_NAME)
    write_atomically(folder / INDEX_NAME, data)


def from_records(source: SourceLike, salt: bytes, *, image: ImageInfo | None = None) -> ShardIndex:
    """The same index made in memory over image files as they lie: a file is a "shard" with one image at offset 0,
    a tar one with many; an image in another archive stands under its name there (`image_files.read_image`).

    `source` is an opened source (its options choose the views), `salt` makes the keys.  Without `image` the
    headers of up to 2,048 images spread over the records tell channels and bit depth (`records.probe_images`).
    Raises ValueError for records with the same key, for image files that are missing (naming the first and their
    number) and for a file among those 2,048 that is not an image (naming it).
    """
    by_split: dict[str, list[RecordLike]] = {}
    for record in source.locate(list(source)):
        by_split.setdefault(record.split, []).append(record)
    if not by_split:
        raise ValueError(f"{source.root} holds no records of {source.name}; check --root and the views")
    ordered = [record for split in sorted(by_split, key=split_order) for record in by_split[split]]
    keys = sample_keys_of(source.name, ordered, salt)
    sizes = image_sizes(source.root, ordered)
    missing = [record for record, size in zip(ordered, sizes, strict=True) if size <= 0]
    if missing:
        where = place_in_table(missing[0], ordered.index(missing[0]))
        raise ValueError(
            f"{source.root / missing[0].image} (split {missing[0].split}, {where}) is missing or empty, and with it "
            f"{len(missing)} of {len(ordered)} images; complete the data set or take these rows out"
        )
    codes = [sample_keys.patient_code(source.name, record.patient, salt) for record in ordered]
    numbers, views = patient_numbers(codes), tuple(sorted({record.view for record in ordered} - {""}))
    digest, tables, splits, start = (
        hashlib.sha256(repr((source.name, source.label_names)).encode()),
        {},
        {},
        0,
    )
    for split in sorted(by_split, key=split_order):
        records, rows = by_split[split], slice(start, start + len(by_split[split]))
        start = rows.stop
        table = np.zeros(len(records), table_dtype(source.task, len(source.label_names)))
        names = [_read_as(record) for record in records]
        files = {name: number for number, name in enumerate(dict.fromkeys(names))}
        table["shard"], table["size"] = [files[name] for name in names], sizes[rows]
        table["offset"] = [record.span[0] if record.span else 0 for record in records]
        counts = Counter(names)
        ends: dict[str, int] = {}
        for name, offset, size in zip(names, table["offset"].tolist(), sizes[rows], strict=True):
            ends[name] = max(ends.get(name, 0), offset + size)
        table["key"] = [key_number(key) for key in keys[rows]]
        table["patient"] = [numbers[code] for code in codes[rows]]
        table["view"] = [views.index(record.view) if record.view else -1 for record in records]
        labels = label_rows([record.labels for record in records], source.label_kind, source.label_names)
        table["labels" if source.task == "multilabel" else "label"] = labels
        table.flags.writeable = False
        digest.update(split.encode() + table.tobytes())
        tables[split] = table
        splits[split] = SplitInfo(
            samples=len(records),
            patients=count_patients(table),
            table_file="",
            table_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
            shards=tuple(ShardInfo(file=file, samples=counts[file], bytes=ends[file], sha256="") for file in files),
            totals=label_totals(table, source.task, source.label_names),
            quarantine=(),
        )
    return ShardIndex(
        folder=Path(source.root),
        source=source.name,
        task=source.task,
        label_names=tuple(source.label_names),
        label_kind=source.label_kind,
        views=views,
        image=image or probe_images(Path(source.root), ordered),
        splits=splits,
        salt_fingerprint=sample_keys.fingerprint(salt),
        licence=source.licence,
        digest=digest.hexdigest(),
        left_out=dict(source.left_out),
        in_memory=True,
        _tables=tables,
    )


def _read_as(record: RecordLike) -> str:
    """The file that an image in memory is read from: by its span from the archive, else under its whole name."""
    return file_of(record.image) if record.span else record.image
