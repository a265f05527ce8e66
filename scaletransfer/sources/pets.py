"""Oxford-IIIT Pets (Parkhi et al. 2012): 37 breeds of cats and dogs, with the official lists of two splits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from scaletransfer.sources.base import Record, Source
from scaletransfer.sources.folders import find_folder
from scaletransfer.sources.tables import read_list

FOLDER = "oxford-iiit-pet"
LISTS = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}

# name, number of the breed, species, number of the breed among its species
_LINE = re.compile(r"([A-Za-z][A-Za-z_]*_[0-9]{1,6})\s+([0-9]{1,4})\s+[12]\s+[0-9]{1,4}")


class Pets(Source):
    """`root` is the folder that holds `annotations/trainval.txt`, `annotations/test.txt` and `images/NAME.jpg`; or the
    folder above, where that is called oxford-iiit-pet.

    The class is the name without its last part ("Abyssinian_100" is an Abyssinian), classes are sorted by name. Splits
    are the official ones, trainval as train; records are in the order of the lists, trainval first. Masks, boxes and
    the species are not read.
    """

    name = "pets"
    task = "multiclass"
    licence = "CC BY-SA 4.0; the copyright of the images remains with their owners; cite Parkhi et al. 2012"
    public = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._prefix = find_folder(self.root, (FOLDER,), ("annotations",))
        self._entries: list[tuple[str, str, str, int]] = []  # split, name, class, line
        self._read()
        self.label_names = tuple(sorted({entry[2] for entry in self._entries}))

    def __iter__(self) -> Iterator[Record]:
        number = {name: label for label, name in enumerate(self.label_names)}
        for split, name, of, line in self._entries:
            yield Record(
                source_id=name,
                split=split,
                patient="",
                image=f"{self._prefix}images/{name}.jpg",
                labels=number[of],
                view="",
                line=line,
            )

    def _read(self) -> None:
        seen: dict[str, str] = {}  # name -> list and line
        breeds: dict[str, tuple[str, str]] = {}  # class -> its number, and the line that said so first
        of_number: dict[str, str] = {}
        for split, name in LISTS.items():
            path = self.root / self._prefix / name
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing; --root must be the folder of {self.name} with annotations/ and images/."
                )
            count = len(self._entries)
            for text, line in read_list(path).items():
                if text.startswith("#"):
                    continue
                where = f"{path}, line {line}"
                match = _LINE.fullmatch(text)
                if match is None:
                    raise ValueError(f"{where}: {text!r} is no entry; lines look like 'Abyssinian_100 1 1 1'.")
                image, breed = match[1], match[1].rpartition("_")[0]
                if image in seen:
                    raise ValueError(f"{where}: {image} is already in {seen[image]}; keep it in one of the two.")
                seen[image] = f"{path.name}, line {line}"
                if breed not in breeds and split == "test":
                    raise ValueError(
                        f"{where}: {image} is of the class {breed}, which trainval.txt does not have; a class without "
                        "training images can't be learnt."
                    )
                number, first = breeds.setdefault(breed, (match[2], seen[image]))
                if not self.notes and (number != match[2] or of_number.setdefault(match[2], breed) != breed):
                    self.notes.append(
                        f"{where}: the class number of {image} is {match[2]}, which does not go with {breed} in "
                        f"{first}; classes are taken from file names, as published."
                    )
                self._entries.append((split, image, breed, line))
            if len(self._entries) == count:
                raise ValueError(f"{path} names no image; download it again.")
