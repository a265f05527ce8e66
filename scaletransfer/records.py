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
from typing import Any, Protocol

from scaletransfer import keys as sample_keys
from scaletransfer.image_files import INSIDE, image_size, read_image

_PROBE_THREADS = 16


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
    """Largest pixel value observed; 2**bit_depth - 1 in an index made in memory."""


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


def probe_images(root: Path, records: Sequence[RecordLike], probes: int = 2048) -> ImageInfo:
    """Image settings from the headers of up to `probes` images, spread evenly over `records`.

    One colour image makes the set a colour set; it is a 16-bit set if all are grey and one of them has 16 bits.
    Raises ValueError, naming the first such file, if one is not an image.
    """
    from PIL import Image  # lazily: reading an index must not need Pillow

    def mode(record: RecordLike) -> str:
        """Pillow's name of the pixel format, "" where the file is not an image."""
        try:
            place: Any = root / record.image
            if INSIDE in record.image:
                place = io.BytesIO(read_image(root, record.image, record.span))
            with Image.open(place) as picture:
                return picture.mode
        except MemoryError:
            raise
        except Exception:  # Pillow's readers of headers raise OSError, SyntaxError, struct.error, ...
            return ""

    step = max(1.0, len(records) / probes)
    chosen = [records[int(number * step)] for number in range(min(len(records), probes))]
    Image.init()  # not in several threads at once
    # Threads do not hasten Pillow, but hide how long a network file system takes to open a file.
    with warnings.catch_warnings(), ThreadPoolExecutor(_PROBE_THREADS) as pool:
        warnings.simplefilter("ignore")  # half of Pillow's limit of pixels gives a warning only
        modes = list(pool.map(mode, chosen))
    if "" in modes:
        raise ValueError(f"{root / chosen[modes.index('')].image} is not an image that can be read; replace it")
    suffixes = {Path(record.image).suffix.lower().replace("jpeg", "jpg")[1:] for record in records}
    grey = all(mode in ("1", "L", "LA") or mode.startswith("I") for mode in modes)
    depth = 16 if grey and any(mode.startswith("I") for mode in modes) else 8
    return ImageInfo(
        extension=suffixes.pop() if len(suffixes) == 1 else "",
        size=0,
        channels=1 if grey else 3,
        bit_depth=depth,
        pixel_max=2**depth - 1,
    )
