"""Parts of a target as an index of their own: held-out validation, shares of the training images, single-label images.

Decided from the sample table alone, by patient where it knows them; no image is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer.index import ShardIndex
from scaletransfer.sample_table import count_patients, label_totals, table_dtype


@dataclass(slots=True, kw_only=True)
class PartIndex(ShardIndex):
    """An index whose tables were cut from another's; they travel to worker processes, as no file holds them."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"_places": {}}


def cut(
    index: ShardIndex, tables: Mapping[str, NDArray[Any]], why: str, *, files: str | None = None, **changed: Any
) -> PartIndex:
    """``index`` with these tables in place of its own, or as further splits.

    tables: rows of splits of ``index``, as its tables have them. files: the split whose files they lie in; None: each
    in those of its own name. why: what tells this part from others, for the digest. changed: other fields.
    """
    digest = hashlib.sha256(f"{index.digest}/{why}".encode())
    fields: dict[str, Any] = {name: getattr(index, name) for name in ShardIndex.__dataclass_fields__}
    fields |= changed
    splits = dict(index.splits)
    own = {split: table for split, table in index._tables.items() if split in splits}
    for split, table in tables.items():
        table.flags.writeable = False
        digest.update(split.encode() + table.tobytes())
        own[split] = table
        splits[split] = replace(
            index.splits[files or split],
            samples=len(table),
            patients=count_patients(table),
            totals=label_totals(table, fields["task"], fields["label_names"]),
        )
    fields |= {"splits": splits, "_tables": own, "_places": {}, "digest": digest.hexdigest()}
    return PartIndex(**fields)


def portion(
    table: NDArray[Any], share: float, seed: int, *, keep: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """Bool [n]: the rows that a share of a sample table takes, whole patients where they are known.

    Patients (and images without one) are put into an order that depends on the seed and their keys only, and taken
    while they leave at most round(share * n) images taken; at least one image is. A larger share contains a smaller
    one of the same seed but for a patient at its edge.

    keep: int64 [n] classes; a unit that holds the last image of a class is not taken.
    """
    keys = np.asarray(table["key"], dtype=np.uint64)
    patient = table["patient"].astype(np.int64)
    alone = patient < 0
    unit = np.where(alone, patient.max(initial=-1) + 1 + np.arange(len(keys)), patient)
    _, unit = np.unique(unit, return_inverse=True)
    name = np.full(int(unit.max(initial=-1)) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(name, unit, keys)  # a patient is known by the least key: codes differ from folder to shards
    order = np.argsort(scrambled(name, f"portion/{seed}"), kind="stable")
    members = np.split(np.argsort(unit, kind="stable"), np.cumsum(np.bincount(unit, minlength=len(name)))[:-1])
    wanted = max(1, round(share * len(keys)))
    left = None if keep is None else np.bincount(keep)
    taken = np.zeros(len(keys), dtype=bool)
    count = 0
    for number in order.tolist():
        rows = members[number]
        if count and count + len(rows) > wanted:
            continue
        if left is not None and keep is not None:
            lost = np.bincount(keep[rows], minlength=len(left))
            if ((left == lost) & (lost > 0)).any():
                continue
            left -= lost
        taken[rows] = True
        count += len(rows)
        if count >= wanted:
            break
    return taken


def scrambled(keys: NDArray[Any], name: str) -> NDArray[np.uint64]:
    """uint64 [n]: the finaliser of splitmix64 (Steele et al. 2014) over the keys, which are uniform already, and a
    hash of the name."""
    offset = np.frombuffer(blake2b(name.encode(), digest_size=8).digest(), dtype="<u8")[0]
    z = np.asarray(keys, dtype=np.uint64) ^ offset
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def hold_out(index: ShardIndex, split: str, share: float, seed: int) -> tuple[PartIndex, str]:
    """``index`` whose split ``valid`` is a share of ``split``, which loses it; and a sentence that says so.

    Raises ValueError where nothing would be left for one of the two.
    """
    table = index.table(split)
    classes = table["label"].astype(np.int64) if index.task == "multiclass" else None
    taken = portion(table, share, seed, keep=classes)
    if not taken.any() or taken.all():
        raise ValueError(
            f"{index.where}: of the {len(table)} images of the split {split} a share of {share:g} leaves none for "
            f"{'training' if taken.all() else 'validation'}: give another --valid-ratio, or more images"
        )
    found = cut(index, {split: table[~taken], "valid": table[taken]}, f"valid {share} {seed}", files=split)
    units = "patients" if (table["patient"] >= 0).any() else "images"
    note = f"note: {taken.sum()} of {len(table)} images of the split {split} are held out for validation, by {units}"
    return found, f"{note} (seed {seed})"


def take_share(index: ShardIndex, split: str, share: float, seed: int) -> tuple[PartIndex, str]:
    """``index`` with a share of one split only, every class still in it; and a sentence that says so."""
    table = index.table(split)
    taken = portion(table, share, seed)
    if index.task == "multiclass":
        ordered = np.argsort(scrambled(table["key"], f"portion/{seed}"), kind="stable")
        for label in np.setdiff1d(table["label"], table["label"][taken]):
            taken[ordered[table["label"][ordered] == label][0]] = True
    units = "patients" if (table["patient"] >= 0).any() else "images"
    note = f"note: training on {taken.sum()} of {len(table)} images (train_ratio {share:g}), chosen by {units}"
    return cut(index, {split: table[taken]}, f"train {share} {seed}"), note


def single_label(index: ShardIndex, targets: Mapping[str, NDArray[Any]], names: Sequence[str]) -> tuple[PartIndex, str]:
    """A multi-class index of the images of a multi-label one that have exactly one positive label.

    targets: of each split float32 [n, L], NaN for unknown (an unknown label is not positive); names: the L labels.

    Raises ValueError where a split has no such image, or the index is multi-class already.
    """
    if index.task != "multilabel":
        raise ValueError(f"{index.where} has one class an image already: leave multilabel_force_classification out")
    dtype, tables, shown = table_dtype("multiclass", len(names)), {}, []
    for split, values in targets.items():
        table, one = index.table(split), (values == 1).sum(axis=1) == 1
        made = np.zeros(int(one.sum()), dtype=dtype)
        for field in table.dtype.names or ():
            if field != "labels":
                made[field] = table[field][one]
        made["label"] = (values[one] == 1).argmax(axis=1)
        if not len(made):
            raise ValueError(f"{index.where}: no image of the split {split} has exactly one label")
        tables[split] = made
        shown.append(f"{split} {len(made)} of {len(table)}")
    found = cut(
        index,
        tables,
        f"single label {'|'.join(names)}",
        task="multiclass",
        label_names=tuple(names),
        label_kind="classes",
    )
    return found, f"note: images with exactly one label, as classes: {', '.join(shown)}"
