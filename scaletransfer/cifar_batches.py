"""The batch files of CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html), in a folder or still in
the official archive: rows of 3,072 bytes, 32 x 32 of red, then green, then blue.

They are pickles of Python 2; `plain_pickle` reads them without unpickling.
"""

from __future__ import annotations

import io
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer.plain_pickle import UnsafePickle, load_plain
from scaletransfer.tars import packed_files

ROW_BYTES = 3072
"""Of one image; also what `image_files.image_size` says of its PNG, which is about a hundred bytes longer."""
BATCHES_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
_FILES = {
    "cifar-10-batches-py": (*BATCHES_10, "test_batch", "batches.meta"),
    "cifar-100-python": ("train", "test", "meta"),
}
_ARCHIVES = {"cifar-10-python.tar.gz": "cifar-10-batches-py", "cifar-100-python.tar.gz": "cifar-100-python"}
_NAMES = frozenset(name for names in _FILES.values() for name in names)
_ROW = re.compile(r"(0|[1-9][0-9]{0,8})\.png")
_LARGEST = 1 << 28
"""Bytes of one file; CIFAR-100's `train`, the largest, has 155 million."""
_MEND = "nothing of it was run; download the archive again"
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one of the files holds."""

    values: dict[str, Any]
    """Its entries by name, as plain values (`plain_pickle.load_plain`)."""

    def pixels(self, where: str) -> NDArray[np.uint8]:
        """uint8 [n, 3072]; ValueError, naming `where`, if it has no such array."""
        data = self.values.get("data")
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != ROW_BYTES:
            shape = list(data.shape) if isinstance(data, np.ndarray) else "missing"
            raise ValueError(f"{where}: 'data' must be bytes in the shape [n, {ROW_BYTES}], not {shape}; {_MEND}.")
        return data


def is_row(image: str) -> bool:
    """Whether `image` (as in `sources.Record.image`) names a row of a batch:
    "cifar-10-batches-py/data_batch_1//17.png" or "cifar-10-python.tar.gz//cifar-10-batches-py/data_batch_1//17.png"."""
    parts = image.split("//")
    if not _ROW.fullmatch(parts[-1]):
        return False
    file = PurePosixPath(parts[0]).name
    return (len(parts) == 2 and file in _NAMES) or (len(parts) == 3 and file in _ARCHIVES)


def read_row(root: Path, image: str) -> bytes:
    """The image of a row (`is_row`) as a PNG, 32 x 32 RGB, the same bytes each time.

    Raises FileNotFoundError where there is no such file, batch or row, ValueError as `read_batch` does.
    """
    *place, row = image.split("//")
    match = _ROW.fullmatch(row)
    assert match, "a row is named <number>.png"
    file = root / place[0]
    batch = read_batch(file, place[1] if len(place) == 2 else "")
    pixels = batch.pixels(f"{root}/{'//'.join(place)}")
    if int(match[1]) >= len(pixels):
        raise FileNotFoundError(f"{root}/{'//'.join(place)} has {len(pixels)} images, so none of the number {match[1]}")
    return _png(pixels[int(match[1])])


def read_batch(file: Path, member: str = "") -> Batch:
    """The content of the batch file `file`, or of `member` of the archive `file`; kept for the next call.

    Raises FileNotFoundError where it is missing, ValueError, naming the file, if it can't be read or asks for more than
    plain values and arrays of bytes.
    """
    status = os.stat(file)
    # Several threads ask at once; one of them reads.
    with _lock:
        if not member:
            return _loose(str(file), status.st_size, status.st_mtime_ns)
        batches = _packed(str(file), status.st_size, status.st_mtime_ns)
    if member not in batches:
        raise FileNotFoundError(f"{file} has no member {member}")
    return batches[member]


@lru_cache(maxsize=8)
def _loose(file: str, size: int, changed: int) -> Batch:
    """`size` and `changed` stand for the file's content."""
    if size > _LARGEST:
        raise ValueError(f"{file} has {size} bytes; it is no batch of CIFAR.")
    return _parsed(Path(file).read_bytes(), file)


@lru_cache(maxsize=2)
def _packed(file: str, size: int, changed: int) -> dict[str, Batch]:
    """All batches of an archive, which has to be unpacked from its beginning for each of them."""
    folder = _ARCHIVES[Path(file).name]
    files = packed_files(Path(file), [f"{folder}/{name}" for name in _FILES[folder]], _LARGEST)
    return {name: _parsed(data, f"{file}//{name}") for name, data in files}


def _parsed(data: bytes, where: str) -> Batch:
    try:
        values = load_plain(data)
    except UnsafePickle as error:
        raise ValueError(f"{where} is no batch of CIFAR: {error}; {_MEND}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no batch of CIFAR: it holds a {type(values).__name__}; {_MEND}.")
    return Batch({key.decode("latin-1") if isinstance(key, bytes) else str(key): v for key, v in values.items()})


def _png(row: NDArray[np.uint8]) -> bytes:
    from PIL import Image  # lazily: reading an index must not need Pillow

    buffer = io.BytesIO()
    # Not compressed: releases of zlib compress to different bytes, and 3,072 of them are hardly worth it.
    Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
