"""MIMIC-CXR-JPG 2.0.0 (arXiv 1901.07042) in its official layout: three tables beside the folder files/.

https://physionet.org/content/mimic-cxr-jpg/2.0.0/ describes the files; version 2.1.0 keeps their names.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scaletransfer.labels import CHEXPERT_RAW
from scaletransfer.sources.base import DEFAULT_VIEWS, Record, Source, nearest, parse_views
from scaletransfer.sources.chexpert import OWN_NAMES, state
from scaletransfer.sources.tables import Table, find_table

PREFIX = "mimic-cxr-2.0.0-"
LABELERS = ("chexpert", "negbio")
SPLIT_NAMES = {"train": "train", "validate": "valid", "test": "test"}
LATERALS = ("LATERAL", "LL")
"""What the table calls lateral images; `corrected` calls them L, as every other source does."""

# What the table calls the others. Any other name is worth a note: its rows fall to the view filter.
_OTHER_VIEWS = (
    "AP AXIAL",
    "AP LLD",
    "AP RLD",
    "PA LLD",
    "PA RLD",
    "LAO",
    "RAO",
    "LPO",
    "RPO",
    "SWIMMERS",
    "XTABLE LATERAL",
)
_POSITIONS = ("", "PA", "AP", *LATERALS, *_OTHER_VIEWS)

NO_SPLIT = "images that the split table lacks"
NO_LABELS = "images of studies that the label table lacks"
NO_METADATA = "images of the split table that the metadata table lacks"
NO_IMAGE = "studies of the label table without an image"

_IDS = ("dicom_id", "subject_id", "study_id")
# Official identifiers are digits and, of images, groups of hexadecimal digits; no path can be made of these.
_NUMBER, _DICOM = re.compile(r"[0-9]{2,}"), re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*")


class _Entry(NamedTuple):
    """A row of the split table."""

    split: str
    subject: str
    study: str
    line: int


class _Study(NamedTuple):
    """A row of the label table."""

    labels: tuple[int, ...]
    subject: str
    line: int


class MIMIC(Source):
    """`root` is the folder that holds mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz (or .csv) and files/.

    Records are in the order of the metadata table. An image or study that one of the tables lacks gives no record and
    is counted in `left_out`; tables that contradict each other are an error.

    Options: `views`: views to keep, names or "PA,AP"; "all" keeps every image. `labeler`: whose labels to take,
    "chexpert" or "negbio". `protocol`: "corrected" gives lateral images (LATERAL, LL) the view L; under "paper"
    every view keeps the name that the table gives it.
    """

    name = "mimic"
    task = "multilabel"
    licence = "PhysioNet Credentialed Health Data License 1.5.0 (credentialed users, no redistribution)"
    public = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        views: str | Iterable[str] | None = DEFAULT_VIEWS,
        labeler: str = "chexpert",
        protocol: str = "corrected",
    ) -> None:
        super().__init__(root)
        for option, value, known in (
            ("labeler", labeler, LABELERS),
            ("protocol", protocol, ("corrected", "paper")),
        ):
            if value not in known:
                raise ValueError(f"{option} is {value!r}; it must be {' or '.join(known)}{nearest(str(value), known)}.")
        self.label_names = CHEXPERT_RAW
        self.views, self.labeler, self.protocol = parse_views(views), labeler, protocol
        if protocol == "corrected" and self.views and "LL" in self.views and "L" not in self.views:
            raise ValueError("MIMIC's lateral images LATERAL and LL are called L under corrected; name L in --views.")
        self.metadata = self._table("metadata", (*_IDS, "ViewPosition"))
        self.split_table = self._table("split", (*_IDS, "split"))
        columns = tuple(OWN_NAMES[name] for name in self.label_names)
        self.label_table = self._table(labeler, ("subject_id", "study_id", *columns))

    def __iter__(self) -> Iterator[Record]:
        self.left_out, self.notes = Counter(), []
        strange: dict[str, int] = {}  # unknown ViewPosition -> its first line
        splits, studies = self._read_splits(), self._read_labels()
        seen: dict[str, int] = {}  # dicom_id -> its line
        imaged: set[str] = set()  # studies that have an image, whatever its view
        kept = 0
        for line, (image, subject, study, position) in self.metadata.rows():
            where = f"{self.metadata.path}, line {line}"
            _check_ids(where, subject, study, image)
            if seen.setdefault(image, line) != line:
                raise ValueError(
                    f"{where}: the dicom_id {image} is already in line {seen[image]}; remove one of the two."
                )
            entry, labelled = splits.get(image), studies.get(study)
            if entry is not None and (entry.subject, entry.study) != (subject, study):
                raise ValueError(
                    f"{where}: {image} is of subject {subject} and study {study}, but in {self.split_table.path.name}, "
                    f"line {entry.line}, of subject {entry.subject} and study {entry.study}; use tables of one release."
                )
            if labelled is not None:
                if labelled.subject != subject:
                    raise ValueError(
                        f"{where}: study {study} is of subject {subject}, but in {self.label_table.path.name}, "
                        f"line {labelled.line}, of subject {labelled.subject}; use tables of one release."
                    )
                imaged.add(study)
            view = self._view(position)
            if position.strip() not in _POSITIONS:
                strange.setdefault(position.strip(), line)
            if self.views is not None and view not in self.views:
                continue
            if entry is None or labelled is None:
                self.left_out[NO_SPLIT if entry is None else NO_LABELS] += 1
                continue
            kept += entry.split == "train"
            yield Record(
                source_id=image,
                split=entry.split,
                patient=subject,
                image=f"files/p{subject[:2]}/p{subject}/s{study}/{image}.jpg",
                labels=labelled.labels,
                view=view,
                line=line,
            )
        self.notes += [
            f"{self.metadata.path}, line {line} and perhaps others have the ViewPosition {name!r}, which MIMIC does "
            f"not know{nearest(name, _POSITIONS)}."
            for name, line in strange.items()
        ]
        for reason, rows in (
            (NO_METADATA, sum(image not in seen for image in splits)),
            (NO_IMAGE, len(studies) - len(imaged)),
        ):
            if rows:
                self.left_out[reason] = rows
        if not kept:
            wanted = ", ".join(sorted(self.views)) if self.views is not None else "all"
            raise ValueError(
                f"{self.metadata.path} has no training image with the views {wanted} that the other tables have as "
                "well; choose others by --views, or use tables of one release."
            )

    def _table(self, what: str, columns: tuple[str, ...]) -> Table:
        # Compressed first in the message: so they are published.
        path = find_table(self.root, f"{PREFIX}{what}.csv")
        if path is None:
            raise ValueError(
                f"{self.root / f'{PREFIX}{what}.csv.gz'} is missing; --root must be the folder of MIMIC-CXR-JPG "
                "with its tables."
            )
        return Table(path, columns)

    def _read_splits(self) -> dict[str, _Entry]:
        """{dicom_id: its row of the split table}; no patient is in two splits."""
        found: dict[str, _Entry] = {}
        first: dict[str, str] = {}  # subject -> split
        shared: dict[str, tuple[str, str]] = {}
        for line, (image, subject, study, name) in self.split_table.rows():
            where = f"{self.split_table.path}, line {line}"
            _check_ids(where, subject, study, image)
            split = SPLIT_NAMES.get(name)
            if split is None:
                raise ValueError(f"{where}, column 'split': {name!r} is none of {', '.join(SPLIT_NAMES)}.")
            if image in found:
                raise ValueError(
                    f"{where}: the dicom_id {image} is already in line {found[image].line}; remove one of the two."
                )
            found[image] = _Entry(split, subject, study, line)
            if first.setdefault(subject, split) != split:
                shared.setdefault(subject, (first[subject], split))
        for subject, names in shared.items():
            raise ValueError(
                f"{len(shared)} of {len(first)} patients of {self.split_table.path} are in two splits (the first is "
                f"{subject}, in {' and '.join(names)}); use the official table."
            )
        return found

    def _read_labels(self) -> dict[str, _Study]:
        """{study_id: its row of the label table}."""
        found: dict[str, _Study] = {}
        known: dict[tuple[str, ...], tuple[int, ...]] = {}  # most rows repeat one of a few thousand
        for line, (subject, study, *cells) in self.label_table.rows():
            where = f"{self.label_table.path}, line {line}"
            _check_ids(where, subject, study)
            if study in found:
                raise ValueError(
                    f"{where}: the study_id {study} is already in line {found[study].line}; remove one of the two."
                )
            labels = known.get(tuple(cells))
            if labels is None:
                labels = tuple(
                    state(where, OWN_NAMES[name], cell) for name, cell in zip(self.label_names, cells, strict=True)
                )
                known[tuple(cells)] = labels
            found[study] = _Study(labels, subject, line)
        return found

    def _view(self, position: str) -> str:
        view = position.strip()
        return "L" if self.protocol == "corrected" and view in LATERALS else view


def _check_ids(where: str, subject: str, study: str, image: str | None = None) -> None:
    for column, value in (("subject_id", subject), ("study_id", study)):
        if not _NUMBER.fullmatch(value):
            raise ValueError(f"{where}, column {column!r}: {value!r} is no number of the data set; mend the cell.")
    if image is not None and not _DICOM.fullmatch(image):
        raise ValueError(f"{where}, column 'dicom_id': {image!r} is no identifier of an image; mend the cell.")
