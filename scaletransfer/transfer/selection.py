"""Few-shot selections: n training samples a class, from the sample table alone. No image is opened.

Each class's samples are put into an order that depends on the seed and their keys only; the first n are taken. A
selection for fewer examples is therefore part of every larger one of the same seed, and the same images give the same
selection from a folder and from shards with equal keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer.files import field_of, json_bytes, strings_of, write_atomically
from scaletransfer.index import ShardIndex

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
        order = np.argsort(_scrambled(keys, seed), kind="stable")
        in_order = targets[order]
        chosen = []
        for number, name in enumerate(names):
            has = in_order == number if targets.ndim == 1 else in_order[:, number] == 1
            mine = order[has][:shot]
            if len(mine) < shot and not allow_fewer:
                raise ValueError(
                    f"the class {name!r} has {len(mine)} training samples, {shot} were asked for: ask for fewer, or "
                    "take what there is with --allow-fewer"
                )
            chosen.append(mine)
        rows = np.unique(np.concatenate(chosen))
        if len(rows) == 0:
            raise ValueError(f"no training sample of {index.where} has any of the labels {', '.join(names)}")
    rows = rows[np.argsort(keys[rows], kind="stable")]
    return Selection(rows=rows, keys=tuple(index.keys(split, rows)), shot=shot, seed=seed)


def _scrambled(keys: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n]: the finaliser of splitmix64 (Steele et al. 2014) over the keys, which are uniform already, and the
    seed."""
    offset = np.frombuffer(blake2b(f"few-shot/{seed}".encode(), digest_size=8).digest(), dtype="<u8")[0]
    z = np.asarray(keys, dtype=np.uint64) ^ offset
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


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
