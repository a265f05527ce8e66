"""The table that `make_shards --list` writes: what will be sharded, to be looked at before it is.

It is the one place where identifiers of the data set (source_id, patient) stand beside our keys.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import os
import tempfile
from collections import Counter
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
from scaletransfer.sample_table import TOKEN_SEPARATOR, label_rows
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
    @property
    def label_kind(self) -> str: ...
    def listed(self) -> Iterator[Record]: ...


def write_listing(source: RecordSource, out_csv: Path, labels: str, salt: bytes) -> dict[str, object]:
    """Write one row a record, in the order of the official table, to `out_csv`.

    labels: "raw" (cells 1, 0, -1, empty for not mentioned; with the column "No Finding"; where the data set lists
    tokens, one column `tokens` of them joined by "|"), or the label policy "paper" or "corrected" with its defaults
    (cells 1, 0, empty for unknown). A multi-class source has one column `label`, the class index, in every mode.
    Columns before the labels: COLUMNS.

    Returns counts: "rows"; "splits" {split: n}; "patients" {split: n}, of those that have an id; "labels"
    {column: {"positive", "negative", "uncertain", "unknown": n}}, or {name: n} of classes and of raw tokens.

    The file appears complete or not at all. Raises ValueError for an unknown mode and what the source raises.
    """
    if labels not in LABEL_MODES:
        near = difflib.get_close_matches(labels, LABEL_MODES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"--labels is {labels!r}; it must be one of {', '.join(LABEL_MODES)}{hint}.")
    columns: _Columns
    if source.label_kind == "classes":
        columns = _Classes(source.label_names)
    elif source.label_kind == "tokens" and labels == "raw":
        columns = _Tokens()
    else:
        columns = _States(source, labels)
    rows = 0
    splits: dict[str, int] = {}
    patients: dict[str, set[str]] = {}
    with _written_whole(out_csv) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*COLUMNS, *columns.names])
        for records in _chunks(source.listed()):
            rows += len(records)
            for record, last in zip(records, columns.cells(records), strict=True):
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
    found = {split: len(patients.get(split, ())) for split in splits}
    return {"rows": rows, "splits": splits, "patients": found, "labels": columns.totals()}


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


class _Columns(Protocol):
    """Label columns of the listing."""

    @property
    def names(self) -> Sequence[str]: ...

    def cells(self, records: Sequence[Record]) -> Sequence[Sequence[str]]:
        """Cells of the records, which are counted."""
        ...

    def totals(self) -> dict[str, object]:
        """What was counted so far."""
        ...


class _States:
    """A column a finding: 1, 0, -1 or empty."""

    def __init__(self, source: RecordSource, labels: str) -> None:
        self._source, self._labels = source, labels
        self.names = vocabulary(source.name, labels, source.label_names)
        self._counts = np.zeros((len(self.names), len(_COUNTED)), np.int64)

    def cells(self, records: Sequence[Record]) -> Sequence[Sequence[str]]:
        source = self._source
        states = label_rows([record.labels for record in records], source.label_kind, source.label_names)
        if self._labels != "raw":
            values = targets(states, source.label_names, source.name, self._labels)
            states = np.where(np.isnan(values), NOT_MENTIONED, np.nan_to_num(values)).astype(np.int8)
        table = np.array([_CELLS[state] for state in range(NOT_MENTIONED, POSITIVE + 1)])
        cells = table[states - NOT_MENTIONED]
        self._counts += np.stack([(cells == cell).sum(0) for cell in _COUNTED], axis=1)
        return cells.tolist()  # type: ignore[no-any-return]

    def totals(self) -> dict[str, object]:
        rows = (dict(zip(_COUNTED.values(), row.tolist(), strict=True)) for row in self._counts)
        return dict(zip(self.names, rows, strict=True))


class _Tokens:
    """One column with what the data set lists."""

    names = ("tokens",)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def cells(self, records: Sequence[Record]) -> Sequence[Sequence[str]]:
        listed = [record.labels for record in records if isinstance(record.labels, tuple)]
        self._counts.update(str(token) for tokens in listed for token in tokens)
        return [[TOKEN_SEPARATOR.join(map(str, tokens))] for tokens in listed]

    def totals(self) -> dict[str, object]:
        return dict(self._counts.most_common())


class _Classes:
    """One column with the class index."""

    names = ("label",)

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes, self._counts = classes, np.zeros(len(classes), np.int64)

    def cells(self, records: Sequence[Record]) -> Sequence[Sequence[str]]:
        self._counts += np.bincount([_class(record) for record in records], minlength=len(self._counts))
        return [[str(record.labels)] for record in records]

    def totals(self) -> dict[str, object]:
        return dict(zip(self._classes, self._counts.tolist(), strict=True))


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
