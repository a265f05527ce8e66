"""Tuberculosis: the sets of Shenzhen (China) and of Montgomery County (Jaeger et al. 2014), taken together.

Neither has an official split. This one is that of the code released with arXiv 2106.00116.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

from scaletransfer.sources.base import Record, Source
from scaletransfer.sources.folders import find_folder

FOLDER = "Tuberculosis_dataset"
CLASSES = ("normal", "tuberculosis")
TRAIN_SHARE, SEED = 0.85, 42
# Where the images of each set lie: in the Kaggle archive, in the archives of its publisher, by hand.
PLACES: dict[str, tuple[str, ...]] = {
    "China": (
        "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png",
        "ChinaSet_AllFiles/CXR_png",
        "ChinaSet/CXR_png",
        "China/CXR_png",
    ),
    "Montgomery": (
        "Montgomery/MontgomerySet/CXR_png",
        "MontgomerySet/MontgomerySet/CXR_png",
        "MontgomerySet/CXR_png",
        "Montgomery/CXR_png",
    ),
}

_NAME = re.compile(r"([^.\x00-\x1f\\][^\x00-\x1f\\]*)_([01])\.(png|dcm)")
_LITTER = {"thumbs.db", "desktop.ini"}


class Tuberculosis(Source):
    """`root` is the folder with both sets, `ChinaSet_AllFiles/.../CXR_png/` and `Montgomery/.../CXR_png/`; or the
    folder above, where that is called Tuberculosis_dataset.

    The class is the digit before ".png" (CHNCXR_0327_1.png shows tuberculosis), the patient is the name before it: each
    has one image. Splits: of each set the sorted names are shuffled with numpy's RandomState(42); the first 85 % are
    train, the rest test (679 and 121 images of 662 + 138). Records are in the order of names, China first. A .dcm file
    counts as the .png of its name, where that is not there.
    """

    name = "tuberculosis"
    task = "multiclass"
    licence = "U.S. National Library of Medicine: public, de-identified; name the sources, cite Jaeger et al. 2014"
    public = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self.label_names = CLASSES
        every = [place for places in PLACES.values() for place in places]
        prefix = find_folder(self.root, (FOLDER,), every)
        self._folders: list[str] = []
        for name, places in PLACES.items():
            found = [place for place in places if (self.root / prefix / place).is_dir()]
            if not found:
                raise ValueError(
                    f"{self.root / prefix / places[0]} is missing; --root must be the folder that holds the images of "
                    f"both sets, China and Montgomery ({name} has none of {', '.join(places)})."
                )
            if len(found) > 1:
                raise ValueError(
                    f"{self.root / prefix} holds the images of {name} twice, in {found[0]} and {found[1]}; keep one."
                )
            self._folders.append(prefix + found[0])

    def __iter__(self) -> Iterator[Record]:
        self.skipped = []
        seen: dict[str, str] = {}  # patient -> image
        for folder in self._folders:
            files = self._files(folder)
            shuffled = sorted(files)
            np.random.RandomState(SEED).shuffle(shuffled)
            train = set(shuffled[: int(TRAIN_SHARE * len(shuffled))])
            for name in sorted(files):
                patient, label = name[: -len("_0.png")], int(name[-len("0.png")])
                image = f"{folder}/{files[name]}"
                if patient in seen:
                    raise ValueError(
                        f"{self.root / image}: the patient {patient} has another image, {seen[patient]}; remove one."
                    )
                seen[patient] = image
                yield Record(
                    source_id=name,
                    split="train" if name in train else "test",
                    patient=patient,
                    image=image,
                    labels=label,
                    view="",
                )

    def _files(self, folder: str) -> dict[str, str]:
        """{name with the suffix .png: name of the file} of one set."""
        files: dict[str, str] = {}
        for entry in sorted(os.listdir(self.root / folder)):  # .dcm before .png
            match = _NAME.fullmatch(entry)
            if match is not None:
                files[f"{match[1]}_{match[2]}.png"] = entry
            elif entry.lower().endswith((".png", ".dcm")) and not entry.startswith("."):
                raise ValueError(
                    f"{self.root / folder / entry}: a name ends in _0.png (normal) or _1.png (tuberculosis); move the "
                    "file away, or rename it."
                )
            elif not entry.startswith(".") and entry.lower() not in _LITTER:
                self.skipped.append(f"{folder}/{entry}: no image by its name")
        if not files:
            raise ValueError(f"{self.root / folder} holds no image; names look like CHNCXR_0001_0.png.")
        return files
