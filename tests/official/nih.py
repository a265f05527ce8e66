"""A tiny NIH ChestX-ray14 in its official layout."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

FINDINGS = [
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
]
# The commas inside of the brackets are not quoted in the official file, so that it has 11 columns.
HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
    "Height]",
    "OriginalImagePixelSpacing[x",
    "y]",
]


def write_nih(
    root: Path,
    *,
    seed: int = 0,
    patients: int = 24,
    test_patients: int = 6,
    folder: str = "images",
    lists: bool = True,
    pixels: int = 40,
) -> Path:
    """Write table, lists and images into `root`, and return it.

    patients: of train_val_list.txt, with one to three images each; test_patients: of test_list.txt. folder: where the
    images go, relative to root. pixels: the images' side, 0 for none.
    The patients' findings differ enough that every finding occurs among 20 patients.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[str]] = []
    named: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    (root / folder).mkdir(parents=True, exist_ok=True)
    # Official patients of both lists are interleaved.
    tested = set(rng.choice(patients + test_patients, test_patients, replace=False).tolist())
    for patient in range(patients + test_patients):
        for follow_up in range(int(rng.integers(1, 4))):
            image = f"{patient + 1:08d}_{follow_up:03d}.png"
            shown = {FINDINGS[patient % len(FINDINGS)], *rng.choice(FINDINGS, int(rng.integers(0, 3))).tolist()}
            healthy = follow_up == 1
            cell = "No Finding" if healthy else "|".join(sorted(shown))
            sex, view = "MF"[patient % 2], "PA" if rng.random() < 0.6 else "AP"
            rows.append(
                [image, cell, str(follow_up), str(patient + 1), "57", sex, view, "2682", "2749", "0.143", "0.143"]
            )
            named["test_list.txt" if patient in tested else "train_val_list.txt"].append(image)
            if pixels:
                drawn = rng.integers(0, 256, (pixels, pixels), dtype=np.uint8)
                Image.fromarray(drawn).save(root / folder / image)
    with open(root / "Data_Entry_2017_v2020.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([HEADER, *rows])
    if lists:
        for name, images in named.items():
            (root / name).write_text("\n".join(images))  # the official lists end without a line break
    return root
