"""The sample table of a split: one structured numpy row a sample, stored as npy without pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKEN_SEPARATOR = "|"
_ROWS = 1 << 20  # that are looked at together
_TAR_BLOCK = 512  # bytes; at least one of them, the image's header, stands before it
STATE_NAMES = ("positive", "negative", "uncertain", "not_mentioned")  # of the values 1, 0, -1, -2


def table_dtype(task: str, labels: int) -> np.dtype[Any]:
    """Dtype of a sample table: see `ShardIndex.table`.  `labels` is the number of label columns."""
    fields: list[Any] = [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("key", "<u8"), ("crc", "<u4")]
    fields += [("patient", "<i4"), ("view", "<i2")]
    fields += [("labels", "i1", (labels,))] if task == "multilabel" else [("label", "<i4")]
    return np.dtype(fields)


def label_rows(labels: Sequence[Any], kind: str, names: Sequence[str]) -> NDArray[Any]:
    """Labels of records as the table keeps them: i1 [n, len(names)] of states, or <i4 [n] of classes.

    kind: "states", "classes" or "tokens"; a token that a record lists is 1 there, every other one 0.  Raises
    ValueError for a token that `names` lacks.
    """
    if kind != "tokens":
        return np.asarray(labels, "<i4" if kind == "classes" else "i1")
    place = {name: column for column, name in enumerate(names)}
    rows = np.zeros((len(labels), len(names)), "i1")
    for row, tokens in enumerate(labels):
        for token in tokens:
            if token not in place:
                raise ValueError(f"the label {token!r} is not among the {len(names)} that the source names")
            rows[row, place[token]] = 1
    return rows


def label_totals(table: NDArray[Any], task: str, label_names: Sequence[str]) -> dict[str, Any]:
    """`SplitInfo.totals` of a sample table: states per label, or samples per class."""
    if task == "multiclass":
        counts = np.bincount(table["label"], minlength=len(label_names))
        return {name: int(n) for name, n in zip(label_names, counts, strict=True)}
    states = table["labels"]
    columns = [np.count_nonzero(states == value, axis=0) for value in (1, 0, -1, -2)]
    return {
        name: {state: int(columns[s][i]) for s, state in enumerate(STATE_NAMES)} for i, name in enumerate(label_names)
    }


def count_patients(table: NDArray[Any]) -> int:
    """Number of distinct patients in a sample table (records without a patient are not counted)."""
    return int(np.unique(table["patient"][table["patient"] >= 0]).size)


def patient_numbers(codes: Iterable[str]) -> dict[str, int]:
    """Number of each distinct patient code, by rank; "" (no patient) is -1.  The order of `codes` is free."""
    distinct = sorted(set(codes) - {""})
    return {"": -1} | {code: number for number, code in enumerate(distinct)}


def rows_twice(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows whose key an earlier row has, ascending."""
    ordered = np.sort(keys)  # without the rows' numbers this takes a tenth of the time, and nearly always says no
    if not np.any(ordered[1:] == ordered[:-1]):
        return np.empty(0, np.int64)
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return np.sort(order[1:][same])


def open_table(path: Path, sha256: str, rows: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory-map a sample table read-only; ValueError, naming the file, if hash, columns or rows differ."""
    mend = (
        "copy it again, or make the folder again with make_shards --overwrite (tars that others made: scaletransfer "
        "shards index --overwrite)"
    )
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path} is damaged or of another index (sha256 differs); {mend}")
    try:
        table: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a plain npy table ({error}); {mend}") from None
    if table.dtype != dtype or table.shape != (rows,):
        raise ValueError(f"{path} does not have the columns and the {rows} rows of the index; {mend}")
    return table


def table_problem(
    table: NDArray[Any], shard_bytes: Sequence[int], views: int, classes: int, shard_samples: Sequence[int] = ()
) -> str:
    """What in a sample table contradicts its index, in words; "" if nothing does.

    shard_bytes: size of each shard; views: number of view names; classes: number of class names; shard_samples: samples
    of each shard, whose rows have to stand together in their order.
    """
    lengths = np.asarray(shard_bytes, dtype=np.int64)
    counts = np.zeros(len(lengths), dtype=np.int64)
    last = 0
    for start in range(0, len(table), _ROWS):  # what is compared takes more memory than the rows do
        rows = table[start : start + _ROWS]
        problem = _rows_problem(rows, lengths, views, classes)
        if problem:
            return problem
        shard = rows["shard"]
        if shard_samples and (shard[0] < last or np.any(shard[1:] < shard[:-1])):
            return "the rows are not in the order of the shards"
        last = int(shard[-1])
        counts += np.bincount(shard, minlength=len(lengths))
    if shard_samples and counts.tolist() != list(shard_samples):
        return "a shard has another number of rows than index.json says"
    return ""


def _rows_problem(table: NDArray[Any], lengths: NDArray[np.int64], views: int, classes: int) -> str:
    shard, offset, size = table["shard"], table["offset"], table["size"]
    if np.any((shard < 0) | (shard >= len(lengths))):
        return "a row names a shard that does not exist"
    # not offset + size > length: the sum of two hostile numbers may wrap around
    if np.any((offset < _TAR_BLOCK) | (size < 1) | (size > lengths[shard] - offset)):
        return "an image reaches outside its shard"
    if np.any((table["view"] < -1) | (table["view"] >= views)):
        return "a row names a view that the index does not have"
    if "labels" in (table.dtype.names or ()):
        states = table["labels"]
        return "a label is not one of 1, 0, -1, -2" if np.any((states < -2) | (states > 1)) else ""
    bad = np.any((table["label"] < 0) | (table["label"] >= classes))
    return f"a class number is outside 0..{classes - 1}" if bad else ""
