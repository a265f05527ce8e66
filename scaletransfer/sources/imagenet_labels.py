"""The synsets of ILSVRC2012's validation images, from the files that say them: the devkit, a list, Kaggle's table."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaletransfer.sources.synsets import WNID
from scaletransfer.sources.tables import Table
from scaletransfer.tars import packed_files

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", f"{DEVKIT}/data/meta.mat"
LISTS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt")
TABLE = "LOC_val_solution.csv"
ACCEPTED = (DEVKIT, f"{DEVKIT}.tar.gz", *LISTS, TABLE)
"""In order of preference."""

_NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})")
_LARGEST = 1 << 26
"""Bytes of a file of the devkit; meta.mat has less than one million."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The synset of each validation image."""

    path: Path
    """The file that says it, for sentences."""
    numbered: Sequence[str] = ()
    """By the number in the image's name, from 1 on."""
    named: Mapping[str, str] | None = None
    """By the image's name without suffix, in a file that names images."""

    @property
    def synsets(self) -> set[str]:
        """All that occur."""
        return set(self.numbered if self.named is None else self.named.values())

    def synset(self, stem: str) -> str:
        """Of the image of this name; ValueError if the file doesn't say."""
        if self.named is not None:
            if stem not in self.named:
                raise ValueError(f"{self.path} has no line for the validation image {stem}; take the image out.")
            return self.named[stem]
        match = _NUMBERED.fullmatch(stem)
        if match is None or not 1 <= int(match[1]) <= len(self.numbered):
            raise ValueError(
                f"{self.path} tells the synset by the line, for ILSVRC2012_val_00000001 to "
                f"ILSVRC2012_val_{len(self.numbered):08d}, and so not of the validation image {stem}; rename it or "
                "take it out."
            )
        return self.numbered[int(match[1]) - 1]


def find_answers(root: Path, folders: Sequence[str]) -> Answers | None:
    """What the first of ACCEPTED in `folders` (relative to `root`, in order) says; None if none is there.

    Raises ValueError, naming file and line, for what such a file doesn't say.
    """
    for folder in folders:
        base = root / folder
        if (base / META).is_file() and (base / TRUTH).is_file():
            return _devkit(base / TRUTH, (base / TRUTH).read_bytes(), base / META, (base / META).read_bytes())
        if (archive := base / f"{DEVKIT}.tar.gz").is_file():
            files = dict(packed_files(archive, (TRUTH, META), _LARGEST))
            for name in (TRUTH, META):
                if name not in files:
                    raise ValueError(f"{archive} has no {name}; download it again.")
            return _devkit(archive / TRUTH, files[TRUTH], archive / META, files[META])
        for name in LISTS:
            if (base / name).is_file():
                return _list(base / name)
        if (base / TABLE).is_file():
            return _table(base / TABLE)
    return None


def _devkit(truth: Path, numbers: bytes, meta: Path, table: bytes) -> Answers:
    """ILSVRC2012's development kit, readme.txt: ground truth is a line an image with an ILSVRC2012_ID; meta.mat has the
    synset of each; the 1,000 that images are labelled with are the leaves, IDs 1 to 1000."""
    leaves = _leaves(meta, table)
    found = []
    for line, text in enumerate(numbers.decode("ascii", "replace").splitlines(), 1):
        cell = text.strip()
        number = int(cell) if re.fullmatch("[0-9]{1,4}", cell) else -1
        if number not in leaves:
            raise ValueError(
                f"{truth}, line {line}: {cell[:40]!r} is no ILSVRC2012_ID of a synset without children in {meta.name}; "
                "download the devkit again."
            )
        found.append(leaves[number])
    return Answers(truth, numbered=found)


def _leaves(path: Path, data: bytes) -> dict[int, str]:
    """{ILSVRC2012_ID: wnid} of the synsets without children."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        table = loadmat(io.BytesIO(data), variable_names=["synsets"])["synsets"].ravel()
        columns = [[row.item() for row in table[key]] for key in ("ILSVRC2012_ID", "WNID", "num_children")]
        rows = list(zip(*columns, strict=True))
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OSError,
        NotImplementedError,
        zlib.error,
        MatReadError,
    ) as error:
        raise ValueError(f"{path} is not the devkit's table of synsets ({error}); download it again.") from error
    found: dict[int, str] = {}
    for number, wnid, children in rows:
        if children:
            continue
        if not isinstance(wnid, str) or not WNID.fullmatch(wnid) or number in found or wnid in found.values():
            raise ValueError(f"{path}: {wnid!r} with the ID {number} is no synset or there twice; download it again.")
        found[int(number)] = wnid
    return found


def _list(path: Path) -> Answers:
    found = []
    for line, text in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        if not WNID.fullmatch(text.strip()):
            raise ValueError(f"{path}, line {line}: {text[:40]!r} is not a synset such as n01440764; mend the line.")
        found.append(text.strip())
    return Answers(path, numbered=found)


def _table(path: Path) -> Answers:
    """Kaggle's "ImageNet Object Localization Challenge": a synset and four corners for each object, all of one."""
    found: dict[str, str] = {}
    for line, (image, prediction) in Table(path, ("ImageId", "PredictionString")).rows():
        synsets = set(prediction.split()[::5])
        if len(synsets) != 1 or not WNID.fullmatch(synset := synsets.pop()):
            raise ValueError(
                f"{path}, line {line}: {prediction[:40]!r} is not one synset with corners such as 'n03995372 85 1 499 "
                "272'; download it again."
            )
        if found.setdefault(image, synset) != synset:
            raise ValueError(f"{path}, line {line}: {image} is there twice with other synsets; download it again.")
    return Answers(path, named=found)
