"""Draw the tiny sample set of the repository: python tools/make_sample_shards.py shards/sample

Twelve grey 64x64 JPEGs, nine for training and three for validation, of made-up patients with made-up
labels, in the layout of CheXpert; then the ordinary shards of them, three images a shard, with the public
salt.  No row of the real data set is in it.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scaletransfer.cli import run_command
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.labels import CHEXPERT_COLUMNS
from scaletransfer.shards import build, describe, plan_shards
from scaletransfer.sources.chexpert import CheXpert

CELLS = ("1.0", "0.0", "-1.0", "")


class Drawn(CheXpert):
    """The layout of CheXpert, of which nothing else is here."""

    licence = "MIT; drawn by tools/make_sample_shards.py, not data of patients"


def main(argv: Sequence[str]) -> int:
    """Write the sample set; 0.  Raises ValueError if the folder holds other shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the shards")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are there already")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        plan = plan_shards(Drawn(folder), PUBLIC_SALT, shard_size=3, options={"views": ["AP", "PA"]})
        print(describe(build(plan, options.out, overwrite=options.overwrite).index))
    return 0


def draw(root: Path, images: int = 9, validation: int = 3) -> None:
    """Draw `images` training and `validation` images, two a patient, and the tables, into `root`."""
    rng = np.random.default_rng(2106_00116)
    number = 0
    for split, count in (("train", images), ("valid", validation)):
        rows = []
        for row in range(count):
            number += 1
            patient = number // 2 + (50 if split == "valid" else 1)  # none is in both splits
            name = f"{split}/patient{patient:05d}/study{row}/view1_frontal.jpg"
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _picture(rng).save(path, quality=80)
            cells = ["" if row == 0 else CELLS[rng.integers(4)] for _ in CHEXPERT_COLUMNS]  # row 0: nothing known
            rows.append([f"CheXpert-v1.0/{name}", "Unknown", "0", "Frontal", ("PA", "AP")[row % 2], *cells])
        with open(root / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_COLUMNS])
            writer.writerows(rows)


def _picture(rng: np.random.Generator) -> Image.Image:
    """Two dark ovals on a bright field: what a chest radiograph looks like from very far away."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    pixels = 170 - 60 * x**2 - 40 * y**2
    for side in (-1, 1):
        centre_x, centre_y = side * rng.uniform(0.38, 0.48), rng.uniform(-0.15, 0.05)
        width, height = rng.uniform(0.24, 0.32), rng.uniform(0.55, 0.7)
        oval = ((x - centre_x) / width) ** 2 + ((y - centre_y) / height) ** 2
        pixels = pixels - rng.uniform(70, 110) / (1 + np.exp(8 * (oval - 1)))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
