"""Tiny CIFAR sets in the official form: pickles as Python 2 wrote them (protocol 2), in a folder or its archive."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_cifar10(root: Path, *, seed: int = 0, train: int = 20, test: int = 20, archive: bool = True) -> Path:
    """`train` images in each of the five batches, `test` in the test batch; returns what --root takes.

    archive: cifar-10-python.tar.gz, else the folder cifar-10-batches-py that is in it.
    """
    rng = np.random.default_rng(seed)
    files = {}
    for number in range(1, 6):
        files[f"data_batch_{number}"] = _batch(rng, f"training batch {number} of 5", train)
    files["test_batch"] = _batch(rng, "testing batch 1 of 1", test)
    meta = {"num_cases_per_batch": train, "label_names": list(CLASSES), "num_vis": 3072}
    files["batches.meta"] = pickle2(meta)
    return store(root, "cifar-10-batches-py", "cifar-10-python.tar.gz", files, archive)


def _batch(rng: np.random.Generator, label: str, rows: int) -> bytes:
    # every class in turn, so that each split has some of each
    labels = [row % 10 for row in range(rows)]
    names = [f"{CLASSES[number]}_s_{rng.integers(2000):06d}.png" for number in labels]
    return pickle2({"batch_label": label, "labels": labels, "data": draw_rows(rng, rows), "filenames": names})


def draw_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    """uint8 [rows, 3072]: pictures that differ."""
    ramp = np.arange(3072) % 32 * 4
    return (ramp + rng.integers(0, 120, (rows, 3072))).astype(np.uint8)


def store(root: Path, folder: str, archive: str, files: Mapping[str, bytes], packed: bool) -> Path:
    """Write `files` of `folder` into `root`, or into an archive there."""
    root.mkdir(parents=True, exist_ok=True)
    if not packed:
        (root / folder).mkdir()
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
        return root
    with tarfile.open(root / archive, "w:gz", compresslevel=1) as tar:
        top = tarfile.TarInfo(f"{folder}/")
        top.type, top.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(top)
        for name, data in {**files, "readme.html": b"<html></html>"}.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


def pickle2(value: object) -> bytes:
    """A pickle of protocol 2 as Python 2 and numpy 1 wrote it: text as byte strings, arrays by _reconstruct."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, str):
        data = value.encode("latin-1")
        short = len(data) < 256
        return (b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))) + data
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_pickled(key) + _pickled(entry) for key, entry in value.items()) + b"u"
    assert isinstance(value, Sequence)
    return b"](" + b"".join(_pickled(entry) for entry in value) + b"e"


def _array(value: np.ndarray) -> bytes:
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(_pickled(int(side)) for side in value.shape) + (b"\x85", b"\x86", b"\x87")[value.ndim - 1]
    data = value.tobytes()
    return empty + b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb"
