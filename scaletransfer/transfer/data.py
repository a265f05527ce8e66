"""The target of a transfer: an index, its splits and names, from a folder of images, shards or an official folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer import keys, labels
from scaletransfer.config import FinetuneConfig, FinetuneDataConfig
from scaletransfer.image_check import probe_areas
from scaletransfer.index import ShardIndex, from_records, load_index
from scaletransfer.loader import Source, target_names
from scaletransfer.shard_reader import check_once
from scaletransfer.sources import open_source, source_options
from scaletransfer.sources.image_folder import ImageFolder
from scaletransfer.transfer.hyperrule import resolution
from scaletransfer.transfer.parts import hold_out, single_label, take_share

PROBED = 32
"""Images whose size decides the resolution."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is transferred to."""

    dataset: str
    index: ShardIndex
    names: tuple[str, ...]
    policy: labels.LabelPolicy
    notes: tuple[str, ...] = ()
    """Sentences on what was inferred, and what the source says of its rows."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of an official data set: protocol, views and options that it was opened with."""
    valid_split: str = "valid"
    """The split that is validated on."""

    @property
    def task(self) -> str:
        return self.index.task

    @property
    def channels(self) -> int:
        return self.index.image.channels

    @property
    def depth(self) -> int:
        """Bits a channel that images are decoded to; 16 for grey 16-bit images only."""
        return self.index.image.bit_depth if self.channels == 1 else 8

    def source(self, split: str) -> Source:
        """A split, as the loader takes it."""
        return Source(index=self.index, split=split, policy=self.policy, names=self.names)

    def targets(self, split: str) -> np.ndarray:
        """Targets of every row of a split: see ``loader.Source.targets``."""
        return self.source(split).targets(np.arange(len(self.index.table(split))))


def open_target(cfg: FinetuneConfig) -> Target:
    """Open what a configuration names as its target; no image is decoded, headers of files are read.

    Raises:
        ValueError: no target or one that cannot be used: a split that is not there, a single class, another number
            of classes than ``nb_classes``.
    """
    target = _parted(cfg, _open(cfg))
    index, data = target.index, cfg.data
    held_out = data.source is None and data.shards is None
    if data.valid_split is not None:
        target = replace(target, valid_split=data.valid_split)
    elif not held_out:
        split, note = default_split(index, data.source)
        target = replace(target, valid_split=split, notes=(*target.notes, *([note] if note else [])))
    for key, split in (("train_split", data.train_split), ("valid_split", target.valid_split)):
        if split == "valid" and held_out and split not in index.splits:
            raise ValueError(
                f"{index.where} has no validation folder, and of its {len(index.table('train'))} images a share of "
                f"{cfg.data.valid_share:g} leaves none for validation: add a folder val, or raise data.valid_share"
            )
        if split in index.splits and len(index.table(split)) == 0:
            raise ValueError(f"data.{key}: the split {split} of {index.where} has no sample: name another split")
        if split not in index.splits:
            raise ValueError(f"data.{key} is {split!r} but {index.where} has only {', '.join(index.splits)}")
    if data.train_split == target.valid_split:
        raise ValueError(f"data.train_split and data.valid_split are both {data.train_split!r}: name two splits")
    if target.task == "multiclass" and len(target.names) < 2:
        raise ValueError(
            f"{index.where} has the single class {target.names[0]!r}: there is nothing to tell apart; a run needs two "
            f"{'class folders' if held_out else 'classes'} or more"
        )
    if cfg.nb_classes is not None and cfg.nb_classes != len(target.names):
        raise ValueError(
            f"nb_classes is {cfg.nb_classes} but {index.where} has {len(target.names)} classes "
            f"({shortened(target.names)}): correct nb_classes, or the folder"
        )
    return target


def _parted(cfg: FinetuneConfig, target: Target) -> Target:
    """With single labels, held-out validation and a share of the training images, as configured."""
    data = cfg.data
    if data.multilabel_force_classification:
        target = forced(target)
    if data.train_split not in target.index.splits:
        return target  # which is refused with the names of the splits
    alone = data.shards is not None and data.valid_split is None and list(target.index.splits) == [data.train_split]
    if data.valid_ratio is not None or alone:
        share = data.valid_share if data.valid_ratio is None else data.valid_ratio
        index, note = hold_out(target.index, data.train_split, share, data.valid_seed)
        target = replace(target, index=index, notes=(*target.notes, note))
    if data.train_ratio is not None:
        index, note = take_share(target.index, data.train_split, data.train_ratio, cfg.seed)
        target = replace(target, index=index, notes=(*target.notes, note))
    return target


def forced(target: Target) -> Target:
    """The images of a multi-label target that have exactly one positive label, as a multi-class target."""
    found = {split: target.targets(split) for split in target.index.splits}
    index, note = single_label(target.index, found, target.names)
    settings = {**target.settings, "multilabel_force_classification": True}
    return replace(target, index=index, notes=(*target.notes, note), settings=settings)


def make_target(
    index: ShardIndex,
    dataset: str,
    policy: labels.LabelPolicy,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Target:
    """A target from an opened index; ValueError for a folder of shards that has a sample twice."""
    for split in index.splits if not index.in_memory else ():
        check_once(index, split)
    names = target_names([index], policy, "intersection", None)
    return Target(
        dataset=dataset, index=index, names=names, policy=policy, notes=tuple(notes), settings=dict(settings or {})
    )


def default_split(index: ShardIndex, source: str | None = None) -> tuple[str, str]:
    """(the split to validate on where none is named, a sentence if that is the test split).

    source: the name of the data set that the index was made of from its files. Raises ValueError where there is
    neither a valid nor a test split.
    """
    if "valid" in index.splits:
        return "valid", ""
    if "test" in index.splits:
        return "test", f"note: {index.source} has no split valid: scores are on its split test"
    own = source is not None and "valid_share" in source_options(source)
    raise ValueError(
        f"{index.where} has no split valid or test, only {', '.join(index.splits)}: "
        + (
            "hold a share of it out by the option valid_share"
            if own
            else "scores need another split than the one that is trained on"
        )
    )


def open_official(
    name: str,
    root: str | os.PathLike[str],
    policy: labels.LabelPolicy,
    *,
    protocol: str = "corrected",
    views: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    salt_file: str | os.PathLike[str] | None = None,
) -> Target:
    """A data set read from its own files, by the name that make_shards knows it by.

    protocol: goes to a source that has protocols; another one has only "corrected". views: None is the source's
    default. options: others of the source. salt_file: None is the public salt for public sets, else the user's.

    Raises ValueError: a source, option or protocol that there is not, and whatever is wrong with the files.
    """
    settings = dict(options or {})
    if "protocol" in source_options(name):
        settings["protocol"] = protocol
    elif protocol != "corrected":
        raise ValueError(
            f"the protocol {protocol} was asked for, but the source {name} has only one: leave protocol out, or "
            "corrected"
        )
    if views is not None:
        settings["views"] = views
    source = open_source(name, root, **settings)
    index = from_records(source, keys.PUBLIC_SALT if source.public and not salt_file else keys.load_salt(salt_file))
    notes = [f"note: {note}" for note in source.notes]
    notes += [f"left out: {rows:,} rows, {reason}" for reason, rows in source.left_out.items()]
    kept = getattr(source, "views", ())  # of sources with views None stands for all
    held = {"protocol": protocol, "views": ["all"] if kept is None else sorted(kept), "options": dict(options or {})}
    return make_target(index, name, policy, notes, held)


def _policy(data: FinetuneDataConfig) -> labels.LabelPolicy:
    chosen = data.policy
    return labels.LabelPolicy(
        name=chosen.name, uncertain=chosen.uncertain, blank=chosen.blank, per_label=dict(chosen.per_label)
    )


def _open(cfg: FinetuneConfig) -> Target:
    """What the configuration names; its splits are not looked at."""
    data, policy = cfg.data, _policy(cfg.data)
    if data.source is not None and data.root is not None:
        target = open_official(
            data.source,
            data.root,
            policy,
            protocol=data.protocol,
            views=data.views,
            options=data.options,
            salt_file=data.salt_file,
        )
        return replace(target, dataset=data.dataset or target.dataset)
    index, dataset, note = _open_own(cfg)
    return make_target(index, data.dataset or dataset, policy, [note] if note else [])


def _open_own(cfg: FinetuneConfig) -> tuple[ShardIndex, str, str]:
    """Index, name, and what was inferred, of shards or image folders."""
    data = cfg.data
    if data.shards is not None:
        return load_index(data.shards), _name(Path(data.shards)), ""
    if cfg.train_dir is not None:
        source, note = _two_folders(cfg.train_dir, cfg.val_dir, 0.0 if data.valid_ratio else data.valid_share)
        name = _name(Path(cfg.train_dir))
        if name in ("train", "mod_train"):  # the folder above says what it is
            name = _name(Path(os.path.abspath(cfg.train_dir)).parent)
        return from_records(source, keys.PUBLIC_SALT), name, note
    if data.images is not None:
        share = 0.0 if data.valid_ratio else data.valid_share
        return open_folder(Path(data.images), share, data.valid_split or "valid")
    raise ValueError(
        "there is no target: give a folder of images with --images DIR, shards with --shards DIR, or data.source and "
        "data.root, or train_dir and val_dir, in the fine-tuning configuration"
    )


def open_folder(folder: Path, valid_share: float, valid_split: str = "valid") -> tuple[ShardIndex, str, str]:
    """An image folder as an index in memory, its name, and what was inferred.

    Keys come from the public salt: the files are the user's own and lie beside the results, and a selection by seed
    is then the same for everybody who has the same files.
    """
    if not folder.expanduser().is_dir():
        raise ValueError(f"there is no folder {folder}: correct --images, or data.images")
    source = ImageFolder(folder)
    note = ""
    if valid_split == "valid" and "valid" not in source.splits and valid_share:
        source = ImageFolder(folder, valid_share=valid_share)
        note = _held_out(valid_share)
    return from_records(source, keys.PUBLIC_SALT), _name(folder), note


def _two_folders(train: str, valid: str | None, share: float) -> tuple[ImageFolder, str]:
    train_dir = Path(os.path.abspath(Path(train).expanduser()))
    if not train_dir.is_dir():
        raise ValueError(f"train_dir {train} is not a folder: give the folder that holds one folder a class")
    if valid is None:
        note = _held_out(share) if share else ""
        return ImageFolder(train_dir, folders={"train": "."}, valid_share=share), note
    valid_dir = Path(os.path.abspath(Path(valid).expanduser()))
    if not valid_dir.is_dir():
        raise ValueError(f"val_dir {valid} is not a folder: give the folder that holds one folder a class")
    real = Path(os.path.realpath(train_dir)), Path(os.path.realpath(valid_dir))  # a link to it is the same folder
    if real[0] == real[1] or real[0] in real[1].parents or real[1] in real[0].parents:
        raise ValueError(f"train_dir {train} and val_dir {valid} lie in each other: validation images must be others")
    root = Path(os.path.commonpath([train_dir, valid_dir]))
    folders = {"train": train_dir.relative_to(root).as_posix(), "valid": valid_dir.relative_to(root).as_posix()}
    return ImageFolder(root, folders=folders), ""


def _held_out(share: float) -> str:
    return f"no validation folder: {share:.0%} of the training images are held out, chosen by their names"


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder.expanduser())).name


def sides(target: Target, split: str) -> tuple[int, int]:
    """(height, width) of the image of median area among some that are spread evenly over the split."""
    count = len(target.index.table(split))
    rows = np.unique(np.linspace(0, count - 1, PROBED).astype(np.int64))
    areas = probe_areas(target.index, split, rows)
    middle = areas[np.argsort(areas.prod(axis=1), kind="stable")[len(areas) // 2]]
    return int(middle[0]), int(middle[1])


def choose_resolution(target: Target, split: str) -> tuple[tuple[int, int], str]:
    """BiT-HyperRule's (precrop, crop) for the training images, and why."""
    height, width = sides(target, split)
    return resolution(height, width), f"images of about {width} x {height}"


def shortened(names: Sequence[str], most: int = 12) -> str:
    """Names as text, cut where there are many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
