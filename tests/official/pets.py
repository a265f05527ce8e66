"""A tiny Oxford-IIIT Pets in its official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CATS = (
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian"),
    *("Ragdoll", "Russian_Blue", "Siamese", "Sphynx"),
)
DOGS = (
    *("american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "boxer", "chihuahua"),
    *("english_cocker_spaniel", "english_setter", "german_shorthaired", "great_pyrenees", "havanese"),
    *("japanese_chin", "keeshond", "leonberger", "miniature_pinscher", "newfoundland", "pomeranian", "pug"),
    *("saint_bernard", "samoyed", "scottish_terrier", "shiba_inu", "staffordshire_bull_terrier"),
    *("wheaten_terrier", "yorkshire_terrier"),
)
BREEDS = tuple(sorted((*CATS, *DOGS), key=str.lower))
"""In the order of their official numbers, which are from 1."""


def write_pets(root: Path, *, seed: int = 0, trainval: int = 2, test: int = 1, side: int = 36) -> Path:
    """Write annotations/ and images/ into `root`, and return it.

    trainval, test: images of each of the 37 breeds; side: of the images in pixels, 0 for none. There is an image and a
    line of list.txt that neither split has, as in the official set, and masks of none.
    """
    rng = np.random.default_rng(seed)
    (root / "annotations" / "trimaps").mkdir(parents=True)
    (root / "images").mkdir()
    lists: dict[str, list[str]] = {"list": [], "trainval": [], "test": []}
    for number, breed in enumerate(BREEDS, 1):
        species = 1 if breed in CATS else 2
        among = sorted(CATS if breed in CATS else DOGS, key=str.lower).index(breed) + 1
        splits = ["trainval"] * trainval + ["test"] * test + [""]
        for image, split in enumerate(rng.permutation(splits).tolist(), 1):
            line = f"{breed}_{image} {number} {species} {among}"
            lists["list"].append(line)
            if split:
                lists[split].append(line)
            if side:
                pixels = rng.integers(0, 200, (side, side - 4, 3)) + number
                Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{breed}_{image}.jpg", quality=80)
    comment = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids", "#SPECIES: 1:Cat 2:Dog"]
    for name, lines in lists.items():
        head = comment if name == "list" else []
        (root / "annotations" / f"{name}.txt").write_text("\n".join([*head, *lines]) + "\n")
    return root
