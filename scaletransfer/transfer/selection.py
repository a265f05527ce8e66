"""Few-shot selections: n training samples a class, from the sample table alone. No image is opened.

Each class's samples are put into an order that depends on the seed and their keys only; the first n are taken. A
selection for fewer examples is therefore part of every larger one of the same seed, and the same images give the same
selection from a folder and from shards with equal keys. ``select_paper`` replays the published code's instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaletransfer import labels
from scaletransfer.files import field_of, json_bytes, strings_of, write_atomically
from scaletransfer.index import ShardIndex
from scaletransfer.transfer.data import shortened
from scaletransfer.transfer.parts import scrambled

FORMAT = "scaletransfer-selection"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Chosen training samples."""

    rows: np.ndarray
    """int64 [N], rows of the sample table, in ascending order of the samples' keys."""
    keys: tuple[str, ...]
    """Their keys, in the same order."""
    shot: int | None
    """Examples a class that were asked for; None: all."""
    seed: int

    @property
    def sha256(self) -> str:
        """Of the keys, one a line."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()


def select(
    index: ShardIndex,
    split: str,
    targets: np.ndarray,
    names: Sequence[str],
    *,
    shot: int | None,
    seed: int,
    allow_fewer: bool = False,
) -> Selection:
    """``shot`` samples of each class, or all samples.

    targets: int64 [n] classes, or float32 [n, L] labels with NaN for unknown, of all n rows of the split; names: of
    the classes or labels. Multi-label: the first ``shot`` samples in which a label is 1, for every label; a sample
    that has several labels is there once.

    Raises:
        ValueError: a class with fewer than ``shot`` samples (unless ``allow_fewer``) or with none, no known label, or
            a ``shot`` below 1.
    """
    keys = index.table(split)["key"]
    if shot is None:
        rows = np.arange(len(keys))
    else:
        if shot < 1:
            raise ValueError(f"examples_per_class must be 1 or more, not {shot}")
        order = np.argsort(scrambled(keys, f"few-shot/{seed}"), kind="stable")
        in_order = targets[order]
        chosen = []
        for number, name in enumerate(names):
            has = in_order == number if targets.ndim == 1 else in_order[:, number] == 1
            mine = order[has][:shot]
            if len(mine) < shot and not allow_fewer:
                raise _too_few(name, len(mine), shot)
            chosen.append(mine)
        rows = np.unique(np.concatenate(chosen))
        if len(rows) == 0:
            raise ValueError(f"no training sample of {index.where} has any of the labels {', '.join(names)}")
    rows = rows[np.argsort(keys[rows], kind="stable")]
    return Selection(rows=rows, keys=tuple(index.keys(split, rows)), shot=shot, seed=seed)


def select_paper(
    index: ShardIndex,
    split: str,
    targets: np.ndarray,
    names: Sequence[str],
    *,
    shot: int,
    seed: int,
    allow_fewer: bool = False,
) -> tuple[Selection, str]:
    """The selection that the released code of arXiv 2106.00116 makes, and a sentence on how.

    Sets without a label table: images in the order of ``torch.randperm`` after ``manual_seed(seed)``; each class keeps
    the last ``shot`` that were seen when every class has as many. Sets with one (X-ray tables): of each class the
    first ``shot`` after a shuffle by ``numpy.random.RandomState(seed)``; a short class gives what it has, and an image
    of several is there once.

    Arguments and ValueError as ``select``. Images are counted in the order of the data set's own files: of shards,
    whose images were shuffled when they were made, ValueError.
    """
    if not index.in_memory:
        raise ValueError(
            f"few_shot: paper needs the data set's own files, whose order it replays; {index.where} is a folder of "
            "shards: set few_shot=nested, or name the files by data.images or data.source"
        )
    if shot < 1:
        raise ValueError(f"examples_per_class must be 1 or more, not {shot}")
    own = _published_order(index, split)
    if index.source in labels.STATE_SOURCES or index.source == labels.PADCHEST:
        found, short = _first_of_each(targets[own], len(names), shot, seed)
        note = f"few-shot selection as published: the first {shot} of each label after RandomState({seed})"
        note += f"; {shortened([names[c] for c in short])} have fewer" if short else ""
    else:
        found = _last_seen(targets[own], names, shot, seed, allow_fewer)
        note = f"few-shot selection as published: the last {shot} seen of each class in the order of randperm({seed})"
    rows = own[found]
    if len(rows) == 0:
        raise ValueError(f"no training sample of {index.where} has any of the labels {shortened(names)}")
    keys = index.table(split)["key"]
    rows = rows[np.argsort(keys[rows], kind="stable")]
    return Selection(rows=rows, keys=tuple(index.keys(split, rows)), shot=shot, seed=seed), note


def _last_seen(classes: np.ndarray, names: Sequence[str], shot: int, seed: int, allow_fewer: bool) -> np.ndarray:
    counts = np.bincount(classes, minlength=len(names))
    for number, name in enumerate(names):
        if counts[number] < shot and not allow_fewer:
            raise _too_few(name, int(counts[number]), shot)
    kept: list[deque[int]] = [deque(maxlen=shot) for _ in names]
    missing = int(np.minimum(counts, shot).sum())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randperm(len(classes), generator=generator).tolist():
        mine = kept[classes[place]]
        missing -= len(mine) < shot
        mine.append(place)
        if not missing:
            break
    return np.array([place for mine in kept for place in mine], dtype=np.int64)


def _first_of_each(targets: np.ndarray, count: int, shot: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Places, and the classes that have fewer than ``shot``."""
    chosen, short = [np.empty(0, dtype=np.int64)], []
    for number in range(count):
        has = np.flatnonzero(targets == number if targets.ndim == 1 else targets[:, number] == 1)
        np.random.RandomState(seed % 2**32).shuffle(has)
        chosen.append(has[:shot])
        if len(has) < shot:
            short.append(number)
    return np.unique(np.concatenate(chosen)), short


def _published_order(index: ShardIndex, split: str) -> np.ndarray:
    """int64 [n]: rows of the split in the order in which the released code lists its images.

    Sources in memory have that order, but for Tuberculosis, whose sets are shuffled before they are split.
    """
    rows = np.arange(len(index.table(split)))
    if index.source != "tuberculosis":
        return rows
    place: dict[str, int] = {}
    folders: dict[str, list[str]] = {}
    for other, info in index.splits.items():
        shards = index.table(other)["shard"]
        for row in range(len(shards)):
            file = info.shards[int(shards[row])].file
            folders.setdefault(os.path.dirname(file), []).append(file)
            if other == split:
                place[file] = row
    ordered: list[int] = []
    for _, files in sorted(folders.items(), key=lambda item: "hina" not in item[0]):
        files.sort()
        np.random.RandomState(42).shuffle(files)
        ordered += [place[file] for file in files if file in place]
    return np.array(ordered, dtype=np.int64)


def _too_few(name: str, count: int, shot: int) -> ValueError:
    return ValueError(
        f"the class {name!r} has {count} training samples, {shot} were asked for: ask for fewer, or take what there "
        "is with --allow-fewer"
    )


def save_selection(selection: Selection, index: ShardIndex, split: str, path: Path) -> None:
    """Write a selection to a file that ``load_selection`` replays."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": index.source,
        "salt_fingerprint": index.salt_fingerprint,
        "split": split,
        "shot": selection.shot,
        "seed": selection.seed,
        "sha256": selection.sha256,
        "keys": list(selection.keys),
    }
    write_atomically(path, json_bytes(content))


def load_selection(path: Path, index: ShardIndex, split: str) -> Selection:
    """The rows of a saved selection in this index.

    Raises:
        ValueError: a file that is no selection or was changed, or keys that the split does not have.
    """
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no selection file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): give a selection.json of an earlier run") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a selection (field 'format'): give a selection.json of an earlier run")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {content.get('format_version')!r}, this is {FORMAT_VERSION}")
    keys = strings_of(content, "keys", path)
    if hashlib.sha256("\n".join(keys).encode()).hexdigest() != field_of(content, "sha256", str, path) or not keys:
        raise ValueError(f"{path}: its keys do not fit its sha256, so it was changed: save the selection again")
    if content.get("salt_fingerprint") != index.salt_fingerprint:
        raise ValueError(
            f"{path} was made with another salt than {index.where}, so its keys mean nothing there: use the data (or "
            "the salt file) that it was made with"
        )
    rows_by_key = {key: row for row, key in enumerate(index.keys(split, slice(None)))}
    missing = [key for key in keys if key not in rows_by_key]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its {len(keys)} samples are not in the split {split} of {index.where} (first "
            f"{missing[0]}): it belongs to other data"
        )
    shot, seed = content.get("shot"), content.get("seed")
    if not (shot is None or isinstance(shot, int)) or not isinstance(seed, int):
        raise ValueError(f"{path}: the fields 'shot' and 'seed' must be whole numbers: save the selection again")
    return Selection(rows=np.array([rows_by_key[key] for key in keys]), keys=tuple(keys), shot=shot, seed=seed)
