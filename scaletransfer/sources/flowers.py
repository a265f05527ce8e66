"""Oxford 102 Flowers (Nilsback and Zisserman 2008): the official MATLAB files, or the lists of the fast.ai archive."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from scaletransfer.sources.base import SPLITS, Record, Source, nearest
from scaletransfer.sources.folders import find_folder
from scaletransfer.sources.tables import read_list

FOLDER = "oxford-102-flowers"
CLASSES = 102
IMAGES = 8189
"""Images are numbered from 1 to this."""
LISTS = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
IDS, LABELS = "setid.mat", "imagelabels.mat"
# The variables of setid.mat, by the split that they are.
VARIABLES = {"train": "trnid", "valid": "valid", "test": "tstid"}
# What the released code of arXiv 2106.00116 trained on was the official test list; the other two it tested on.
SPLITS_OF: dict[str, dict[str, str]] = {
    "corrected": {"train": "train", "valid": "valid", "test": "test"},
    "paper": {"train": "test", "valid": "test", "test": "train"},
}

NO_LIST = "images with a label but in no list"

_LINE = re.compile(r"(jpg/image_([0-9]{5})\.jpg)\s+([0-9]{1,9})")


class _Entry(NamedTuple):
    """One image, as the official files have it."""

    split: str
    label: int
    """From 0."""


class Flowers(Source):
    """`root` is the folder that holds `jpg/` (image_00001.jpg ...) and either setid.mat and imagelabels.mat, or
    train.txt, valid.txt and test.txt; or the folder above, where that is called oxford-102-flowers.

    Both forms give the same records, in the order of the images' numbers; where both are there the MATLAB files count.
    Classes are called "1" to "102", as numbered officially; in the lists they begin with 0.
    Options: `protocol`: "corrected" has the official splits (1,020 train, 1,020 valid, 6,149 test); "paper" those of
    arXiv 2106.00116, which trains on the official test list and tests on the other two (6,149 train, 2,040 test).
    """

    name = "flowers"
    task = "multiclass"
    licence = "none stated; images are their owners', for research; cite Nilsback and Zisserman 2008"
    public = True

    def __init__(self, root: str | os.PathLike[str], *, protocol: str = "corrected") -> None:
        super().__init__(root)
        if protocol not in tuple(SPLITS_OF):
            hint = nearest(str(protocol), SPLITS_OF)
            raise ValueError(f"protocol is {protocol!r}; it must be corrected or paper{hint}.")
        self.protocol: Literal["paper", "corrected"] = "paper" if protocol == "paper" else "corrected"
        self.label_names = tuple(str(number) for number in range(1, CLASSES + 1))
        self._prefix = find_folder(self.root, (FOLDER,), (IDS, LABELS, *LISTS.values()))
        folder = self.root / self._prefix
        official = [name for name in (IDS, LABELS) if (folder / name).is_file()]
        lists = [name for name in LISTS.values() if (folder / name).is_file()]
        if not official and not lists:
            prepared = [name for name in ("mod_train", "mod_test") if (folder / name).is_dir()]
            mend = (
                f"it holds {' and '.join(prepared)}, which are image folders: give them as train_dir and val_dir"
                if prepared
                else "--root must be the folder with jpg/ and those files"
            )
            raise ValueError(
                f"{folder} has neither {IDS} and {LABELS} nor {', '.join(LISTS.values())} of {self.name}; {mend}."
            )
        wanted = [IDS, LABELS] if official else list(LISTS.values())
        for name in wanted:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing beside {(official or lists)[0]}; complete the data set.")
        self._official = bool(official)

    def __iter__(self) -> Iterator[Record]:
        self.left_out, self.notes = Counter(), []
        folder = self.root / self._prefix
        entries, without = _from_matlab(folder) if self._official else (_from_lists(folder), 0)
        if without:
            self.left_out[NO_LIST] = without
        if self.protocol == "paper":
            self.notes.append(
                "the protocol paper swaps the official splits: it trains on the test list and tests on the other two."
            )
        split_of = SPLITS_OF[self.protocol]
        for number in sorted(entries):
            name = f"image_{number:05d}"
            yield Record(
                source_id=name,
                split=split_of[entries[number].split],
                patient="",
                image=f"{self._prefix}jpg/{name}.jpg",
                labels=entries[number].label,
                view="",
            )


def _from_lists(folder: Path) -> dict[int, _Entry]:
    """{number of the image: its entry} of the three lists."""
    entries: dict[int, _Entry] = {}
    places: dict[int, str] = {}
    for split in SPLITS:
        path = folder / LISTS[split]
        for text, line in read_list(path).items():
            where = f"{path}, line {line}"
            match = _LINE.fullmatch(text)
            if match is None:
                raise ValueError(f"{where}: {text!r} is no entry; lines look like 'jpg/image_03860.jpg 16'.")
            number, label = int(match[2]), int(match[3])
            if not 1 <= number <= IMAGES:
                raise ValueError(f"{where}: there is no image {match[1]}; images are numbered from 1 to {IMAGES}.")
            if label >= CLASSES:
                raise ValueError(f"{where}: the label {label} is none; labels in this list are 0 to {CLASSES - 1}.")
            if number in entries:
                raise ValueError(f"{where}: {match[1]} is already in {places[number]}; keep it in one of the two.")
            entries[number], places[number] = _Entry(split, label), f"{path.name}, line {line}"
    return entries


def _from_matlab(folder: Path) -> tuple[dict[int, _Entry], int]:
    """({number of the image: its entry}, number of images that have a label but are in no list)."""
    labels = _variable(folder / LABELS, "labels")
    for at, label in enumerate(labels, 1):
        if not 1 <= label <= CLASSES:
            raise ValueError(f"{folder / LABELS}, labels({at}): the label {label} is none; labels are 1 to {CLASSES}.")
    entries: dict[int, _Entry] = {}
    places: dict[int, str] = {}
    for split in SPLITS:
        path, variable = folder / IDS, VARIABLES[split]
        for at, number in enumerate(_variable(path, variable), 1):
            where = f"{path}, {variable}({at})"
            if not 1 <= number <= len(labels):
                raise ValueError(f"{where}: there is no image {number}; {LABELS} has labels of 1 to {len(labels)}.")
            if number in entries:
                raise ValueError(f"{where}: image {number} is already in {places[number]}; keep it in one of the two.")
            entries[number], places[number] = _Entry(split, labels[number - 1] - 1), f"{variable}({at})"
    return entries, len(labels) - len(entries)


def _variable(path: Path, name: str) -> list[int]:
    """The numbers of a row vector in a MATLAB file."""
    from scipy.io import loadmat  # takes a while to import

    try:
        content: dict[str, Any] = loadmat(path, variable_names=[name])
    except MemoryError:
        raise
    except Exception as error:  # loadmat raises whatever a damaged file makes of its parts
        raise ValueError(f"{path} is not a readable MATLAB file ({error}); download it again.") from error
    values = content.get(name)
    if not isinstance(values, np.ndarray) or values.size == 0 or max(values.shape) != values.size:
        raise ValueError(f"{path} lacks a row of numbers called {name!r}; download the official file again.")
    if values.dtype.kind not in "iuf" or not np.equal(np.mod(values, 1), 0).all():
        raise ValueError(f"{path}: {name} must hold whole numbers; download the official file again.")
    return [int(value) for value in values.ravel()]
