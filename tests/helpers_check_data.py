"""Shards of pictures that a test gives, for the checks of check-data."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from helpers_data import SALT
from PIL import Image

from scaletransfer.shards import Encoding, build, plan_shards
from scaletransfer.sources import Record
from scaletransfer.synthetic_chexpert import synthetic_chexpert


@dataclass
class Pictures:
    """A source of images that are written to `root`, for `plan_shards`."""

    root: Path
    label_names: tuple[str, ...] = ("A", "B")
    label_kind: str = "states"
    name: str = "pictures"
    licence: str = "test"
    public: bool = False
    records: list[Record] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def task(self) -> str:
        return "multiclass" if self.label_kind == "classes" else "multilabel"

    def add(
        self,
        image: Image.Image | bytes,
        *,
        split: str = "train",
        patient: str = "",
        labels: Any = None,
        view: str = "",
        suffix: str = "png",
    ) -> str:
        """Add a record; returns its source id."""
        name = f"secret-{self.root.name}-{len(self.records)}.{suffix}"
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(image if isinstance(image, bytes) else encoded(image, suffix))
        if labels is None:
            labels = {"classes": 0, "tokens": (), "states": (0,) * len(self.label_names)}[self.label_kind]
        record = Record(source_id=name, split=split, patient=patient, image=name, labels=labels, view=view)
        self.records.append(record)
        return name

    def __iter__(self):
        return iter(self.records)

    def listed(self):
        return iter(self.records)

    def locate(self, records: Sequence[Record]) -> Sequence[Record]:
        return records

    def shards(self, folder: Path, *, salt: bytes = SALT) -> Path:
        """Build shards of the records so far, three images a shard."""
        build(plan_shards(self, salt, shard_size=3, encoding=Encoding()), folder)
        return folder


def encoded(picture: Image.Image, suffix: str = "png", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix], **options)
    return buffer.getvalue()


def drawing(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A smooth grey picture unlike that of every other seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn_xrays(folder: Path, rows: int, *, seed: int = 0, size: int = 128) -> list[tuple[Image.Image, str]]:
    """(picture, view) of `rows` drawn X-rays, several of each patient; a lateral one has the view L."""
    root = folder / "CheXpert-v1.0"
    synthetic_chexpert(root, rows=rows, seed=seed, size=size, table="drawn")
    found = []
    for split in ("train", "valid"):
        for row in rows_of(root / f"{split}.csv"):
            with Image.open(root / row["Path"].partition("/")[2]) as picture:
                found.append((picture.convert("L"), row["AP/PA"] or "L"))
    return found
