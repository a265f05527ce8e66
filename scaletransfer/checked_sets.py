"""Folders of shards under one check: their names, roles and splits, and which pairs of splits must share nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scaletransfer.image_features import FINE
from scaletransfer.index import ShardIndex, load_index
from scaletransfer.storage import is_url, local_path
from scaletransfer.storage_errors import shown

Relation = Literal["same split", "allowed", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSet:
    """One folder of shards and what it is for."""

    name: str
    """Short and unlike every other's, made from the folder's name; fit for a file name."""
    index: ShardIndex
    trains: bool
    """Whether a network is pre-trained on it."""
    target: bool
    """Whether a network is fine-tuned and tested on it."""

    @property
    def patients(self) -> int:
        """Over all splits; a patient of two splits counts twice."""
        return sum(split.patients for split in self.index.splits.values())

    @property
    def coded(self) -> bool:
        """Whether the shards hold patient codes: label members of multi-label sets do, class numbers have no room."""
        return self.index.task == "multilabel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One split of a set, and the rows of its table that were looked at."""

    set: CheckedSet
    split: str
    rows: NDArray[np.int64]
    features: NDArray[Any]
    """dtype `image_features.FEATURES`, one for each of `rows`."""

    @property
    def name(self) -> str:
        """For a reader: set and split."""
        return f"{self.set.name}/{self.split}"

    @property
    def table(self) -> NDArray[Any]:
        """The whole sample table of the split."""
        return self.set.index.table(self.split)

    @property
    def fine(self) -> NDArray[np.bool_]:
        """Which of `rows` hold an image that can be decoded."""
        return np.asarray(self.features["state"] == FINE)

    def keys(self, positions: NDArray[np.integer] | Sequence[int]) -> list[str]:
        """Sample keys of positions in `rows`."""
        return self.set.index.keys(self.split, self.rows[np.asarray(positions, dtype=np.int64)])


def open_sets(shards: Sequence[str | os.PathLike[str]], targets: Sequence[str | os.PathLike[str]]) -> list[CheckedSet]:
    """Open folders of shards; a folder that is named twice is one set, with both roles if both name it.

    Raises ValueError for a folder that is no finished folder of shards, or is not on a disk.
    """
    indexes: dict[Path, ShardIndex] = {}
    roles: dict[Path, set[str]] = {}
    for role, folders in (("trains", shards), ("target", targets)):
        for folder in folders:
            local = local_path(os.fspath(folder)) if is_url(folder) else folder
            if local is None:
                raise ValueError(
                    f"{shown(os.fspath(folder))} is not on a disk, and every image is looked at more than once: copy "
                    "the folder of shards and name the copy"
                )
            path = Path(local).resolve()
            if path not in indexes:
                indexes[path] = load_index(local)
            roles.setdefault(path, set()).add(role)
    taken: set[str] = set()
    sets = []
    for path, index in indexes.items():
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", path.name).strip("._") or index.source
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name)
        sets.append(CheckedSet(name=name, index=index, trains="trains" in roles[path], target="target" in roles[path]))
    return sets


def relation(one: Group, other: Group) -> Relation:
    """Whether two splits may share images or patients.

    Refused: two splits of one set; a set of pre-training and a target, whatever the splits; two sets that train
    together, if the splits differ.  Allowed (and told): the same split of two sets that train together, and two
    targets, which never meet in one run.
    """
    if one.set is other.set:
        return "same split" if one.split == other.split else "refused"
    if (one.set.trains and other.set.target) or (one.set.target and other.set.trains):
        return "refused"
    return "refused" if one.set.trains and one.split != other.split else "allowed"
