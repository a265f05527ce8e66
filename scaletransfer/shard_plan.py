"""Which record goes into which shard: fixed from the table alone, before an image is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer import keys
from scaletransfer.dicom import require_pydicom
from scaletransfer.image_files import read_image
from scaletransfer.index import FORMAT_VERSION
from scaletransfer.index_fields import split_order
from scaletransfer.pixel_range import WHITE16, full_range
from scaletransfer.records import RecordLike, SourceLike, image_sizes, place_in_table, sample_keys_of
from scaletransfer.sample_table import patient_numbers
from scaletransfer.shard_image import KEPT_EXTENSIONS, Encoding, UnusableImage, largest_value, prepare

TARGET_SHARD_BYTES = 100_000_000
MIN_SHARDS = 8
"""Of a split with at least MIN_SPLIT samples: readers that hand out whole shards have some for eight workers then.
Our own divides samples, not shards."""
MIN_SPLIT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One planned sample.  Of the record it keeps the image's place (never written) and what is written."""

    key: str
    image: str
    """Path relative to the source's root, posix."""
    missing: bool
    patient: str
    """16 hex digits, or ""."""
    patient_number: int
    view: str
    labels: tuple[int, ...] | tuple[str, ...] | int
    span: tuple[int, int] | None = None
    """Where the image is in the file that `image` begins with (`image_files.read_image`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides about the bytes of a folder of shards; `digest` is its hash."""

    source: str
    task: str
    label_kind: str
    label_names: tuple[str, ...]
    licence: str
    salt_fingerprint: str
    root: Path
    extension: str
    encoding: Encoding
    views: tuple[str, ...]
    options: Mapping[str, Any]
    shard_size: Mapping[str, int]
    samples: Mapping[str, Sequence[Sample]]
    """split -> samples in the order of the shards."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of the table that gave no sample, by reason."""
    quarantine: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    """split -> entries of the index's quarantine that were found before: by the build that is resharded."""
    digest: str = field(default="")

    @property
    def encoder(self) -> dict[str, Any]:
        """The index's entry `encoder`; its range is 0 until that has been measured (`shard_range`)."""
        entry = self.encoding.describe(self.extension)
        if any(_is_dicom(sample.image) for samples in self.samples.values() for sample in samples):
            entry["dicom"] = f"pydicom {require_pydicom().__version__}"
        return entry

    def shards(self) -> list[tuple[str, str, int, int]]:
        """(split, file name, first row, end row) of every shard, in order."""
        found = []
        for split, samples in self.samples.items():
            size = self.shard_size[split]
            for number, start in enumerate(range(0, len(samples), size)):
                name = f"{split}-{number:06d}.tar"
                found.append((split, name, start, min(start + size, len(samples))))
        return found


class FirstRecords:
    """A source that gives the first `limit` records of each split of another one."""

    def __init__(self, source: SourceLike, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"--limit is {limit}; give the number of records of each split, 1 or more")
        self._source, self._limit = source, limit
        self.name, self.task, self.licence = source.name, source.task, source.licence
        self.root, self.label_names = Path(source.root), tuple(source.label_names)
        self.public = source.public
        self.label_kind, self.locate = source.label_kind, source.locate

    @property
    def left_out(self) -> Mapping[str, int]:
        """Of the whole source."""
        return self._source.left_out

    @property
    def notes(self) -> Sequence[str]:
        """Of the whole source."""
        return self._source.notes

    def listed(self) -> Iterator[Any]:
        """The same records in the order of the official table."""
        return self._first(self._source.listed())

    def __iter__(self) -> Iterator[Any]:
        return self._first(self._source)

    def _first(self, records: Iterable[Any]) -> Iterator[Any]:
        counts: Counter[str] = Counter()
        for record in records:
            counts[record.split] += 1
            if counts[record.split] <= self._limit:
                yield record


def plan_shards(
    source: SourceLike,
    salt: bytes,
    *,
    seed: int = 0,
    shard_size: int | Mapping[str, int] = 0,
    encoding: Encoding | None = None,
    allow_missing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the shards of an opened source.  Looks at names and sizes of image files and writes nothing.

    salt: makes keys and patient codes.  seed: of the shuffle.  shard_size: samples a shard, or {split: samples}; 0
    chooses about 100 MB a shard and at least 8 shards for a split of 64 samples or more.  allow_missing: records
    without an image file are planned, and quarantined later.  options: options of the source that decide about
    rows; they are recorded in the index.

    Raises ValueError if there are no records, two share a key, image files are missing, formats are mixed
    without `encoding.encode`, there is DICOM but no pydicom, or an option has no meaning.
    """
    encoding = replace(encoding or Encoding(), private=not source.public)
    given = dict(shard_size) if isinstance(shard_size, Mapping) else {}
    same = 0 if isinstance(shard_size, Mapping) else shard_size
    for name, value in (("--seed", seed), ("--shard-size", min([same, *given.values()]))):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    records = source.locate(list(source))
    if not records:
        raise ValueError(f"{source.root} has no records of {source.name} with these options; check --root")
    if any(_is_dicom(record.image) for record in records):
        require_pydicom()  # before all of them would be refused one by one
    identities = sample_keys_of(source.name, records, salt)
    sizes = check_images(source, records, allow_missing=allow_missing)
    extension = _extension(source.root, records, encoding)
    codes = [keys.patient_code(source.name, record.patient, salt) for record in records]
    numbers = patient_numbers(codes)
    by_split: dict[str, list[Sample]] = {}
    bytes_of: dict[str, list[int]] = {}
    for record, key, size, code in zip(records, identities, sizes, codes, strict=True):
        sample = Sample(
            key=key,
            image=record.image,
            missing=size < 0,
            patient=code,
            patient_number=numbers[code],
            view=record.view,
            labels=record.labels,
            span=record.span,
        )
        by_split.setdefault(record.split, []).append(sample)
        bytes_of.setdefault(record.split, []).append(size)
    splits = sorted(by_split, key=split_order)
    for split in splits:
        if all(sample.missing for sample in by_split[split]):
            raise ValueError(f"{source.root}: not one image of the split {split!r} is there; check --root")
    chosen = {
        split: given.get(split, same)
        or default_shard_size(Path(source.root), by_split[split], bytes_of[split], extension, encoding)
        for split in splits
    }
    recorded = {"seed": seed, "shard_size": chosen, **(options or {})}
    plan = Plan(
        source=source.name,
        task=source.task,
        label_kind=source.label_kind,
        label_names=tuple(source.label_names),
        licence=source.licence,
        salt_fingerprint=keys.fingerprint(salt),
        root=Path(source.root),
        extension=extension,
        encoding=encoding,
        views=tuple(sorted({record.view for record in records} - {""})),
        options=recorded,
        shard_size=chosen,
        left_out=dict(source.left_out),
        samples={split: [by_split[split][i] for i in shuffled(len(by_split[split]), seed, split)] for split in splits},
    )
    return with_digest(plan)


def with_digest(plan: Plan) -> Plan:
    """The same plan with its hash."""
    return replace(plan, digest=_digest(plan))


def shuffled(samples: int, seed: int, split: str) -> list[int]:
    """The recorded order of a split: int permutation of range(samples), from the seed and the split's name
    alone.

    The rank of each sample's 64-bit draw of PCG64 (ties, in practice none, by row).  numpy promises that
    this raw stream never changes, which it does not promise for Generator.permutation (NEP 19).
    """
    name = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big")
    draws = np.random.PCG64(np.random.SeedSequence([seed, name])).random_raw(samples)
    return np.argsort(draws, kind="stable").tolist()  # type: ignore[no-any-return]


def check_images(source: SourceLike, records: Sequence[RecordLike], *, allow_missing: bool = False) -> list[int]:
    """Bytes of each record's image, -1 where it is missing; ValueError if one is, unless `allow_missing`."""
    sizes = image_sizes(Path(source.root), records)
    missing = [row for row, size in enumerate(sizes) if size < 0]
    if missing and not allow_missing:
        row = missing[0]
        raise ValueError(
            f"{len(missing)} of {len(sizes)} images are missing; the first is {place_in_table(records[row], row)} of "
            f"{source.name} (split {records[row].split}): {Path(source.root) / records[row].image}; complete the "
            "data set, or give --allow-missing to leave them out"
        )
    return sizes


def _extension(root: Path, records: Sequence[RecordLike], encoding: Encoding) -> str:
    if encoding.encode:
        return encoding.encode
    counts = Counter(os.path.splitext(record.image)[1].lower().lstrip(".") for record in records)
    counts["jpg"] += counts.pop("jpeg", 0)
    found = sorted(name for name, number in counts.items() if number)
    if len(found) > 1:
        named = " and ".join(f"{counts[name]} {name or 'without extension'}" for name in found)
        raise ValueError(f"{root} mixes image formats ({named}): choose one by --encode jpg or --encode png")
    if found[0] not in KEPT_EXTENSIONS:
        raise ValueError(
            f"{root} has {found[0] or 'nameless'} images, which readers of shards don't read: "
            "convert them by --encode png or --encode jpg"
        )
    return found[0]


def _is_dicom(image: str) -> bool:
    """By its name, as far as that is known before files are opened."""
    return image.lower().endswith(".dcm")


def default_shard_size(
    root: Path, samples: Sequence[Sample], sizes: Sequence[int], extension: str, encoding: Encoding
) -> int:
    """Samples a shard of about 100 MB, from the bytes of each image (-1: missing) or, where images change, a trial."""
    present = [row for row, size in enumerate(sizes) if size >= 0]
    mean = sum(sizes[row] for row in present) / len(present)
    if encoding.size or encoding.encode or encoding.bit_depth:
        # what a re-encoded image weighs is known only from some of them
        chosen = [samples[present[i]] for i in sorted({round(i) for i in np.linspace(0, len(present) - 1, 8)})]
        trial = _trial(root, chosen, extension, encoding)
        mean = sum(trial) / len(trial) if trial else mean
    per_shard = max(1, int(TARGET_SHARD_BYTES / (mean + 2048)))  # tar headers and the label: about 2 kB a sample
    shards = -(-len(samples) // per_shard)
    if len(samples) >= MIN_SPLIT:
        shards = max(shards, MIN_SHARDS)
    return -(-len(samples) // shards)  # of about equal size: no last shard with two images


def _trial(root: Path, samples: Sequence[Sample], extension: str, encoding: Encoding) -> list[int]:
    """Bytes of some images as they would be stored, with the range of these alone where it is not known yet."""
    images, largest = [], 0
    for sample in samples:
        try:
            data = read_image(root, sample.image, sample.span)
            if encoding.bit_depth and not encoding.pixel_max:
                largest = max(largest, largest_value(data))
            images.append((sample, data))
        except UnusableImage:
            continue  # it will be quarantined, with its reason, when its shard is written
    if encoding.bit_depth and not encoding.pixel_max:
        encoding = replace(encoding, pixel_max=full_range(largest) if largest else WHITE16)
    found = []
    for sample, data in images:
        try:
            found.append(len(prepare(data, extension, encoding).data))
        except UnusableImage:
            continue
        except ValueError as error:
            raise ValueError(f"{root / sample.image}: {error}") from None
    return found


def _digest(plan: Plan) -> str:
    head = {
        "format_version": FORMAT_VERSION,
        "source": plan.source,
        "label_kind": plan.label_kind,
        "label_names": plan.label_names,
        "licence": plan.licence,
        "salt": plan.salt_fingerprint,
        "extension": plan.extension,
        "encoder": plan.encoder,
        "options": plan.options,
    }
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for split, samples in plan.samples.items():
        digest.update(f"\n{split}".encode())
        for sample in samples:
            row = (sample.key, sample.missing, sample.patient, sample.view, sample.labels)
            digest.update(f"\n{json.dumps(row)}".encode())
    return digest.hexdigest()
