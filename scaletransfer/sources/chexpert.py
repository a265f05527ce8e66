"""CheXpert (arXiv 1901.07031) in the official layouts CheXpert-v1.0 and CheXpert-v1.0-small."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from scaletransfer.labels import CHEXPERT_COLUMNS, CHEXPERT_RAW, NOT_MENTIONED, SHOWN_NAMES
from scaletransfer.sources.base import DEFAULT_VIEWS, VIEWS, Record, Source, nearest, parse_views
from scaletransfer.sources.tables import Table, find_table

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
        train, valid = find_table(folder, "train.csv"), find_table(folder, "valid.csv")
        if train is None:
            raise ValueError(
                f"{folder / 'train.csv'} is missing; --root must be the official CheXpert folder "
                f"({' or '.join(FOLDERS)}) or the folder that holds it."
            )
        columns = ("Path", *VIEW_COLUMNS, *(OWN_NAMES[name] for name in self.label_names))
        self.tables = {split: Table(path, columns) for split, path in (("train", train), ("valid", valid)) if path}

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
                    other = self.tables["train" if first > 0 else "valid"].path.name
                    raise ValueError(
                        f"{table.path}, line {line}: the Path {record.source_id} is already in {other}, line "
                        f"{abs(first)}; remove one of the two rows."
                    )
                patients[split].add(record.patient)
                if self.views is None or record.view in self.views:
                    kept += split == "train"
                    yield record
            if empty:
                raise ValueError(f"{table.path} has no row below its header; download it again, or take it away.")
        shared = patients["train"] & patients.get("valid", set())
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(patients['valid'])} patients of {self.tables['valid'].path} are in "
                f"{self.tables['train'].path.name} as well (the first is {min(shared)}); "
                "validation would be on patients seen in training: take them out of one of the tables."
            )
        if not kept:
            wanted = ", ".join(sorted(self.views)) if self.views is not None else "all"
            raise ValueError(
                f"{self.tables['train'].path} has no row with the views {wanted}; choose others by --views."
            )

    def _rows(self, split: str, table: Table) -> Iterator[tuple[int, Record]]:
        """(line number, record) of every row of one table, whatever its view."""
        # Most rows repeat one of a few thousand combinations of cells; reading them once halves the time.
        known: dict[tuple[str, ...], tuple[int, ...]] = {}
        for line, (path, side, view, *cells) in table.rows():
            labels = known.get(tuple(cells))
            if labels is None:
                where = f"{table.path}, line {line}"
                labels = tuple(
                    state(where, OWN_NAMES[name], cell) for name, cell in zip(self.label_names, cells, strict=True)
                )
                known[tuple(cells)] = labels
            image, patient = _split_path(table.path, line, path)
            yield (
                line,
                Record(
                    source_id=path,
                    split=split,
                    patient=patient,
                    image=self._prefix + image,
                    labels=labels,
                    view=_view(table.path, line, side, view),
                    line=line,
                ),
            )


def _find_folder(root: Path) -> tuple[str, Path]:
    """(prefix of image paths, the folder with the tables): the root itself, or an official folder below
    it."""
    if find_table(root, "train.csv") is not None:
        return "", root
    below = [name for name in FOLDERS if (root / name).is_dir()]
    if len(below) > 1:
        raise ValueError(f"{root} holds both {below[0]} and {below[1]}; give one of them by --root.")
    return (f"{below[0]}/", root / below[0]) if below else ("", root)


def state(where: str, column: str, cell: str) -> int:
    """The raw state that a cell of the CheXpert labeler's output says; ValueError, with `where`, for another cell."""
    found = _STATES.get(cell.strip())
    if found is None:
        raise ValueError(f"{where}, column {column!r}: {cell!r} is no label; cells are 1, 0, -1 or blank.")
    return found


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
        position = view.strip()
        if position and position not in VIEWS:
            raise ValueError(
                f"{table}, line {line}, column 'AP/PA': there is no view {position!r}{nearest(position, VIEWS)}; "
                "mend the cell."
            )
        return position
    raise ValueError(
        f"{table}, line {line}, column 'Frontal/Lateral': {side!r} is neither Frontal nor Lateral; mend the cell."
    )
