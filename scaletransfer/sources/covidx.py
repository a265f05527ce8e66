"""COVIDx-CXR2 (arXiv 2105.06640): chest X-rays of several sources, two lists, COVID-19 or not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from scaletransfer.sources.base import Record, Source, nearest
from scaletransfer.sources.folders import find_folder
from scaletransfer.sources.splits import check_share, held_out
from scaletransfer.sources.tables import read_list

FOLDER = "COVIDx-CXR2"
LISTS = {"train": "train.txt", "test": "test.txt"}
CLASSES = ("negative", "positive")

# patient, file, label, source. In the official lists hundreds of patients are called like "COVID 386" (their images
# like COVID(386).png): the words before the file are the patient. A file may go on in brackets, "COVID (3).png".
_LINE = re.compile(r"(\S(?:.*\S)?)\s+([^\s(]\S*(?:\s+\(\S*)*)\s+(\S+)\s+(\S+)")
# A file name of one part that neither hides nor breaks a line of a listing.
_NAME = re.compile(r"[^/.\\\x00-\x1f][^/\\\x00-\x1f]*")


class _Row(NamedTuple):
    split: str
    file: str
    label: int
    patient: str
    line: int


class COVIDx(Source):
    """`root` is the folder that holds train.txt, test.txt, train/ and test/; or the folder above, where that is called
    COVIDx-CXR2.

    A line is: patient, file, positive or negative, source. Patients are "<source>/<patient>", as ids are unique inside
    of a source only. Records are in the order of the lists, train first.
    Options: `valid_share` of the patients of train.txt becomes the validation split, which the set has none of; drawn
    by a hash of `seed` and the patient.
    """

    name = "covidx"
    task = "multiclass"
    licence = (
        "collected from public sets with terms of their own (see the COVIDx page); research; cite arXiv 2105.06640"
    )
    public = False

    def __init__(self, root: str | os.PathLike[str], *, valid_share: float = 0.0, seed: int = 0) -> None:
        super().__init__(root)
        self.label_names = CLASSES
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; it must be a whole number.")
        self.valid_share, self.seed = check_share(valid_share), seed
        self._prefix = find_folder(self.root, (FOLDER,), tuple(LISTS.values()))
        for name in LISTS.values():
            if not (self.root / self._prefix / name).is_file():
                raise ValueError(
                    f"{self.root / self._prefix / name} is missing; --root must be the folder of COVIDx-CXR2 with "
                    "train.txt, test.txt, train/ and test/."
                )

    def __iter__(self) -> Iterator[Record]:
        self.notes = []
        patients: dict[str, set[str]] = {split: set() for split in LISTS}
        for row in self._rows():
            patients[row.split].add(row.patient)
            split = row.split
            if split == "train" and self.valid_share and held_out(row.patient, self.valid_share, self.seed):
                split = "valid"
            yield Record(
                source_id=f"{row.split}/{row.file}",
                split=split,
                patient=row.patient,
                image=f"{self._prefix}{row.split}/{row.file}",
                labels=row.label,
                view="",
                line=row.line,
            )
        both = patients["train"] & patients["test"]
        if both:
            self.notes.append(
                f"{len(both)} of the {len(patients['test'])} patients of test.txt are in train.txt as well: the "
                "published lists are so, and scores on the test split are that much too good."
            )

    def _rows(self) -> Iterator[_Row]:
        """The lines of both lists."""
        for split, name in LISTS.items():
            path = self.root / self._prefix / name
            seen: dict[str, int] = {}  # file -> line
            for text, line in read_list(path).items():
                where = f"{path}, line {line}"
                match = _LINE.fullmatch(text)
                if match is None:
                    raise ValueError(f"{where}: {text!r} is no entry; a line is: patient, file, label, source.")
                patient, file, label, source = match.groups()
                if label not in CLASSES:
                    raise ValueError(
                        f"{where}: {label!r} is no label; labels are negative and positive{nearest(label, CLASSES)}."
                    )
                if not _NAME.fullmatch(file):
                    raise ValueError(f"{where}: {file!r} is no file name inside of {split}/; mend the line.")
                if seen.setdefault(file, line) != line:
                    raise ValueError(f"{where}: {file} is already in line {seen[file]}; remove one of the two.")
                yield _Row(split, file, CLASSES.index(label), f"{source}/{patient}", line)
            if not seen:
                raise ValueError(f"{path} names no image; download it again.")
