"""Small data sets that tests draw for themselves, in the layouts that the sources read."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scaletransfer.labels import CHEXPERT_COLUMNS

SALT = b"a salt for tests only, 32 bytes."
HEADER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_COLUMNS)
CELLS = {1: "1.0", 0: "0.0", -1: "-1.0", -2: ""}


def draw_image(path: Path, seed: int, *, width: int = 48, height: int = 40, mode: str = "L") -> None:
    """Write a small picture that differs from that of every other seed; the suffix is its format."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        pixels = rng.integers(0, 65536, (height, width), dtype=np.uint16)
    else:
        shape = (height, width) if mode == "L" else (height, width, 3)
        ramp = np.linspace(0, 120, width)[None, :, None].reshape((1, width) + (1,) * (len(shape) - 2))
        pixels = (ramp + rng.integers(0, 130, shape)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 90} if path.suffix.lower().startswith(".jp") else {}))


def make_chexpert(
    root: Path,
    *,
    rows: int = 24,
    valid: int = 8,
    seed: int = 0,
    labels: Sequence[Mapping[str, int]] | None = None,
    laterals: bool = True,
    folder: str = "CheXpert-v1.0",
    images: bool = True,
    suffix: str = ".jpg",
) -> Path:
    """Draw a CheXpert tree (train.csv, valid.csv, JPEGs) into `root`, which --root takes; returns it.

    Patients have up to three images; sizes vary; views are PA, AP and, in every seventh row, lateral.
    `labels` gives {official column: state} of the training rows (absent columns: not mentioned), else all
    four states are drawn.  `rows` and `valid` count rows of the tables, laterals included.
    """
    rng = np.random.default_rng(seed)
    patient = 0
    for split, count in (("train", rows), ("valid", valid)):
        lines = []
        left, study = 0, 0
        for row in range(count):
            if not left:
                patient, left, study = patient + 1, int(rng.integers(1, 4)), 0
            left, study = left - 1, study + 1
            lateral = laterals and row % 7 == 6
            side = "lateral" if lateral else "frontal"
            path = f"{split}/patient{patient:05d}/study{study}/view1_{side}{suffix}"
            if labels is not None and split == "train":
                states = [labels[row].get(column, -2) for column in CHEXPERT_COLUMNS]
            else:
                states = rng.choice([1, 0, -1, -2], len(CHEXPERT_COLUMNS), p=[0.3, 0.2, 0.1, 0.4]).tolist()
            view = "" if lateral else ("PA" if rng.integers(2) else "AP")
            front = [f"{folder}/{path}", "Female" if patient % 2 else "Male", str(20 + patient % 70)]
            lines.append([*front, side.capitalize(), view, *(CELLS[state] for state in states)])
            if images:
                width, height = (int(side) for side in rng.integers(40, 64, 2))
                draw_image(root / path, seed * 1_000_003 + patient * 7 + study, width=width, height=height)
        if count:
            root.mkdir(parents=True, exist_ok=True)
            with open(root / f"{split}.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([HEADER, *lines])
    return root


def make_image_folder(
    root: Path,
    *,
    classes: Sequence[str] = ("cat", "dog", "emu"),
    per_class: int = 4,
    splits: Sequence[str] = ("train", "val"),
    suffix: str = ".jpg",
    mode: str = "RGB",
    seed: int = 0,
) -> Path:
    """Draw root/<split>/<class>/img_<n><suffix>; returns `root`."""
    number = seed * 1_000_003
    for split in splits:
        for name in classes:
            for image in range(per_class):
                number += 1
                draw_image(root / split / name / f"img_{image}{suffix}", number, mode=mode)
    return root
