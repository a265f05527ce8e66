"""CheXpert (arXiv 1901.07031) in the official layouts CheXpert-v1.0 and CheXpert-v1.0-small.

The stdlib's csv module reads the 223,414 rows in about a second and lets an error name its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TextIO

from scaletransfer.labels import CHEXPERT_COLUMNS, CHEXPERT_RAW, NOT_MENTIONED, SHOWN_NAMES
from scaletransfer.sources.base import DEFAULT_VIEWS, Record, Source, nearest, parse_views

FOLDERS = ("CheXpert-v1.0", "CheXpert-v1.0-small")
VIEW_COLUMNS = ("Frontal/Lateral", "AP/PA")
OWN_NAMES = {SHOWN_NAMES.get(column, column): column for column in CHEXPERT_COLUMNS}

_STATES = {"": NOT_MENTIONED, "1.0": 1, "0.0": 0, "-1.0": -1, "1": 1, "0": 0, "-1": -1}
# <folder>/<train or valid>/patientNNNNN/<study>/<file>; the folder may be missing. No part begins with a dot
# or holds a backslash or a control character, so that a path can't leave the root, hide, or break a line of a
# listing.
_PART = r"[^/.\\\x00-\x1f][^/\\\x00-\x1f]*"
_PATH = re.compile(rf"(?:CheXpert-v1\.0[^/\\\x00-\x1f]*/)?((?:{_PART}/)?(patient[0-9]+)(?:/{_PART})+)")
_EXAMPLE = "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"


class CheXpert(Source):
    """`root` is the folder that holds train.csv (or train.csv.gz), or its parent. Without valid.csv there is
    no validation split.

    Options: `views`: views to keep, names or "PA,AP"; "all" keeps every image. A lateral image has the view
    "L", a frontal one what the column AP/PA says.
    """

    name = "chexpert"
    task = "multilabel"
    licence = "Stanford University Dataset Research Use Agreement (no commercial use, no redistribution)"
    public = False

    def __init__(self, root: str | os.PathLike[str], *, views: str | Iterable[str] | None = DEFAULT_VIEWS) -> None:
        super().__init__(root)
        self.label_names = CHEXPERT_RAW
        self.views = parse_views(views)
        self._prefix, folder = _find_folder(self.root)
        train, valid = _table(folder, "train"), _table(folder, "valid")
        if train is None:
            raise ValueError(
                f"{folder / 'train.csv'} is missing; --root must be the official CheXpert folder "
                f"({' or '.join(FOLDERS)}) or the folder that holds it."
            )
        self.tables: dict[str, Path] = {"train": train} | ({"valid": valid} if valid else {})
        for table in self.tables.values():
            with _open(table) as stream:
                _header(table, _reader(table, stream))

    def __iter__(self) -> Iterator[Record]:
        seen: dict[str, int] = {}  # Path -> its line; negative for a line of valid.csv
        patients: dict[str, set[str]] = {split: set() for split in self.tables}
        kept = 0
        for split, table in self.tables.items():
            sign, empty = 1 if split == "train" else -1, True
            for line, record in self._rows(split, table):
                empty = False
                first = seen.setdefault(record.source_id, sign * line)
                if first != sign * line:
                    other = self.tables["train" if first > 0 else "valid"].name
                    raise ValueError(
                        f"{table}, line {line}: the Path {record.source_id} is already in {other}, line "
                        f"{abs(first)}; remove one of the two rows."
                    )
                patients[split].add(record.patient)
                if self.views is None or record.view in self.views:
                    kept += split == "train"
                    yield record
            if empty:
                raise ValueError(f"{table} has no row below its header; download it again, or take it away.")
        shared = patients["train"] & patients.get("valid", set())
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(patients['valid'])} patients of {self.tables['valid']} are in "
                f"{self.tables['train'].name} as well (the first is {min(shared)}); "
                "validation would be on patients seen in training: take them out of one of the tables."
            )
        if not kept:
            wanted = ", ".join(sorted(self.views)) if self.views is not None else "all"
            raise ValueError(f"{self.tables['train']} has no row with the views {wanted}; choose others by --views.")

    def _rows(self, split: str, table: Path) -> Iterator[tuple[int, Record]]:
        """(line number, record) of every row of one table, whatever its view."""
        with _open(table) as stream:
            reader = _reader(table, stream)
            header = _header(table, reader)
            path_at = header.index("Path")
            side_at, view_at = (header.index(column) for column in VIEW_COLUMNS)
            labels_at = [header.index(OWN_NAMES[name]) for name in self.label_names]
            # Most rows repeat one of a few thousand combinations of cells; reading them once halves the time.
            known: dict[tuple[str, ...], tuple[int, ...]] = {}
            cells_of = itemgetter(*labels_at)
            for line, row in reader:
                if len(row) != len(header):
                    raise ValueError(
                        f"{table}, line {line}: the row has {len(row)} cells, the header {len(header)}; mend the row."
                    )
                cells = cells_of(row)
                labels = known.get(cells)
                if labels is None:
                    labels = tuple(_state(table, line, header[column], row[column]) for column in labels_at)
                    known[cells] = labels
                image, patient = _split_path(table, line, row[path_at])
                yield (
                    line,
                    Record(
                        source_id=row[path_at],
                        split=split,
                        patient=patient,
                        image=self._prefix + image,
                        labels=labels,
                        view=_view(table, line, row[side_at], row[view_at]),
                    ),
                )


def _find_folder(root: Path) -> tuple[str, Path]:
    """(prefix of image paths, the folder with the tables): the root itself, or an official folder below
    it."""
    if _table(root, "train") is not None:
        return "", root
    below = [name for name in FOLDERS if (root / name).is_dir()]
    if len(below) > 1:
        raise ValueError(f"{root} holds both {below[0]} and {below[1]}; give one of them by --root.")
    return (f"{below[0]}/", root / below[0]) if below else ("", root)


def _table(folder: Path, split: str) -> Path | None:
    for name in (f"{split}.csv", f"{split}.csv.gz"):
        if (folder / name).is_file():
            return folder / name
    return None


def _open(table: Path) -> TextIO:
    # utf-8-sig: spreadsheet programs put a byte-order mark before the header.
    if table.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(table, "rb"), encoding="utf-8-sig", newline="")
    return open(table, encoding="utf-8-sig", newline="")


def _reader(table: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that isn't empty; what makes a file unreadable becomes a
    ValueError."""
    reader = csv.reader(stream, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{table}, after line {reader.line_num}: not a readable table ({error}); download it again."
        ) from error


def _header(table: Path, reader: Iterator[tuple[int, list[str]]]) -> list[str]:
    header = [cell.strip() for cell in next(reader, (0, []))[1]]
    for column in ("Path", *VIEW_COLUMNS, *CHEXPERT_COLUMNS):
        if header.count(column) != 1:
            what = "lacks" if column not in header else "has twice"
            hint = nearest(column, set(header) - set(CHEXPERT_COLUMNS)) if column not in header else ""
            raise ValueError(f"{table} {what} the column {column!r}{hint}; use the official table.")
    return header


def _state(table: Path, line: int, column: str, cell: str) -> int:
    state = _STATES.get(cell.strip())
    if state is None:
        raise ValueError(f"{table}, line {line}, column {column!r}: {cell!r} is no label; cells are 1, 0, -1 or blank.")
    return state


def _split_path(table: Path, line: int, path: str) -> tuple[str, str]:
    """(path below the data set's folder, patient) of a Path cell."""
    match = _PATH.fullmatch(path)
    if match is not None:
        return match[1], match[2]
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        problem = "leaves the data set's folder"
    elif not re.search(r"(?:^|/)patient[0-9]+/", path):
        problem = "has no patient"
    else:
        problem = "isn't a plain path of the data set"
    raise ValueError(f"{table}, line {line}: the Path {path!r} {problem}; it must look like {_EXAMPLE}.")


def _view(table: Path, line: int, side: str, view: str) -> str:
    if side == "Lateral":
        return "L"
    if side == "Frontal":
        return view.strip()
    raise ValueError(
        f"{table}, line {line}, column 'Frontal/Lateral': {side!r} is neither Frontal nor Lateral; mend the cell."
    )
