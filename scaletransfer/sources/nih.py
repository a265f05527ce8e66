"""NIH ChestX-ray14 (arXiv 1705.02315) as its publisher gives it out: a table, two lists, twelve archives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from scaletransfer.labels import NIH_RAW, NO_FINDING
from scaletransfer.sources.base import DEFAULT_VIEWS, Record, Source, nearest, parse_views
from scaletransfer.sources.places import find_images
from scaletransfer.sources.splits import check_share, held_out
from scaletransfer.sources.tables import Table, find_table, read_list

TABLE = "Data_Entry_2017_v2020.csv"
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
TRAIN_VAL, TEST = "train_val_list.txt", "test_list.txt"
NIH_VIEWS = ("PA", "AP")

_VALID_SHARE = 0.1
_FOLDER = "images"
# The twelve archives are images_001 to images_012; NIH's own download script saves them as images_01 to images_12.
# Unpacked in one place they make images/, unpacked one by one images_001/images/.
_PARTS = tuple(f"images_{part:0{digits}d}" for digits in (3, 2) for part in range(1, 13))
_FOLDERS = (_FOLDER, *(f"{part}/{_FOLDER}" for part in _PARTS), *_PARTS, f"{_FOLDER}/{_FOLDER}", ".")
_ARCHIVES = tuple(
    f"{where}{name}{suffix}"
    for suffix in (".zip", ".tar.gz")
    for where in ("", f"{_FOLDER}/")
    for name in (_FOLDER, *_PARTS)
)
# A file name of one part that neither hides nor breaks a line of a listing.
_NAME = re.compile(r"[^/.\\\x00-\x1f][^/\\\x00-\x1f]*")


class NIH(Source):
    """`root` is the folder that holds Data_Entry_2017_v2020.csv (or .csv.gz), train_val_list.txt and test_list.txt.

    Images lie in images/, in images_001/images/ to images_012/images/, beside the table, or in zips of those.

    Options: `views`: views to keep, names or "PA,AP"; "all" keeps every image. `protocol`: "corrected" holds
    `valid_share` of the patients of train_val_list.txt out for validation, drawn by a hash of `seed` and the patient,
    and test_list.txt is the test split; under "paper" train_val_list.txt is training and test_list.txt validation.
    Without both lists nothing is known of the official test split: then `corrected` draws from all patients, and under
    `paper` every image is training.
    """

    name = "nih"
    task = "multilabel"
    tokens = True
    licence = "NIH Clinical Center: no restriction on use; cite arXiv 1705.02315 and name the NIH Clinical Center"
    public = False

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        views: str | Iterable[str] | None = DEFAULT_VIEWS,
        protocol: str = "corrected",
        valid_share: float = _VALID_SHARE,
        seed: int = 0,
    ) -> None:
        super().__init__(root)
        if protocol not in ("corrected", "paper"):
            raise ValueError(f"protocol is {protocol!r}; it must be corrected or paper.")
        self.label_names = NIH_RAW
        self.views = parse_views(views)
        self.protocol, self.valid_share, self.seed = protocol, check_share(valid_share), seed
        if protocol == "paper" and valid_share != _VALID_SHARE:
            raise ValueError("valid_share has no meaning under the protocol paper, which validates on the test list.")
        table = find_table(self.root, TABLE)
        if table is None:
            raise ValueError(f"{self.root / TABLE} is missing; --root must be the folder of NIH ChestX-ray14.")
        self.table = Table(table, COLUMNS)
        self._lists = self._read_lists()

    def __iter__(self) -> Iterator[Record]:
        self.notes = self._notes()
        where = str(self.table.path)
        seen: dict[str, int] = {}  # Image Index -> its line
        patients: dict[str, set[str]] = {TRAIN_VAL: set(), TEST: set()}
        known: dict[str, tuple[str, ...]] = {}  # cells of findings repeat
        kept = 0
        for line, (image, cell, patient, view) in self.table.rows():
            if not _NAME.fullmatch(image):
                raise ValueError(f"{where}, line {line}: the Image Index {image!r} is no file name; mend the cell.")
            if seen.setdefault(image, line) != line:
                raise ValueError(f"{where}, line {line}: {image} is already in line {seen[image]}; remove one of them.")
            patient = patient.strip()
            if not patient:
                raise ValueError(f"{where}, line {line}: {image} has no Patient ID; mend the cell.")
            if view not in NIH_VIEWS:
                raise ValueError(
                    f"{where}, line {line}, column 'View Position': {view!r} is neither PA nor AP; mend the cell."
                )
            tokens = known.get(cell)
            if tokens is None:
                tokens = known[cell] = _tokens(f"{where}, line {line}", cell)
            listed = self._list_of(image, line)
            patients[listed].add(patient)
            split = self._split(listed, patient)
            if self.views is None or view in self.views:
                kept += split == "train"
                yield Record(
                    source_id=image,
                    split=split,
                    patient=patient,
                    image=f"{_FOLDER}/{image}",
                    labels=tokens,
                    view=view,
                    line=line,
                )
        self._check_end(seen, patients, kept)

    def locate(self, records: Sequence[Record]) -> list[Record]:
        """See Source; ValueError for an archive that has to be extracted first."""
        places = find_images(self.root, [record.source_id for record in records], _FOLDERS, _ARCHIVES)
        return [replace(record, image=places.get(record.source_id, record.image)) for record in records]

    def _read_lists(self) -> dict[str, dict[str, int]]:
        """{file name: {image: line}} of both lists, or nothing where there is neither."""
        there = [name for name in (TRAIN_VAL, TEST) if (self.root / name).is_file()]
        if len(there) == 1:
            missing = TEST if there == [TRAIN_VAL] else TRAIN_VAL
            raise ValueError(
                f"{self.root / missing} is missing beside {there[0]}; the official split needs both lists."
            )
        lists = {name: read_list(self.root / name) for name in there}
        for image, line in lists.get(TEST, {}).items():
            if image in lists[TRAIN_VAL]:
                raise ValueError(
                    f"{self.root / TEST}, line {line}: {image} is also in {TRAIN_VAL}, line "
                    f"{lists[TRAIN_VAL][image]}; use the official lists."
                )
        return lists

    def _list_of(self, image: str, line: int) -> str:
        """The list that names an image; without lists all of it is train_val."""
        if not self._lists:
            return TRAIN_VAL
        for name, images in self._lists.items():
            if image in images:
                return name
        raise ValueError(
            f"{self.table.path}, line {line}: {image} is neither in {TRAIN_VAL} nor in {TEST}; "
            "use the table and the lists of one release."
        )

    def _split(self, listed: str, patient: str) -> str:
        if self.protocol == "paper":
            return "train" if listed == TRAIN_VAL else "valid"
        if listed == TEST:
            return "test"
        return "valid" if held_out(patient, self.valid_share, self.seed) else "train"

    def _check_end(self, seen: dict[str, int], patients: dict[str, set[str]], kept: int) -> None:
        """What only a whole pass can tell."""
        for name, images in self._lists.items():
            for image, line in images.items():
                if image not in seen:
                    raise ValueError(
                        f"{self.root / name}, line {line}: {self.table.path.name} has no row of {image}; "
                        "use the table and the lists of one release."
                    )
        shared = patients[TRAIN_VAL] & patients[TEST]
        if shared:
            raise ValueError(
                f"{len(shared)} of {len(patients[TEST])} patients of {self.root / TEST} are in {TRAIN_VAL} as well "
                f"(the first is {min(shared)}); testing would be on patients seen in training: use the official lists."
            )
        if not kept:
            wanted = ", ".join(sorted(self.views)) if self.views is not None else "all"
            raise ValueError(
                f"{self.table.path} has no training row with the views {wanted}; choose others by --views, or, where "
                f"all patients were held out (valid_share {self.valid_share}), another seed."
            )

    def _notes(self) -> list[str]:
        if not self._lists:
            among = "train" if self.protocol == "paper" else "train and valid"
            return [
                f"{TRAIN_VAL} and {TEST} are not there, so the official test images are among {among}: "
                "test what is trained on this only on other data."
            ]
        if self.protocol == "paper":
            return [
                f"under the protocol paper the split valid is the official {TEST}, by which the published best epochs "
                "were chosen: a figure of it is no test figure."
            ]
        return []


def _tokens(where: str, cell: str) -> tuple[str, ...]:
    """The findings of a cell "A|B", in its order; ValueError, with `where`, for what the data set doesn't know."""
    tokens = tuple(token.strip() for token in cell.split("|") if token.strip())
    for token in tokens:
        if token not in NIH_RAW:
            raise ValueError(
                f"{where}, column 'Finding Labels': there is no finding {token!r}{nearest(token, NIH_RAW)}; "
                "use the official table."
            )
    if not tokens or (NO_FINDING in tokens and set(tokens) != {NO_FINDING}):
        problem = f"{NO_FINDING} stands beside a finding" if tokens else "the cell is empty"
        raise ValueError(f"{where}, column 'Finding Labels': {problem} ({cell!r}); mend the cell.")
    return tokens
