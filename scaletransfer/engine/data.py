"""From a configuration to the data sets of a pre-training run."""

from __future__ import annotations

from collections.abc import Sequence

from scaletransfer.config import PretrainConfig, RemoteConfig
from scaletransfer.foreign import check_format, check_indexed
from scaletransfer.fused import build_fused
from scaletransfer.index import ShardIndex, load_index
from scaletransfer.labels import LabelPolicy, vocabulary
from scaletransfer.loader import ShardDataset, Source, target_names
from scaletransfer.order import Order
from scaletransfer.shard_reader import check_once
from scaletransfer.storage_settings import RemoteSettings
from scaletransfer.transforms import TransformOptions, build_transform


def open_data(cfg: PretrainConfig) -> tuple[ShardDataset, ShardDataset | None, tuple[str, ...]]:
    """Training set, validation set (None where validation is off) and target names.

    Raises:
        ValueError: folders that are no shards, splits that are not there, label names that do not fit.
    """
    data = cfg.data
    rules = LabelPolicy(
        name=data.policy.name,
        uncertain=data.policy.uncertain,
        blank=data.policy.blank,
        per_label=dict(data.policy.per_label),
    )
    opened: dict[str, ShardIndex] = {}
    remote = remote_settings(data.remote)

    def sources(folders: list[str], split: str) -> list[tuple[ShardIndex, str]]:
        for folder in folders:
            if folder not in opened:
                check_indexed(folder, data.format)
                opened[folder] = load_index(folder, remote)
                check_format(opened[folder], data.format)
        return [(opened[folder], split) for folder in folders]

    train = sources([folder for folder, _ in data.folders], data.train_split)
    validate = cfg.validate.every_steps is not None or cfg.validate.every_epochs is not None
    valid = sources(list(data.valid_folders), data.valid_split) if validate else []
    for index, split in [*train, *valid]:
        if split not in index.splits:
            hint = " (set validate.every_epochs=null to train without validation)" if (index, split) in valid else ""
            raise ValueError(f"{index.where} has no split {split!r}, only {', '.join(index.splits)}{hint}")
    names = target_names([index for index, _ in train], rules, data.findings, data.expect_labels)
    if data.nb_classes is not None and data.nb_classes != len(names):
        raise ValueError(
            f"data.nb_classes is {data.nb_classes} but the shards have {len(names)} classes: correct the number, or "
            "the folders of data.train"
        )
    check_validates([index for index, _ in valid], train[0][0], rules, names)
    depths = {index.image.bit_depth for index, _ in [*train, *valid]}
    if len(depths) > 1:
        raise ValueError(f"the shards mix {sorted(depths)} bits a channel: make them alike with --bit-depth 8")

    def dataset(pairs: list[tuple[ShardIndex, str]], white: int | None = None) -> ShardDataset:
        training = white is None
        chosen = [Source(index=i, split=s, policy=rules, names=names) for i, s in pairs]
        max_bad = data.max_bad_samples if training else 0
        twice = [check_once(i, s, max_bad if training else None) for i, s in pairs]
        order = None
        if training:
            shards = tuple(source.shards for source in chosen)
            weights = tuple(weight for _, weight in data.folders)
            order = Order(shards=shards, weights=weights, seed=cfg.seed, global_batch=cfg.global_batch)
        operations, magnitude = data.rand_augment or (2, 9)
        options = TransformOptions(
            randaugment=data.rand_augment is not None,
            randaugment_ops=operations,
            randaugment_magnitude=magnitude,
        )
        how = (data.transform, training, data.image_size, data.augment_protocol, options)
        return ShardDataset(
            chosen,
            order,
            build_fused(*how) or build_transform(*how),
            1 if data.transform == "xray" else 3,
            cfg.seed,
            pixel_max=white,
            max_bad=max_bad,
            twice=twice if any(twice) else (),
            remote=remote,
        )

    made = dataset(train)
    # one normalisation for both: validation images of another range are scaled to that of training
    return made, dataset(valid, made.pixel_max) if valid else None, names


def remote_settings(data: RemoteConfig) -> RemoteSettings:
    """The configuration's section data.remote, as the reader takes it."""
    return RemoteSettings(
        mode=data.mode,
        cache_dir=data.cache_dir,
        cache_bytes=int(data.cache_gb * 1e9),
        attempts=data.attempts,
        timeout=data.timeout,
    )


def check_validates(valid: Sequence[ShardIndex], train: ShardIndex, rules: LabelPolicy, names: Sequence[str]) -> None:
    """ValueError where a validation folder's labels are not those that the network is trained on.

    Raw labels are numbers: validated on the shards of another data set, they would silently mean something else.
    """
    for index in valid:
        if index.task != train.task:
            raise ValueError(f"data.valid {index.where} is {index.task} but data.train {train.where} is {train.task}")
        own = tuple(index.label_names)
        if index.task == "multiclass" and own != tuple(names):
            raise ValueError(
                f"data.valid {index.where} has {len(own)} classes that are not the {len(names)} of data.train "
                f"{train.where} in the same order: validate on shards of the same data set"
            )
        if index.task == "multilabel" and not set(names) & set(vocabulary(index.source, rules, own)):
            raise ValueError(
                f"data.valid {index.where} has none of the findings that are trained: choose another folder"
            )
