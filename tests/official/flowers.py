"""A tiny Oxford 102 Flowers in its official layout, and in that of the fast.ai archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSES = 102


def write_flowers(
    root: Path, *, seed: int = 0, form: str = "lists", folder: str = "oxford-102-flowers", test: int = 2, side: int = 32
) -> Path:
    """Write jpg/ and the lists into root/folder ("." is root itself), and return that folder.

    form: "lists" (train.txt, valid.txt, test.txt; labels from 0), "matlab" (setid.mat, imagelabels.mat; labels from 1),
    or "both". Each of the 102 classes has one training, one validation and `test` test images; side: of the images in
    pixels, 0 for none.
    """
    rng = np.random.default_rng(seed)
    where = root / folder
    (where / "jpg").mkdir(parents=True, exist_ok=True)
    splits = ["train", "valid", *["test"] * test]
    entries = [(label, split) for label in range(CLASSES) for split in splits]
    order = rng.permutation(len(entries))
    numbered = {number: entries[at] for number, at in enumerate(order.tolist(), 1)}
    for number, (label, _) in numbered.items():
        if side:
            pixels = rng.integers(0, 128, (side, side + 4, 3)) + label
            Image.fromarray(pixels.astype(np.uint8)).save(where / f"jpg/image_{number:05d}.jpg", quality=80)
    lists = {
        split: rng.permutation([n for n, entry in numbered.items() if entry[1] == split]).tolist()
        for split in ("train", "valid", "test")
    }
    if form in ("lists", "both"):
        for split, numbers in lists.items():
            lines = [f"jpg/image_{number:05d}.jpg {numbered[number][0]}\n" for number in numbers]
            (where / f"{split}.txt").write_text("".join(lines))
    if form in ("matlab", "both"):
        labels = np.array([[numbered[number][0] + 1 for number in sorted(numbered)]], np.uint8)
        savemat(where / "imagelabels.mat", {"labels": labels})
        ids = {"trnid": "train", "valid": "valid", "tstid": "test"}
        savemat(where / "setid.mat", {name: np.array([lists[split]], np.uint16) for name, split in ids.items()})
    return where
