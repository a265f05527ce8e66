"""A fine-tuning run put together: from a configuration to a Trainer, and from its last step to the result."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from scaletransfer.config import FinetuneConfig, ModelConfig, load_config
from scaletransfer.decoded import StoredDataset
from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine import verify
from scaletransfer.engine.assemble import (
    check_continues,
    check_same_start,
    make_network,
    say_start,
    seed_generators,
)
from scaletransfer.engine.average import WeightAverage
from scaletransfer.engine.build import Engine, build_engine, resolve_precision
from scaletransfer.engine.checkpoint import Checkpoint
from scaletransfer.engine.evaluate import score
from scaletransfer.engine.filling import Values
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.runfolder import take_folder
from scaletransfer.engine.runlog import check_writable
from scaletransfer.engine.strategy import Strategy
from scaletransfer.engine.trainer import Trainer
from scaletransfer.export import export, prove
from scaletransfer.image_check import check_images
from scaletransfer.loader import ShardDataset
from scaletransfer.losses import make_loss
from scaletransfer.models.weights import network_options
from scaletransfer.order import ORDER_VERSION, SelectionOrder
from scaletransfer.results import RESULT
from scaletransfer.transfer.decoding import filling, keep_decoded
from scaletransfer.transfer.freezing import freeze
from scaletransfer.transfer.mixup import Mixup
from scaletransfer.transfer.network import starting_values
from scaletransfer.transfer.optimizers import CLASSES, check_engine, make
from scaletransfer.transfer.plan import Plan
from scaletransfer.transfer.predictions import PREDICTIONS, write_predictions
from scaletransfer.transfer.scores import lines, scores, write_result
from scaletransfer.transfer.selection import save_selection
from scaletransfer.transforms import Normalizer, bit_transform

SELECTION = "selection.json"
MODEL = "model"


def read_resolved(folder: Path) -> FinetuneConfig | None:
    """The resolved configuration that an earlier start left in the run folder, or None."""
    path = folder / "config.yaml"
    try:
        return load_config(path, (), FinetuneConfig) if path.is_file() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is not the configuration of a fine-tuning run ({error}): take another --logdir"
        ) from None


def run_facts(plan: Plan) -> dict[str, Any]:
    """What must stay as it is inside a run, and what its model must know of its making."""
    cfg, target = plan.cfg, plan.target
    policy = target.policy
    precrop, crop = plan.resolution
    return {
        "model": plan.start.model,
        "task": target.task,
        "label_names": list(target.names),
        "policy": {
            "name": policy.name,
            "uncertain": policy.uncertain,
            "blank": policy.blank,
            "per_label": {name: dict(choices) for name, choices in policy.per_label.items()},
        },
        "normalisation": {
            "mean": plan.start.mean,
            "std": plan.start.std,
            "pixel_max": target.index.image.white(target.depth),
        },
        "transform": {
            "kind": "bit",
            "precrop": precrop,
            "size": crop,
            "square": cfg.protocol == "bit",
            "flip": cfg.data.flip,
            "xray": plan.start.xray,
        },
        **({"ws_eps": plan.start.ws_eps} if plan.start.ws_eps is not None else {}),
        "seed": cfg.seed,
        "global_batch": cfg.global_batch,
        "order_version": ORDER_VERSION,
        "data": [
            {"source": target.index.source, "split": split, **target.settings, "index_sha256": target.index.digest}
            for split in (cfg.data.train_split, plan.valid_split)
        ],
        "optimizer": cfg.optimizer.name,
        "optimizer_settings": {
            "momentum": cfg.optimizer.momentum,
            "nesterov": cfg.optimizer.nesterov,
            "weight_decay": cfg.optimizer.weight_decay,
            "clipping": cfg.optimizer.clipping,
            "eps": cfg.optimizer.eps,
            "head_exempt": cfg.optimizer.head_exempt,
        },
        "transfer": {
            "dataset": target.dataset,
            "pretrained_model": plan.start.title,
            "weights_sha256": plan.start.digest,
            "head": plan.head,
            "protocol": cfg.protocol,
            "steps": plan.rule.steps,
            "peak_lr": plan.peak,
            "mixup": cfg.mixup,
            "shot": plan.selection.shot,
            "selection_sha256": plan.selection.sha256,
            "sampling": cfg.sampling,
            "oversampling": cfg.oversampling,
            "class_weights": cfg.class_weights,
            **_beyond(cfg),
        },
    }


def _beyond(cfg: FinetuneConfig) -> dict[str, Any]:
    """What is used of the options that the paper does not have; a run of before has none of them."""
    used = {
        "freeze_through": cfg.model.freeze_through,
        "linear_probe": cfg.model.linear_probe,
        "cutmix": cfg.cutmix,
        "label_smoothing": cfg.label_smoothing,
        "ema_decay": cfg.ema_decay,
        "layer_decay": cfg.optimizer.layer_decay,
        "betas": cfg.optimizer.betas if cfg.optimizer.name == "adamw" else None,
        "train_ratio": cfg.data.train_ratio,
        "valid_ratio": cfg.data.valid_ratio,
    }
    return {key: value for key, value in used.items() if value}


def build(plan: Plan, strategy: Strategy, folder: Path, guard: Guard | None = None) -> Trainer:
    """The trainer of a plan, resumed from the newest complete checkpoint if there is one. All ranks call this.

    guard: what surrounds the run; None: nothing does.

    Raises:
        ValueError: a checkpoint of another run, unreadable images, a folder that cannot be written.
    """
    cfg, target = plan.cfg, plan.target
    micro, steps = cfg.micro_batch, cfg.steps
    check_engine(cfg, strategy)
    assert micro is not None and steps is not None
    if not strategy.cpu:
        # one seed, the same bytes: the fastest of cuDNN's backward convolutions add in any order
        torch.backends.cudnn.deterministic = True
    facts = run_facts(plan)
    if cfg.label_smoothing and target.task != "multiclass":
        raise ValueError("label_smoothing is for multi-class targets: set it to 0")
    loss = make_loss(target.task, label_smoothing=cfg.label_smoothing)  # type: ignore[arg-type]
    loss = replace(loss, class_weights=_class_weights(plan))
    check_writable(folder)
    latest = checkpoints.find_latest(folder / "checkpoints")
    found = None if latest is None else checkpoints.open_checkpoint(latest)
    if found is not None:
        check_continues(found, facts)
    train, valid = datasets(plan)
    if found is None and cfg.data.check_images and target.index.in_memory:
        _check(plan, train, valid)
    model = ModelConfig(
        name=plan.start.model,
        activation_checkpointing=bool(cfg.model.activation_checkpointing),
        compile=cfg.model.compile,
    )

    def create() -> nn.Module:
        network = make_network(model, len(target.names), **network_options({"ws_eps": plan.start.ws_eps}))
        return freeze(network, cfg.model.freeze_through, cfg.model.linear_probe)

    def values(skeleton: nn.Module) -> Values:
        if found is None:
            return starting_values(plan.start, plan.head, cfg.protocol, cfg.seed)(skeleton)
        checkpoints.check_same_shapes(found, {n: tuple(t.shape) for n, t in skeleton.state_dict().items()})
        return checkpoints.model_values(found)

    engine = build_engine(
        strategy,
        create,
        values,
        lambda network: make(cfg.optimizer, plan.peak, network),
        precision=resolve_precision(cfg.precision, strategy),
        micro_batch=micro,
        accumulation=cfg.global_batch // (strategy.world * micro),
    )
    verify.check_built(engine, CLASSES[cfg.optimizer.name])
    if cfg.ema_decay is not None:
        engine.average = WeightAverage(engine.pieces, cfg.ema_decay)
    check_same_start(engine, 0 if found is None else found.step)
    _check_same_micro_batch(engine)
    if found is not None:
        checkpoints.load_momentum(engine, found)
    seed_generators(cfg.seed, strategy.rank, 0 if found is None else found.step)
    held = None
    if strategy.rank == 0:
        held = take_folder(folder, cfg, strategy, latest)
        save_selection(plan.selection, target.index, cfg.data.train_split, folder / SELECTION)
    say_start(engine, found, steps)
    mixing = None
    if cfg.mixup or cfg.cutmix:
        alpha, classes = cfg.mixup or 0.0, len(target.names)
        mixing = Mixup(seed=cfg.seed, alpha=alpha, classes=classes, cutmix=cfg.cutmix, size=plan.resolution[1])
    return Trainer(
        cfg=cfg,
        engine=engine,
        loss=loss,
        names=target.names,
        train=train,
        valid=valid,
        normalize=Normalizer(plan.start.mean, plan.start.std, train.pixel_max).to(engine.device),
        lr=lambda seen: plan.rule.lr_at(seen // cfg.global_batch, plan.peak),
        folder=folder,
        held=held,
        facts=facts,
        start=0 if found is None else found.step,
        total=steps,
        mixing=mixing,
        generators=None if found is None else checkpoints.generator_states(found, strategy.rank, strategy.world),
        keep_best=False,
        skipped=0 if found is None else int(found.facts.get("skipped") or 0),
        guard=guard or Guard(),
    )


def _check_same_micro_batch(engine: Engine) -> None:
    """ValueError unless all ranks chose the same. All ranks call this."""
    mine = engine.micro_batch
    if int(engine.sum_over_ranks(torch.tensor(mine, device=engine.device))) != mine * engine.world:
        raise ValueError(
            f"rank {engine.rank} has memory for a micro_batch of {mine}, other ranks for another: set micro_batch"
        )


def datasets(plan: Plan) -> tuple[ShardDataset, ShardDataset]:
    """Training and validation data."""
    cfg, target = plan.cfg, plan.target
    precrop, crop = plan.resolution
    rows = plan.selection.rows
    weights = None
    if cfg.oversampling:
        labels = target.targets(cfg.data.train_split)[rows]
        if labels.ndim != 1:
            raise ValueError("oversampling is for multi-class targets: set it to false")
        weights = len(rows) / np.bincount(labels, minlength=len(target.names))[labels]
    order = SelectionOrder(
        rows=rows,
        seed=cfg.seed,
        global_batch=cfg.global_batch,
        draw="replacement" if cfg.sampling == "replacement" else "permutation",
        weights=weights,
    )
    square, flip = cfg.protocol == "bit", float(cfg.data.flip or 0.0)
    made = []
    for split, chosen in ((cfg.data.train_split, order), (plan.valid_split, None)):
        transform = bit_transform(chosen is not None, precrop, crop, square=square, flip=flip)
        kind = StoredDataset if cfg.data.cache else ShardDataset
        data = kind([target.source(split)], chosen, transform, target.channels, cfg.seed, depth=target.depth)
        made.append(keep_decoded(data, cfg.data, precrop, crop, square=square))
    return made[0], made[1]


def _class_weights(plan: Plan) -> tuple[float, ...] | None:
    """Min count / count of each class among the training samples (a class without any counts 1)."""
    if plan.cfg.class_weights == "none":
        return None
    if plan.target.task != "multiclass":
        raise ValueError("class_weights is for multi-class targets: set it to none")
    labels = plan.target.targets(plan.cfg.data.train_split)[plan.selection.rows]
    counts = np.bincount(labels, minlength=len(plan.target.names)).astype(float)
    least = counts[counts > 0].min()
    return tuple(float(least / count) if count else 1.0 for count in counts)


def _check(plan: Plan, train: ShardDataset, valid: ShardDataset) -> None:
    rows = [plan.selection.rows, np.arange(len(valid))]
    with filling([train, valid]) as fill:
        check_images(
            [*train.sources, *valid.sources],
            rows,
            channels=plan.target.channels,
            depth=plan.target.depth,
            workers=plan.cfg.data.workers,
            fill=fill,
        )


def finish(plan: Plan, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Score the final weights, write predictions, model and result.json; the result. All ranks call this."""
    cfg, target, engine = plan.cfg, plan.target, trainer.engine
    predicted = trainer.predicted if trainer.predicted is not None else trainer.predict()
    split = plan.valid_split
    found = scores(trainer.loss, predicted, target.index, split, target.names, resamples=cfg.bootstrap)
    result = {
        "dataset": target.dataset,
        "pretrained_model": plan.start.title,
        "shot": plan.selection.shot,
        "seed": cfg.seed,
        "steps": plan.rule.steps,
        "last_step": trainer.total,
        "protocol": cfg.protocol,
        "options": _beyond(cfg),
        "peak_lr": plan.peak,
        "task": target.task,
        "metric": score(target.task, found)[0],
        "label_names": list(target.names),
        "train_samples": len(plan.selection.rows),
        "valid_samples": int(found["samples"]),
        "metrics": found,
    }
    if engine.rank == 0:
        write_predictions(folder / PREDICTIONS, target.task, [(predicted, target.index, split)], target.names)
        latest = checkpoints.find_latest(folder / "checkpoints")
        assert latest is not None
        _export(checkpoints.open_checkpoint(latest), folder / MODEL)
        write_result(folder, result)
        print(lines(found, target.names))
        print(
            f"{folder}: model in {MODEL}/, {PREDICTIONS}, {RESULT}, {SELECTION}, log.txt; TensorBoard reads the folder"
        )
    engine.barrier()
    return result


def _export(checkpoint: Checkpoint, to: Path) -> None:
    """Write the model, unless a process that was then killed has written the same."""
    if not to.exists():
        return export(checkpoint, to)
    try:
        prove(checkpoints.for_use(checkpoint), to / "model.safetensors")
    except (ValueError, OSError, SafetensorError):
        raise ValueError(
            f"{to} holds something else than this run's model: move it away and give the same command again"
        ) from None


def start_of(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a run folder."""
    latest = checkpoints.find_latest(folder / "checkpoints")
    return None if latest is None else checkpoints.open_checkpoint(latest)


def check_folder(folder: Path, going: Checkpoint | None, cfg: FinetuneConfig) -> None:
    """ValueError where a run in this folder would be mistaken for another one, or its files for data."""
    left = [name for name in (RESULT, MODEL) if (folder / name).exists()]
    if going is None and left:
        raise ValueError(
            f"{folder} holds {' and '.join(left)} but no checkpoint to go on from: another run's result would stand "
            "there while this one trains; take another --logdir, or remove them first"
        )
    where = Path(os.path.realpath(folder))
    root = cfg.data.root if cfg.data.source == "image_folder" else None
    folders = {"data.images": cfg.data.images, "data.root": root, "train_dir": cfg.train_dir, "val_dir": cfg.val_dir}
    for key, data in folders.items():
        holder = None if data is None else Path(os.path.realpath(Path(data).expanduser()))
        if holder is None or (key.startswith("data.") and (holder / "train").is_dir()):
            continue
        if where == holder or holder in where.parents:
            raise ValueError(
                f"the run folder {folder} lies in {key} {data}, where its own folders would be classes: take another "
                "--logdir"
            )


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder wrote its result."""
    return (folder / RESULT).is_file() and (folder / MODEL / "model.json").is_file() and os.access(folder, os.R_OK)
