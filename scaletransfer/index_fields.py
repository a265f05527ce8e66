"""The fields of index.json: what each must be, and the parts of an index that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaletransfer.files import field_of, plain_name, strings_of
from scaletransfer.records import ImageInfo

SPLITS = ("train", "valid", "test")
LABEL_KINDS = {"states": "multilabel", "tokens": "multilabel", "classes": "multiclass"}
"""What a label of a sample is -> the task.  Tokens are names of what an image shows; in the table they are states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One file that images are read from."""

    file: str
    """Name relative to the folder, posix."""
    samples: int
    bytes: int
    sha256: str
    """Hex digest; "" in an index made in memory by `from_records`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One split: its samples, files, totals and what was left out."""

    samples: int
    patients: int
    """Distinct patients among the samples; 0 where the source has none."""
    table_file: str
    """File name of the sample table; "" in an index made in memory."""
    table_sha256: str
    shards: tuple[ShardInfo, ...]
    totals: dict[str, Any]
    """Multi-label: label -> {positive, negative, uncertain, not_mentioned}; multi-class: class -> count."""
    quarantine: tuple[dict[str, str], ...]
    """{"key", "reason"} of each record whose image could not be used."""


def split_to_json(split: SplitInfo) -> dict[str, Any]:
    """The entry of one split in index.json."""
    content = asdict(split)
    content["table"] = content.pop("table_file")
    return content


def parse_fields(content: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """The fields of a `ShardIndex` from the content of index.json; ValueError, naming `path` and the field, where one
    is missing or cannot be."""
    task = field_of(content, "task", str, path)
    if task not in LABEL_KINDS.values():
        raise ValueError(
            f"{path}: task {task!r} is unknown; this program reads {', '.join(sorted(set(LABEL_KINDS.values())))}"
        )
    kind = field_of(content, "label_kind", str, path)
    if LABEL_KINDS.get(kind) != task:
        fitting = " or ".join(repr(name) for name, its in LABEL_KINDS.items() if its == task)
        raise ValueError(f"{path}: label_kind {kind!r} does not fit task {task!r}; expected {fitting}")
    names = tuple(strings_of(content, "label_names", path))
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path}: label_names is empty or names a label twice")
    raw_image = field_of(content, "image", dict, path)
    kinds = {"extension": str, "size": int, "channels": int, "bit_depth": int, "pixel_max": int}
    if "deep_max" in raw_image:  # of tars that others made only
        kinds["deep_max"] = int
    image = ImageInfo(**{name: field_of(raw_image, name, kinds[name], path, "image.") for name in kinds})
    if image.channels not in (1, 3) or image.bit_depth not in (8, 16):
        raise ValueError(f"{path}: image.channels must be 1 or 3 and image.bit_depth 8 or 16")
    raw_splits = field_of(content, "splits", dict, path)
    if not raw_splits:
        raise ValueError(f"{path}: field 'splits' is empty; make the folder again with make_shards")
    splits = {name: _parse_split(raw_splits, name, path, names) for name in sorted(raw_splits, key=split_order)}
    return {
        "source": field_of(content, "source", str, path),
        "task": task,
        "label_names": names,
        "label_kind": kind,
        "views": tuple(strings_of(content, "views", path)),
        "image": image,
        "splits": splits,
        "salt_fingerprint": field_of(content, "salt_fingerprint", str, path),
        "licence": field_of(content, "licence", str, path),
        "encoder": field_of(content, "encoder", dict, path),
        "options": field_of(content, "options", dict, path),
        "plan_sha256": field_of(content, "plan_sha256", str, path),
        "left_out": field_of(content, "left_out", dict, path) if "left_out" in content else {},
    }


def _parse_split(splits: Mapping[str, Any], name: str, path: Path | str, names: Sequence[str]) -> SplitInfo:
    content, where = field_of(splits, name, dict, path, "splits."), f"splits.{name}."
    shards = []
    for raw in field_of(content, "shards", list, path, where):
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: field '{where}shards' must hold objects")
        kinds = {"file": str, "samples": int, "bytes": int, "sha256": str}
        shard = ShardInfo(**{key: field_of(raw, key, kinds[key], path, where + "shards.") for key in kinds})
        plain_name(shard.file, path)
        shards.append(shard)
    totals = field_of(content, "totals", dict, path, where)
    if set(totals) != set(names):
        raise ValueError(f"{path}: the names in '{where}totals' are not those in 'label_names'")
    quarantine = field_of(content, "quarantine", list, path, where)
    info = SplitInfo(
        samples=field_of(content, "samples", int, path, where),
        patients=field_of(content, "patients", int, path, where),
        table_file=plain_name(field_of(content, "table", str, path, where), path),
        table_sha256=field_of(content, "table_sha256", str, path, where),
        shards=tuple(shards),
        totals={name: totals[name] for name in names},
        quarantine=tuple(
            {key: field_of(entry, key, str, path, where + "quarantine.") for key in ("key", "reason")}
            for entry in quarantine
        ),
    )
    if sum(shard.samples for shard in shards) != info.samples:
        raise ValueError(f"{path}: '{where}samples' is not the sum over its shards")
    return info


def split_order(name: str) -> tuple[int, str]:
    """Sort key of split names: train, valid, test, then any other."""
    return (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)
