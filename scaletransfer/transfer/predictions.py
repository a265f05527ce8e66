"""The predictions of every image as a table, and every score again from that table alone."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer import keys as keys_of
from scaletransfer.index import ShardIndex
from scaletransfer.transfer.scores import probabilities

PREDICTIONS = "predictions.csv"
WIDE = 200
"""Classes up to which predictions have a column a class; beyond, the five most probable."""


Part = tuple[dict[str, np.ndarray], ShardIndex, str]
"""``predict``'s result on a split of an index, the index, the split."""


def write_predictions(path: Path, task: str, parts: Sequence[Part], names: Sequence[str]) -> None:
    """One row an image: key, for image files their path (but of a data set whose identifiers are kept secret, where it
    would name the patient), labels, probabilities.

    Multi-class: ``label``, ``predicted`` and ``p:<class>`` (above 200 classes the five most probable as
    ``class_1, p_1, ...``). Multi-label: ``label:<name>`` (1, 0, empty for unknown) and ``p:<name>``. ``patient``, where
    patients are known, is their number in this set and means nothing outside of it. Probabilities are written in full,
    so that ``read_predictions`` and ``scores.summarise`` give every score again. Atomic.

    parts: of one data set, or of each of several that were merged.
    """
    named = all(i.in_memory and i.salt_fingerprint == keys_of.fingerprint(keys_of.PUBLIC_SALT) for _, i, _ in parts)
    grouped = any((index.table(split)["patient"] >= 0).any() for _, index, split in parts)
    wide = task == "multilabel" or len(names) <= WIDE
    header = ["key", *(["image"] if named else []), *(["patient"] if grouped else [])]
    if task == "multilabel":
        header += [f"label:{name}" for name in names] + [f"p:{name}" for name in names]
    elif wide:
        header += ["label", "predicted", *(f"p:{name}" for name in names)]
    else:
        header += ["label", *(f"{what}_{rank}" for rank in range(1, 6) for what in ("class", "p"))]
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(_lines(task, parts, names, named, grouped, wide))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): make room there, and give the same command again"
        ) from error


def _lines(
    task: str, parts: Sequence[Part], names: Sequence[str], named: bool, grouped: bool, wide: bool
) -> Iterator[list[Any]]:
    first = 0
    for predicted, index, split in parts:
        table = index.table(split)[predicted["position"]]
        files = [shard.file for shard in index.splits[split].shards] if named else []
        p = probabilities(predicted["logits"], task)
        keys = index.keys(split, predicted["position"])
        for number, (key, target) in enumerate(zip(keys, predicted["target"], strict=True)):
            line: list[Any] = [key, *([files[int(table["shard"][number])]] if named else [])]
            if grouped:
                patient = int(table["patient"][number])
                line.append("" if patient < 0 else first + patient)
            yield line + _cells(target, p[number], names, task, wide)
        first += int(index.table(split)["patient"].max(initial=-1)) + 1


def _cells(target: Any, p: np.ndarray, names: Sequence[str], task: str, wide: bool) -> list[Any]:
    """Labels and probabilities of one image."""
    shown = [repr(float(value)) for value in p] if wide else []
    if task == "multilabel":
        return ["" if np.isnan(value) else int(value) for value in target] + shown
    if wide:
        return [names[int(target)], names[int(p.argmax())], *shown]
    best = np.argsort(-p, kind="stable")[:5].tolist()
    return [names[int(target)], *(cell for one in best for cell in (names[one], repr(float(p[one]))))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a predictions file holds."""

    task: str
    names: tuple[str, ...]
    keys: tuple[str, ...]
    probability: np.ndarray
    """float64 [n, L]."""
    target: np.ndarray
    """int64 [n] classes, or float64 [n, L] labels with NaN for unknown."""
    groups: np.ndarray
    """int64 [n] patients, -1 for none."""

    @property
    def sources(self) -> list[str]:
        """The source of each image: what stands before the last dash of its key."""
        return [key.rpartition("-")[0] for key in self.keys]


def read_predictions(path: Path) -> Predictions:
    """Read a file of ``write_predictions``, or one of the same columns from elsewhere (``patient`` may be any text).

    Raises:
        ValueError: no such file, columns that are missing, a cell that is no probability or label, or a file with the
            five most probable classes only.
    """
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            rows, header = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a predictions.csv of finetune or evaluate") from error
    names = tuple(column[2:] for column in header if column.startswith("p:"))
    multilabel = any(column.startswith("label:") for column in header)
    if "p_1" in header:
        raise ValueError(f"{path} has the five most probable classes only: scores need all, evaluate the model again")
    wanted = ["key", *([f"label:{name}" for name in names] if multilabel else ["label"])]
    missing = [column for column in wanted if column not in header]
    if missing or not names:
        raise ValueError(f"{path} lacks the column {(missing or ['p:<class>'])[0]}: it is no file of predictions")
    if not rows:
        raise ValueError(f"{path} has no row: there is nothing to score")
    place = {name: number for number, name in enumerate(names)}
    probability = np.empty((len(rows), len(names)))
    target: list[Any] = []
    for number, row in enumerate(rows):
        where = f"{path}, row {number + 1}"
        probability[number] = [_number(row[f"p:{name}"], f"{where}, p:{name}", 0.0, 1.0) for name in names]
        if multilabel:
            cells = [(row[f"label:{name}"], f"{where}, label:{name}") for name in names]
            target.append([np.nan if cell == "" else float(_number(cell, at, 0.0, 1.0)) for cell, at in cells])
        elif row["label"] not in place:
            raise ValueError(f"{where}: {row['label']!r} is none of the classes that have a column p:<class>")
        else:
            target.append(place[row["label"]])
    patients = [row.get("patient") or "" for row in rows]
    known = sorted({*patients} - {""}, key=lambda name: (len(name), name))  # numbers in the order of numbers
    codes = {name: number for number, name in enumerate(known)}
    return Predictions(
        task="multilabel" if multilabel else "multiclass",
        names=names,
        keys=tuple(row["key"] for row in rows),
        probability=probability,
        target=np.array(target, dtype=np.float64 if multilabel else np.int64),
        groups=np.array([codes.get(name, -1) for name in patients], dtype=np.int64),
    )


def _number(cell: Any, where: str, low: float, high: float) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise ValueError(f"{where}: {cell!r} is no number of {low:g} to {high:g}")
    return value
