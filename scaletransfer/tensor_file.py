"""Writes a safetensors file from front to back, so that no tensor need be in memory whole.

The library's own writers want every tensor at once. The format (https://huggingface.co/docs/safetensors): 8 bytes,
the header's length, little-endian; the header, JSON, padded with spaces; then the tensors' bytes without gaps, at the
offsets that the header names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

SIZES = {"F32": 4, "U8": 1}
"""Bytes an element of the types that we write."""
_ALIGNMENT = 64
"""Of the first tensor in the file: the longest that a CPU reads at once."""

Layout = Mapping[str, tuple[str, Sequence[int]]]
"""{name: (type, shape)}, in the order of the file."""


def write_tensors(path: Path, layout: Layout, data: Iterable[np.ndarray]) -> str:
    """Write the file `path`, synced to the disk; the sha256 of its bytes.

    Args:
        layout: what the header says; types with wide elements first, so that each tensor is aligned.
        data: C-contiguous arrays, in order, cut in any way; together exactly the bytes that the layout asks for.

    Raises:
        OSError: disk full or not writable. What was written stays, and is no safetensors file.
    """
    header, total = _header(layout)
    digest = hashlib.sha256(header)
    with path.open("wb", buffering=0) as file:
        _write(file.fileno(), memoryview(header))
        for array in data:
            piece = array.reshape(-1).view(np.uint8).data
            digest.update(piece)
            _write(file.fileno(), piece)
            total -= len(piece)
        assert total == 0, f"{path}: {total} bytes are missing"
        os.fsync(file.fileno())
    return digest.hexdigest()


def locate(path: Path) -> dict[str, tuple[str, list[int], int]]:
    """{name: (type, shape, place of the tensor's first byte in the file)} of a file that the library has opened."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: (entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(layout: Layout) -> tuple[bytes, int]:
    """The file's first bytes, and how many follow them."""
    entries, offset = {}, 0
    for name, (kind, shape) in layout.items():
        end = offset + SIZES[kind] * math.prod(shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offset


def _write(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]  # a call writes at most 2 GiB, and less where the disk gets full
