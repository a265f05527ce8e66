"""Tars that others make: by webdataset's ShardWriter, and in the layout of img2dataset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from scaletransfer.index import ShardIndex, load_index
from scaletransfer.shard_reader import ShardReader, read_image
from scaletransfer.shards import shards_main

FINDINGS = ("Edema", "Effusion", "Hernia")
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(number: int, extension: str = "jpg", mode: str = "RGB") -> bytes:
    """The file of a picture of some 40 pixels that differs from that of every other number."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(36, 48, 2))
    if mode == "I;16":
        pixels = rng.integers(0, 4096, (height, width)).astype(np.uint16)
    else:
        shape = (height, width) if mode == "L" else (height, width, 3)
        ramp = np.linspace(0, 120, width)[None, :, None].reshape((1, width) + (1,) * (len(shape) - 2))
        pixels = (ramp + rng.integers(0, 130, shape)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, FORMATS[extension])
    return buffer.getvalue()


def states(number: int) -> list[int]:
    """Of FINDINGS, for the picture of this number."""
    return [number % 2, 1 - number % 2, (1, 0, -1, -2)[number % 4]]


def write_cls(folder: Path, split: str, count: int, *, start: int = 0, extensions: Sequence[str] = ("jpg",)) -> Path:
    """Tars `<split>-NNNNNN.tar` of five samples with .cls (number % 3), by ShardWriter; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=5, verbose=0) as sink:
        for number in range(start, start + count):
            extension = extensions[number % len(extensions)]
            sink.write({"__key__": f"img{number:04d}", extension: picture(number, extension), "cls": number % 3})
    return folder


def write_json(folder: Path, split: str, count: int, *, start: int = 0, field: str = "findings") -> Path:
    """Tars of six grey samples with the states in a .json, by ShardWriter; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=6, verbose=0) as sink:
        for number in range(start, start + count):
            label = {field: dict(zip(FINDINGS, states(number), strict=True)), "age": number}
            sink.write({"__key__": f"film/{number:04d}", "png": picture(number, "png", "L"), "json": label})
    return folder


def write_img2dataset(folder: Path, shards: int = 3, each: int = 4) -> Path:
    """The layout that img2dataset documents (output_format webdataset), without the parquet; returns the folder.

    The .json has the class as `label`, a column that was kept by --save_additional_columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(each):
                key, number = f"{shard:05d}{row:04d}", shard * each + row
                data = picture(number)
                about: dict[str, Any] = {
                    "caption": f"a drawn picture {number}",
                    "url": f"https://images.example/{number}.jpg",
                    "label": number % 3,
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 40,
                    "height": 40,
                    "original_width": 40,
                    "original_height": 40,
                    "exif": "{}",
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                members = {"jpg": data, "txt": about["caption"].encode(), "json": json.dumps(about, indent=4).encode()}
                for extension, content in members.items():
                    add(tar, f"{key}.{extension}", content)
        counts = {"count": each, "successes": each, "failed_to_download": 0, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(counts, indent=4))
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A plain file as the next member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of plain files; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            add(tar, name, content)
    return path.parent


def index_of(folder: Path, *options: str) -> ShardIndex:
    """The index that the command writes into `folder`."""
    assert shards_main(["index", str(folder), "--public", *options]) == 0
    return load_index(folder)


def refused(folder: Path, *options: str) -> str:
    """The sentence by which the command refuses."""
    with pytest.raises(ValueError) as error:
        shards_main(["index", str(folder), "--public", *options])
    text = str(error.value)
    assert "\n" not in text and not (folder / "index.json").exists()
    return text


def images_of(index: ShardIndex, split: str = "train") -> list[bytes]:
    reader = ShardReader()
    return [read_image(reader, index, split, row) for row in range(index.splits[split].samples)]
