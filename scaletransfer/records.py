"""What the index and the shard writer ask of a source's records: keys, file sizes, a look at headers.

The protocols are met by `scaletransfer.sources`, which this module does not import.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from scaletransfer import keys as sample_keys
from scaletransfer.dicom import HEAD, DicomError, PydicomMissing, is_dicom, read_header
from scaletransfer.image_files import INSIDE, image_size, open_image, read_image
from scaletransfer.pixel_range import WHITE16, declared_white, full_range

_PROBE_THREADS = 16
_RANGE_PROBES = 64  # 16-bit images that are decoded for the range that they use
_DICOM_HEAD = 64 * 1024  # bytes in which the header of nearly every DICOM file ends


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """What every image of the index has in common."""

    extension: str
    """Member extension without the dot: jpg, png or webp; "" where an in-memory index mixes them."""
    size: int
    """Longest allowed short side in pixels that the writer scaled down to; 0 = original size."""
    channels: int
    """1 if every image is single-channel, else 3 (grey images among them decode to 3 equal channels)."""
    bit_depth: int
    """8 or 16 bits a channel."""
    pixel_max: int
    """Of shards, the largest pixel value found, or the white that an image's file declares (an sBIT chunk of PNG,
    DICOM). In an index made in memory, 2^b - 1 with b the bits that some of the images use."""
    deep_max: int = 0
    """In an index made in memory of an 8-bit set with 16-bit images among it: `pixel_max` of those; else 0."""

    @property
    def deep_white(self) -> int:
        """The value of its 16-bit images that stands for white, 2^b - 1: 4095 for 12 bits in a file of 16."""
        largest = self.deep_max or (self.pixel_max if self.bit_depth == 16 else 0)
        return full_range(largest) if largest else WHITE16

    def white(self, depth: int) -> int:
        """The value that stands for white in images decoded to `depth` bits, 8 or 16."""
        if depth == 8:
            return 255
        return self.deep_white if self.bit_depth == 16 else WHITE16


class RecordLike(Protocol):
    """What `from_records` needs of a record; `sources.Record` is one."""

    @property
    def source_id(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def labels(self) -> tuple[int, ...] | tuple[str, ...] | int: ...
    @property
    def view(self) -> str: ...
    @property
    def span(self) -> tuple[int, int] | None: ...
    @property
    def line(self) -> int: ...


class SourceLike(Protocol):
    """What `from_records` needs of a source; `sources.Source` is one."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def label_names(self) -> tuple[str, ...]: ...
    @property
    def label_kind(self) -> str: ...
    @property
    def public(self) -> bool: ...
    @property
    def left_out(self) -> Mapping[str, int]: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[RecordLike]: ...
    def listed(self) -> Iterator[RecordLike]: ...
    def locate(self, records: Sequence[Any]) -> Sequence[RecordLike]: ...


def sample_keys_of(source: str, records: Sequence[RecordLike], salt: bytes) -> list[str]:
    """The key of every record; ValueError, naming both, if two records have the same one."""
    seen: dict[str, str] = {}
    for record in records:
        key = sample_keys.key(source, record.source_id, salt)
        if key in seen:
            raise ValueError(
                f"two records of {source} have the key {key}: {seen[key]!r} and {record.source_id!r}; "
                "take one out of the table, or give another salt by --salt-file"
            )
        seen[key] = record.source_id
    return list(seen)


def key_number(key: str) -> int:
    """The 16 hex digits of a key as an integer (table field `key`)."""
    return int(key[-16:], 16)


def image_sizes(root: Path, records: Sequence[RecordLike]) -> list[int]:
    """Bytes of every record's image, -1 where there is none.  ValueError if one leaves the root."""
    return [image_size(root, record.image, record.span) for record in records]


def place_in_table(record: RecordLike, row: int) -> str:
    """Where a record stands, for error sentences: its number, and its line in the official table if it has one."""
    return f"row {row + 1}" + (f" (line {record.line} of its table)" if record.line else "")


def probe_images(root: Path, records: Sequence[RecordLike], probes: int = 2048) -> ImageInfo:
    """Image settings from the headers of up to `probes` images, spread evenly over `records`.

    One colour image makes the set a colour set; it is a 16-bit set if all are grey and one of them has 16 bits.  Up
    to 64 of those with 16 bits are decoded for the range that they use; a larger value turns up as an error when its
    image is decoded.  Raises ValueError, naming the first such file, if one is not an image, and where DICOM files
    need pydicom.
    """
    from PIL import Image  # lazily: reading an index must not need Pillow

    step = max(1.0, len(records) / probes)
    chosen = [records[int(number * step)] for number in range(min(len(records), probes))]
    Image.init()  # not in several threads at once
    # Threads do not hasten Pillow, but hide how long a network file system takes to open a file.
    with warnings.catch_warnings(), ThreadPoolExecutor(_PROBE_THREADS) as pool:
        warnings.simplefilter("ignore")  # half of Pillow's limit of pixels gives a warning only
        modes = list(pool.map(lambda record: _mode(root, record), chosen))
        if "" in modes:
            where = f"{root / chosen[modes.index('')].image.replace(INSIDE, ': ')}"
            raise ValueError(f"{where} is not an image that can be read; replace it")
        deep = [record for record, mode in zip(chosen, modes, strict=True) if mode.startswith("I")]
        step = max(1.0, len(deep) / _RANGE_PROBES)
        deep = [deep[int(number * step)] for number in range(min(len(deep), _RANGE_PROBES))]
        largest = max(pool.map(lambda record: _white(root, record), deep), default=0)
    suffixes = {Path(record.image).suffix.lower().replace("jpeg", "jpg")[1:] for record in records}
    grey = all(mode in ("1", "L", "LA") or mode.startswith("I") for mode in modes)
    white = full_range(largest) if largest else WHITE16
    depth = 16 if grey and deep else 8
    return ImageInfo(
        extension=suffixes.pop() if len(suffixes) == 1 else "",
        size=0,
        channels=1 if grey else 3,
        bit_depth=depth,
        pixel_max=white if depth == 16 else 255,
        deep_max=white if deep and depth == 8 else 0,
    )


def _mode(root: Path, record: RecordLike) -> str:
    """Pillow's name of the pixel format, of DICOM that of the picture which it becomes; "" for what is no image."""
    from PIL import Image

    try:
        with open_image(root, record.image, record.span) as file:
            head = file.read(HEAD)
            if is_dicom(head):
                return "I;16" if _dicom_bits(head + file.read(_DICOM_HEAD), file) == 16 else "L"
            file.seek(0)
            with Image.open(file) as picture:
                return picture.mode
    except (MemoryError, PydicomMissing):
        raise
    except Exception:  # Pillow's readers of headers raise OSError, SyntaxError, struct.error, ...
        return ""


def _dicom_bits(head: bytes, rest: BinaryIO) -> int:
    try:
        return read_header(head)[2]
    except DicomError:
        return read_header(head + rest.read())[2]


def _white(root: Path, record: RecordLike) -> int:
    """The white that a 16-bit image declares, or the largest value in it; 0 where it cannot be decoded."""
    from PIL import Image

    try:
        data = read_image(root, record.image, record.span)
        if is_dicom(data):
            return WHITE16
        with Image.open(io.BytesIO(data)) as picture:
            values = np.asarray(picture)
        return declared_white(data, values) or min(WHITE16, max(0, int(values.max())))
    except MemoryError:
        raise
    except Exception:  # which image, and why, is said where all of them are decoded
        return 0
