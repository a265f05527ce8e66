"""Rows of a synthetic CheXpert table: whole patients of the real table, or drawn ones, and what is true of
each."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scaletransfer.labels import CHEXPERT_COLUMNS, NEGATIVE, NO_FINDING, NOT_MENTIONED, POSITIVE, UNCERTAIN

FINDINGS = tuple(column for column in CHEXPERT_COLUMNS if column != NO_FINDING)
HEADER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_COLUMNS)

_CELLS = {POSITIVE: "1.0", NEGATIVE: "0.0", UNCERTAIN: "-1.0", NOT_MENTIONED: ""}
_STATES = {cell: state for state, cell in _CELLS.items()}
_PATH = re.compile(r".*/patient(\d+)/study(\d+)/([^/]+)")

# A finding that the report doesn't mention is there now and then: labels of reports are not the whole truth.
_UNMENTIONED = 0.03

# Shares of 1, 0 and -1 among the 223,414 rows of train.csv (computed from the table that torchxrayvision
# ships), for rows that are drawn because the table isn't there.
_SHARES: dict[str, tuple[float, float, float]] = {
    "Enlarged Cardiomediastinum": (0.048, 0.097, 0.056),
    "Cardiomegaly": (0.121, 0.050, 0.036),
    "Lung Opacity": (0.473, 0.030, 0.025),
    "Lung Lesion": (0.041, 0.006, 0.007),
    "Edema": (0.234, 0.093, 0.058),
    "Consolidation": (0.066, 0.126, 0.124),
    "Pneumonia": (0.027, 0.013, 0.084),
    "Atelectasis": (0.149, 0.006, 0.151),
    "Pneumothorax": (0.087, 0.252, 0.014),
    "Pleural Effusion": (0.386, 0.158, 0.052),
    "Pleural Other": (0.016, 0.001, 0.012),
    "Fracture": (0.041, 0.011, 0.003),
    "Support Devices": (0.519, 0.028, 0.005),
}
_NO_FINDING_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class Row:
    """One image of the table."""

    patient: int
    study: int
    file: str
    sex: str
    age: int
    side: str
    """Frontal or Lateral."""
    view: str
    """AP, PA, LL, RL; "" for a lateral image."""
    states: tuple[int, ...]
    """Raw states in the order of CHEXPERT_COLUMNS."""

    @property
    def frontal(self) -> bool:
        """Whether it is one of the views PA and AP."""
        return self.view in ("PA", "AP")

    def cells(self, folder: str, split: str) -> list[str]:
        """The row as the official table writes it."""
        path = f"{folder}/{split}/patient{self.patient:05d}/study{self.study}/{self.file}"
        return [path, self.sex, str(self.age), self.side, self.view, *(_CELLS[s] for s in self.states)]


def real_table() -> Path | None:
    """CheXpert's train.csv.gz inside the installed torchxrayvision, found without importing it (it needs
    torch)."""
    spec = importlib.util.find_spec("torchxrayvision")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        table = Path(folder) / "data" / "chexpert_train.csv.gz"
        if table.is_file():
            return table
    return None


def read_rows(table: Path) -> list[Row]:
    """All rows of the real table. Raises ValueError if it isn't the table that we know."""
    rows = []
    with gzip.open(table, "rt", encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        if tuple(header) != HEADER:
            raise ValueError(f"{table} hasn't the columns of CheXpert's train.csv; use --table drawn.")
        for path, sex, age, side, view, *cells in reader:
            match = _PATH.fullmatch(path)
            if match is None or not set(cells) <= _STATES.keys():
                raise ValueError(f"{table}, line {reader.line_num}: unexpected cells; use --table drawn.")
            states = tuple([_STATES[cell] for cell in cells])
            rows.append(Row(int(match[1]), int(match[2]), match[3], sex, int(age), side, view, states))
    return rows


def draw_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """At least `count` rows of drawn patients with about the real table's shares of views and label
    states."""
    rows: list[Row] = []
    patient = 0
    while len(rows) < count:
        patient += 1
        sex, age = draw_person(rng)
        for study in range(1, int(rng.geometric(0.35)) + 1):
            states = _draw_states(rng)
            view = "AP" if rng.uniform() < 0.80 else "PA"
            rows.append(Row(patient, study, "view1_frontal.jpg", sex, age, "Frontal", view, states))
            if rng.uniform() < (0.75 if view == "PA" else 0.05):
                rows.append(Row(patient, study, "view2_lateral.jpg", sex, age, "Lateral", "", states))
    return rows


def draw_person(rng: np.random.Generator) -> tuple[str, int]:
    """(sex, age in years) with about the real table's shares."""
    sex = str(rng.choice(("Male", "Female"), p=(0.594, 0.406)))
    return sex, int(np.clip(rng.normal(60, 18), 18, 90))


def _draw_states(rng: np.random.Generator) -> tuple[int, ...]:
    healthy = rng.uniform() < _NO_FINDING_SHARE
    states = {NO_FINDING: POSITIVE if healthy else NOT_MENTIONED}
    for name, (positive, negative, uncertain) in _SHARES.items():
        if healthy and name != "Support Devices":
            positive = uncertain = 0.0
        draw = rng.uniform()
        if draw < positive:
            states[name] = POSITIVE
        elif draw < positive + negative:
            states[name] = NEGATIVE
        else:
            states[name] = UNCERTAIN if draw < positive + negative + uncertain else NOT_MENTIONED
    return tuple(states[column] for column in CHEXPERT_COLUMNS)


def choose(rows: Sequence[Row], count: int, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows), `count` together, whole patients, in the order of `rows`.

    A tenth of the rows is for validation. Before the rest is filled by chance, patients are taken so that
    each split has every finding (training: also its absence, and uncertain, lateral and No Finding rows) as
    far as room goes. `rows` of a patient must follow each other.
    """
    numbers = np.array([row.patient for row in rows])
    starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
    sizes = np.diff(np.r_[starts, len(rows)])
    states = np.array([row.states for row in rows], np.int8)
    frontal = np.array([row.frontal for row in rows])

    def holds(of_row: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return np.logical_or.reduceat(of_row, starts)

    columns = [CHEXPERT_COLUMNS.index(name) for name in FINDINGS]
    positive = [holds(frontal & (states[:, column] == POSITIVE)) for column in columns]
    negative = [holds(frontal & (states[:, column] == NEGATIVE)) for column in columns]
    other = [
        holds(frontal & (states == UNCERTAIN).any(1)),
        holds(frontal & (states[:, CHEXPERT_COLUMNS.index(NO_FINDING)] == POSITIVE)),
        holds(np.array([row.side == "Lateral" for row in rows])),
    ]
    order = rng.permutation(len(starts))
    free = np.ones(len(starts), bool)
    held_out = max(1, round(count / 10))
    valid = _take(order, sizes, free, positive, held_out, quota=max(1, held_out // 25), share=0.7)
    train = _take(
        order,
        sizes,
        free,
        [*positive, *negative, *other],
        count - held_out,
        quota=max(1, min(8, count // 200)),
    )
    parts = []
    for chosen in (train, valid):
        parts.append([rows[i] for p in sorted(chosen) for i in range(starts[p], starts[p] + sizes[p])])
    return parts[0], parts[1]


def _take(
    order: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    free: npt.NDArray[np.bool_],
    needs: list[npt.NDArray[np.bool_]],
    room: int,
    *,
    quota: int,
    share: float = 1.0,
) -> list[int]:
    """Patients with `room` rows together: first `quota` for each need, the rarest need first, within `share`
    of the room, then any, in `order`. Marks them as no longer free."""
    chosen: list[int] = []
    limit = round(room * (1 - share))  # room that the needs leave
    cap = max(2, room // 30)
    for need in sorted(needs, key=lambda need: int(need.sum())):
        missing = quota - int(need[chosen].sum())
        for patient in order[(need & free & (sizes <= cap))[order]][: max(0, missing)]:
            if room - sizes[patient] >= limit:
                chosen.append(int(patient))
                free[patient] = False
                room -= int(sizes[patient])
    for patient in order:
        if not room:
            break
        if free[patient] and sizes[patient] <= room:
            chosen.append(int(patient))
            free[patient] = False
            room -= int(sizes[patient])
    if room:
        raise ValueError(f"{room} rows are left over that no patient fits; give another --rows or --seed.")
    return chosen


def truth(row: Row, seed: int) -> dict[str, float]:
    """What the picture of a row shows: finding (official name) -> strength. A finding that is stated is
    there, one that is denied isn't, an uncertain one is there for every second study, an unmentioned one
    rarely, and none of them but Support Devices where the report says No Finding. All images of a study show
    the same."""
    healthy = row.states[CHEXPERT_COLUMNS.index(NO_FINDING)] == POSITIVE
    present = {}
    for name in FINDINGS:
        draw, strength = np.random.default_rng((seed, 4, row.patient, row.study, zlib.crc32(name.encode()))).random(2)
        state = row.states[CHEXPERT_COLUMNS.index(name)]
        chance = {POSITIVE: 1.0, NEGATIVE: 0.0, UNCERTAIN: 0.5, NOT_MENTIONED: _UNMENTIONED}[state]
        if healthy and name != "Support Devices":
            chance = 0.0
        if draw < chance:
            present[name] = 0.65 + 0.35 * float(strength)
    return present


def known(row: Row, present: dict[str, float]) -> Row:
    """The row with every label 1 or 0, as in the official valid.csv, which radiologists read."""
    states = {name: POSITIVE if name in present else NEGATIVE for name in FINDINGS}
    sick = any(name != "Support Devices" for name in present)
    states[NO_FINDING] = NEGATIVE if sick else POSITIVE
    values = tuple(states[column] for column in CHEXPERT_COLUMNS)
    return Row(row.patient, row.study, row.file, row.sex, row.age, row.side, row.view, values)
