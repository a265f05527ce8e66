"""The table that `make_shards --list` writes: what will be sharded, to be looked at before it is.

It is the one place where identifiers of the data set (source_id, patient) stand beside our keys.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

import numpy as np

from scaletransfer.keys import key
from scaletransfer.labels import (
    NEGATIVE,
    NOT_MENTIONED,
    POLICY_NAMES,
    POSITIVE,
    UNCERTAIN,
    targets,
    vocabulary,
)
from scaletransfer.sources import Record

COLUMNS = ("key", "split", "patient", "view", "image", "source_id")
LABEL_MODES = ("raw", *POLICY_NAMES)

# Rows that are turned into targets at once; the whole table never lies in memory.
_CHUNK = 8192
_CELLS = {POSITIVE: "1", NEGATIVE: "0", UNCERTAIN: "-1", NOT_MENTIONED: ""}
_COUNTED = {"1": "positive", "0": "negative", "-1": "uncertain", "": "unknown"}


class RecordSource(Protocol):
    """What the listing needs of a source (`scaletransfer.sources.Source`)."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def label_names(self) -> tuple[str, ...]: ...
    def __iter__(self) -> Iterator[Record]: ...


def write_listing(source: RecordSource, out_csv: Path, labels: str, salt: bytes) -> dict[str, object]:
    """Write one row a record, in the source's order, to `out_csv`.

    labels: "raw" (cells 1, 0, -1, empty for not mentioned; with the column "No Finding"), or the label
    policy "paper" or "corrected" with its defaults (cells 1, 0, empty for unknown). A multi-class source has
    one column `label`, the class index, in every mode. Columns before the labels: COLUMNS.

    Returns counts: "rows"; "splits" {split: n}; "patients" {split: n}, of those that have an id; "labels"
    {column: {"positive", "negative", "uncertain", "unknown": n}}, or {class name: n} where there are classes.

    The file appears complete or not at all. Raises ValueError for an unknown mode and what the source raises.
    """
    if labels not in LABEL_MODES:
        near = difflib.get_close_matches(labels, LABEL_MODES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"--labels is {labels!r}; it must be one of {', '.join(LABEL_MODES)}{hint}.")
    multilabel = source.task == "multilabel"
    names = vocabulary(source.name, labels, source.label_names) if multilabel else ("label",)
    rows = 0
    splits: dict[str, int] = {}
    patients: dict[str, set[str]] = {}
    counts = np.zeros((len(names), len(_COUNTED)), np.int64)
    classes = np.zeros(len(source.label_names), np.int64)
    with _written_whole(out_csv) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*COLUMNS, *names])
        for records in _chunks(source):
            rows += len(records)
            if multilabel:
                cells = _state_cells(source, records, labels)
                counts += np.stack([(cells == cell).sum(0) for cell in _COUNTED], axis=1)
                shown: Sequence[Sequence[str]] = cells.tolist()
            else:
                classes += np.bincount([_class(record) for record in records], minlength=len(classes))
                shown = [[str(record.labels)] for record in records]
            for record, last in zip(records, shown, strict=True):
                splits[record.split] = splits.get(record.split, 0) + 1
                if record.patient:
                    patients.setdefault(record.split, set()).add(record.patient)
                first = (
                    key(source.name, record.source_id, salt),
                    record.split,
                    record.patient,
                    record.view,
                    record.image,
                    record.source_id,
                )
                writer.writerow((*first, *last))
    totals: dict[str, object] = (
        {name: dict(zip(_COUNTED.values(), row.tolist(), strict=True)) for name, row in zip(names, counts, strict=True)}
        if multilabel
        else dict(zip(source.label_names, classes.tolist(), strict=True))
    )
    found = {split: len(patients.get(split, ())) for split in splits}
    return {"rows": rows, "splits": splits, "patients": found, "labels": totals}


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _state_cells(source: RecordSource, records: Sequence[Record], labels: str) -> np.ndarray:
    """Label cells of the records as an array of strings [n, columns]."""
    raw = np.array([record.labels for record in records], np.int8).reshape(len(records), len(source.label_names))
    states = raw
    if labels != "raw":
        values = targets(raw, source.label_names, source.name, labels)
        states = np.where(np.isnan(values), NOT_MENTIONED, np.nan_to_num(values)).astype(np.int8)
    table = np.array([_CELLS[state] for state in range(NOT_MENTIONED, POSITIVE + 1)])
    return table[states - NOT_MENTIONED]


def _class(record: Record) -> int:
    assert isinstance(record.labels, int), "a record of a multi-class source has a class index"
    return record.labels


@contextmanager
def _written_whole(path: Path) -> Iterator[TextIO]:
    """A text stream to a file that replaces `path` when the block ends well, and leaves nothing when it
    doesn't."""
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"can't be written: {path.parent} is no folder"
        raise ValueError(f"The listing {path} {problem}; give a file in an existing folder by --list.")
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as stream:
            # mkstemp makes files private; a listing gets what any new file of this user gets.
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(stream.fileno(), 0o666 & ~mask)
            yield stream
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
