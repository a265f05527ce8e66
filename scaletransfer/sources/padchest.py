"""PadChest (arXiv 1901.07441): one table, images beside it, in the folders of its ImageDir column, or in its zips."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from scaletransfer.padchest_labels import EXCLUDED_IMAGE_IDS, FINDINGS, findings_of, reviewed, unknown_token
from scaletransfer.sources.base import Record, Source, nearest, parse_views
from scaletransfer.sources.places import find_images
from scaletransfer.sources.splits import check_share, held_out
from scaletransfer.sources.tables import Table, find_table

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = ("ImageID", "ImageDir", "PatientID", "Projection", "Labels")
PADCHEST_VIEWS = ("PA", "AP", "AP Supine", "L", "COSTAL")
PROTOCOLS = ("corrected", "paper")

# Reasons of `left_out`.
NULL = "no labels (null)"
EMPTY = "labels that are an empty list"
EXCLUDE = "marked exclude"
UNCHANGED = "nothing but unchanged"
SUBOPTIMAL = "suboptimal study without a finding"
DROPPED = "images that the published protocol drops by name"
NO_FINDING = "no finding (single_label)"
SEVERAL = "more than one finding (single_label)"

_VIEW_NAMES = {"AP_horizontal": "AP Supine"}
# What the table has besides: images that are no usable chest film, and of unknown view. They fall to the view filter.
_PROJECTIONS = {"PA", "AP", "AP_horizontal", "L", "COSTAL", "EXCLUDE", "UNK"}
# The table was once saved by a program that writes nan for an empty cell.
_NULL_CELLS = ("", "nan")
# A flat list of quoted words without escapes: nothing else ever reaches literal_eval.
_WORD = r"""\s*(?:'[^'\\\x00-\x1f]*'|"[^"\\\x00-\x1f]*")\s*"""
_LIST = re.compile(rf"\[(?:{_WORD}(?:,{_WORD})*)?\s*\]")
# One part of a path that neither hides nor breaks a line of a listing.
_NAME = re.compile(r"[^/.\\\x00-\x1f][^/\\\x00-\x1f]*")

_VALID_SHARE, _SEED = 0.1, 0
# Of the published split (arXiv 2106.00116); `paper` has no other.
_PAPER_SEED, _PAPER_TRAIN = 42, 0.9


class _Labels(NamedTuple):
    """What a Labels cell says."""

    tokens: tuple[str, ...]
    classes: tuple[int, ...]
    """Findings by the protocol's rule, as indices of FINDINGS."""
    silent: str
    """Why the cell says nothing of the image; "" where it does."""


class PadChest(Source):
    """`root` is the folder that holds PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv (or .csv.gz).

    Options: `views`: views to keep, names or "PA,AP"; "all" keeps every image. AP_horizontal is called AP Supine.
    `protocol`: "corrected" leaves out rows that say nothing, counted in `left_out`, and holds `valid_share` of the
    patients out for validation, drawn by a hash of `seed` and the patient; an image without a patient is a group of
    its own. "paper" is what was published with arXiv 2106.00116: it keeps rows that say nothing, drops 30 files by
    name, and splits by image; iterating gives train, then valid, in the published shuffled order.
    `single_label`: True makes a multi-class set over the 27 findings, of the images with exactly one finding by the
    rule of the protocol (PadChest-Cl); images are left out after the split.

    Rows that say nothing: no labels; an empty list; any label `exclude`; `unchanged` and nothing else; and `suboptimal
    study` where the published rule sees no finding (it does not depend on the token table, so that a change there
    moves no image).
    """

    name = "padchest"
    task: Literal["multilabel", "multiclass"] = "multilabel"
    tokens = True
    licence = "PadChest Dataset Research Use Agreement (research only, no redistribution)"
    public = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        views: str | Iterable[str] | None = PADCHEST_VIEWS,
        protocol: str = "corrected",
        valid_share: float = _VALID_SHARE,
        seed: int = _SEED,
        single_label: bool = False,
    ) -> None:
        super().__init__(root)
        if protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol is {protocol!r}; it must be {' or '.join(PROTOCOLS)}{nearest(str(protocol), PROTOCOLS)}."
            )
        if not isinstance(single_label, bool):
            raise ValueError(f"single_label is {single_label!r}; it must be true or false.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}; it must be an integer.")
        self.protocol: Literal["paper", "corrected"] = "paper" if protocol == "paper" else "corrected"
        if protocol == "paper" and (valid_share, seed) != (_VALID_SHARE, _SEED):
            raise ValueError("valid_share and seed have no meaning under the protocol paper; leave them out.")
        self.views, self.single_label = parse_views(views), single_label
        self.valid_share, self.seed = check_share(valid_share), seed
        if single_label:
            self.task, self.tokens, self.label_names = "multiclass", False, FINDINGS
        else:
            self.label_names = tuple(reviewed())
        path = find_table(self.root, TABLE)
        if path is None:
            raise ValueError(f"{self.root / TABLE} is missing; --root must be the folder that holds PadChest's table.")
        self.table = Table(path, COLUMNS)

    def __iter__(self) -> Iterator[Record]:
        records, order = self._pass()
        return (records[at] for at in order)

    def listed(self) -> Iterator[Record]:
        """The records in the order of the table; `paper` trains in the shuffled one."""
        return iter(self._pass()[0])

    def locate(self, records: Sequence[Record]) -> list[Record]:
        """See Source: the folders of ImageDir, images/, beside the table, then 0.zip and so on."""
        own = sorted({record.image.partition("/")[0] for record in records}, key=lambda name: (len(name), name))
        folders = (*own, "images", *(f"images/{name}" for name in own), ".")
        archives = (*(f"{name}.zip" for name in own), *(f"images/{name}.zip" for name in own))
        places = find_images(self.root, [record.source_id for record in records], folders, archives)
        return [replace(record, image=places.get(record.source_id, record.image)) for record in records]

    def _pass(self) -> tuple[list[Record], list[int]]:
        """(records in the order of the table, their places in the order of the protocol)."""
        self.left_out, self.notes = Counter(), []
        rows, labels = self._rows()
        if self.protocol == "paper":
            order, train = paper_split(len(rows))
            for at in order[:train]:
                rows[at] = replace(rows[at], split="train")
        else:
            order = list(range(len(rows)))
        if self.single_label:
            rows, order = self._single(rows, labels, order)
        self._check_and_note(rows)
        return rows, order

    def _rows(self) -> tuple[list[Record], list[_Labels]]:
        """Rows that the filters keep, in the order of the table.  Under `paper` all of them are valid as yet."""
        seen: dict[str, int] = {}  # ImageID -> its line
        known: dict[str, _Labels] = {}  # 160,000 rows have 29,000 different cells
        strange: dict[str, int] = {}  # unknown Projection -> its first line
        records, labels = [], []
        for line, (image, folder, patient, projection, cell) in self.table.rows():
            where = f"{self.table.path}, line {line}"
            for column, name in (("ImageID", image), ("ImageDir", folder)):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{where}: the {column} {name!r} is no plain name; mend the cell.")
            if seen.setdefault(image, line) != line:
                raise ValueError(f"{where}: the ImageID {image} is already in line {seen[image]}; remove one of them.")
            if projection not in _PROJECTIONS:
                strange.setdefault(projection, line)
            view = _VIEW_NAMES.get(projection, projection)
            if self.views is not None and view not in self.views:
                continue
            said = known.get(cell)
            if said is None:
                said = known[cell] = self._read(f"{where}, column 'Labels'", cell)
            reason = self._reason(image, said)
            if reason:
                self.left_out[reason] += 1
                continue
            patient = "" if patient.strip() in _NULL_CELLS else patient.strip()
            out = self.protocol == "paper" or held_out(patient or image, self.valid_share, self.seed)
            records.append(
                Record(
                    source_id=image,
                    split="valid" if out else "train",
                    patient=patient,
                    image=f"{folder}/{image}",
                    labels=said.tokens,
                    view=view,
                    line=line,
                )
            )
            labels.append(said)
        self.notes += [
            f"{self.table.path}, line {line} and perhaps others have the Projection {name!r}, which PadChest does not "
            f"know{nearest(name, _PROJECTIONS)}."
            for name, line in strange.items()
        ]
        return records, labels

    def _read(self, where: str, cell: str) -> _Labels:
        """What a Labels cell says; ValueError, with `where`, for what is no list of known tokens."""
        if cell.strip() in _NULL_CELLS:
            return _Labels((), (), NULL)
        if not _LIST.fullmatch(cell):
            raise ValueError(f"{where}: {cell!r} is no list of labels such as ['nodule', 'scoliosis']; mend the cell.")
        tokens = tuple(token for token in (word.strip() for word in ast.literal_eval(cell)) if token)
        for token in tokens:
            if token not in reviewed():
                raise ValueError(f"{where}: there is {unknown_token(token)}.")
        found = {name for token in tokens for name in findings_of(token, self.protocol)}
        classes = tuple(at for at, name in enumerate(FINDINGS) if name in found)
        return _Labels(tokens, classes, _silence(tokens))

    def _reason(self, image: str, said: _Labels) -> str:
        """Why a row gives no record; "" where it does."""
        if self.protocol == "corrected" or said.silent == NULL:
            return said.silent
        return DROPPED if image in EXCLUDED_IMAGE_IDS else ""

    def _single(self, rows: list[Record], labels: list[_Labels], order: list[int]) -> tuple[list[Record], list[int]]:
        """Rows with one finding, which becomes their class, and their order."""
        place: dict[int, int] = {}  # in `rows` -> among those that are kept
        kept: list[Record] = []
        for at, (row, said) in enumerate(zip(rows, labels, strict=True)):
            if len(said.classes) == 1:
                place[at] = len(kept)
                kept.append(replace(row, labels=said.classes[0]))
            else:
                self.left_out[SEVERAL if said.classes else NO_FINDING] += 1
        return kept, [place[at] for at in order if at in place]

    def _check_and_note(self, rows: list[Record]) -> None:
        train = {row.patient for row in rows if row.split == "train"}
        if not train:
            wanted = ", ".join(sorted(self.views)) if self.views is not None else "all"
            raise ValueError(
                f"{self.table.path} has no training row with the views {wanted}; choose others by --views, or, where "
                f"all patients were held out (valid_share {self.valid_share}), another seed."
            )
        nameless = sum(not row.patient for row in rows)
        if nameless:
            self.notes.append(
                f"{nameless:,} images of {self.table.path} have no PatientID, so nobody can tell whether their "
                "patients are in both splits."
            )
        valid = [row.patient for row in rows if row.split == "valid"]
        shared = sum(bool(patient) and patient in train for patient in valid)
        if shared:
            self.notes.append(
                f"the published split is by image: {shared / len(valid):.1%} of the {len(valid):,} validation images "
                "show a patient who is in train as well, so a validation figure is too good; --protocol corrected "
                "splits by patient."
            )


def paper_split(rows: int) -> tuple[list[int], int]:
    """(the published order of the filtered rows, how many of its first are training; the rest are validation)."""
    order = np.arange(rows)
    np.random.RandomState(_PAPER_SEED).shuffle(order)
    return order.tolist(), int(rows * _PAPER_TRAIN)


def _silence(tokens: Sequence[str]) -> str:
    """Why tokens that were read from a list say nothing of the image; "" where they do."""
    if not tokens:
        return EMPTY
    if "exclude" in tokens:
        return EXCLUDE
    if set(tokens) == {"unchanged"}:
        return UNCHANGED
    if "suboptimal study" in tokens and not any(findings_of(token, "paper") for token in tokens):
        return SUBOPTIMAL
    return ""
