"""A tiny COVIDx-CXR2 in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SOURCES = ("cohen", "rsna", "ricord", "sirm")


def write_covidx(root: Path, *, seed: int = 0, train: int = 24, test: int = 8, shared: int = 0, side: int = 40) -> Path:
    """Write train.txt, test.txt, train/ and test/ into `root`, and return it.

    train, test: images; about two images a patient, half of them positive. Ids are unique in a source only: the same
    numbers occur in several. shared: patients of train.txt that are in test.txt as well. side: of the images in pixels,
    0 for none. Images are grey or colour, png, jpg or jpeg, and one name holds a blank.
    """
    rng = np.random.default_rng(seed)
    for number, (split, count) in enumerate((("train", train), ("test", test))):
        (root / split).mkdir(parents=True)
        lines = []
        for image in range(count):
            positive, person = bool(image % 2), image // 2
            source = SOURCES[2 * positive + (person // 2) % 2]
            patient = person if split == "train" or person < shared else 1000 + person
            suffix = (".png", ".jpg", ".jpeg")[image % 3]
            name = f"COVID ({image}){suffix}" if image == 3 else f"{source}-{patient:05d}-{image}{suffix}"
            lines.append(f"{patient} {name} {'positive' if positive else 'negative'} {source}\n")
            if side:
                shape = (side, side + 2, 3) if image % 3 == 1 else (side, side + 2)
                pixels = rng.integers(0, 150, shape) + 80 * positive + number
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name)
        (root / f"{split}.txt").write_text("".join(lines))
    return root
