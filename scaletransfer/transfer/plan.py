"""What a fine-tuning run will do, decided before a network is made: data, start, selection, schedule, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from scaletransfer import memory
from scaletransfer.config import FinetuneConfig, PretrainConfig
from scaletransfer.models import create_model
from scaletransfer.transfer.data import Target, choose_resolution, open_target, shortened
from scaletransfer.transfer.freezing import freeze
from scaletransfer.transfer.hyperrule import HyperRule, hyper_rule, peak_lr
from scaletransfer.transfer.network import Pretrained, decide_head, fixed_resolution, open_pretrained
from scaletransfer.transfer.selection import Selection, load_selection, select, select_paper


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is decided before a network is made. ``cfg`` has no open choices left."""

    cfg: FinetuneConfig
    target: Target
    start: Pretrained
    selection: Selection
    rule: HyperRule
    peak: float
    head: str
    says: tuple[str, ...]
    """What was inferred, for the person who started it."""

    @property
    def valid_split(self) -> str:
        assert self.cfg.data.valid_split is not None
        return self.cfg.data.valid_split

    @property
    def resolution(self) -> tuple[int, int]:
        size = self.cfg.data.resolution
        assert size is not None
        return size[0], size[1]


def make_plan(
    cfg: FinetuneConfig,
    pretrain: PretrainConfig | None = None,
    pretrain_name: str | None = None,
    *,
    before: FinetuneConfig | None = None,
    device: torch.device | None = None,
    world: int = 1,
) -> Plan:
    """Open the target and the checkpoint, and decide what the configuration leaves open. No image is decoded.

    before: the resolved configuration of the run that is continued: what was chosen for memory then stays.

    Raises:
        ValueError: whatever a person can mend.
    """
    target = open_target(cfg)
    start = open_pretrained(cfg, pretrain, pretrain_name)
    head, head_said = decide_head(cfg.model.head, start, target.names)
    split = cfg.data.train_split
    targets = target.targets(split)
    if cfg.selection is not None:
        selection = load_selection(Path(cfg.selection), target.index, split)
    else:
        selection, how = _select(cfg, target, targets)
        target = replace(target, notes=(*target.notes, *how))
    count = len(selection.rows)
    rule = hyper_rule(count, cfg.protocol, cfg.steps)
    peak = cfg.optimizer.lr if cfg.optimizer.lr is not None else peak_lr(cfg.global_batch, cfg.protocol)
    alpha = (0.0 if cfg.cutmix else rule.mixup) if cfg.mixup is None else cfg.mixup
    fixed = fixed_resolution(start.model)
    if fixed is not None and cfg.data.resolution not in (None, list(fixed)):
        raise ValueError(
            f"{start.model} takes images of {fixed[1]} x {fixed[1]} pixels only: leave data.resolution out, or set it "
            f"to {list(fixed)}"
        )
    if fixed is not None:
        size, why = fixed, "the only one that the network takes"
    elif cfg.data.resolution is not None:
        size, why = (cfg.data.resolution[0], cfg.data.resolution[1]), "as configured"
    else:
        size, why = choose_resolution(target, split)
    flip = cfg.data.flip if cfg.data.flip is not None else (0.0 if start.xray and cfg.protocol == "bit" else 0.5)
    cfg = replace(
        cfg,
        mixup=alpha,
        steps=rule.steps,
        model=replace(cfg.model, name=start.model, path=start.path, head="keep" if head == "keep" else "new"),
        data=replace(
            cfg.data,
            valid_split=target.valid_split,
            resolution=list(size),
            flip=flip,
            mean=start.mean,
            std=start.std,
        ),
    )
    if cfg.oversampling and (cfg.examples_per_class is not None or cfg.selection is not None):
        cfg = replace(cfg, oversampling=False)
        note = "note: no oversampling, which is for full training sets: these classes are equally large"
        target = replace(target, notes=(*target.notes, note))
    drawn = cfg.sampling
    if drawn == "auto":
        # by the configured micro-batch alone: one chosen for memory would change what is trained on
        drawn = "replacement" if cfg.oversampling or (cfg.micro_batch or 0) > count else "permutation"
    cfg = replace(cfg, sampling=drawn)
    cfg, memory_said = _fit_memory(cfg, target, before, device or torch.device("cpu"), world)
    return Plan(
        cfg=cfg,
        target=target,
        start=start,
        selection=selection,
        rule=rule,
        peak=peak,
        head=head,
        says=(
            *_says(cfg, target, start, selection, rule, targets, f"{peak:g}", why, head_said),
            *memory_said,
        ),
    )


def _says(
    cfg: FinetuneConfig,
    target: Target,
    start: Pretrained,
    selection: Selection,
    rule: HyperRule,
    targets: np.ndarray,
    peak: str,
    why: str,
    head: str,
) -> list[str]:
    """What was inferred, a line each."""
    shot = "all" if selection.shot is None else f"{selection.shot} a class"
    unseen = without_samples(targets[selection.rows], target.names)
    size = cfg.data.resolution
    assert size is not None
    return [
        f"target {target.dataset}: {target.task}, {len(target.names)} classes: {shortened(target.names)}",
        *target.notes,
        f"training on {len(selection.rows)} of {len(targets)} images ({shot}), validating on "
        f"{len(target.index.table(target.valid_split))}; {'with' if cfg.sampling == 'replacement' else 'without'} "
        "replacement",
        *([f"no training sample has {shortened(unseen)}: nothing is learnt of it"] if unseen else []),
        f"network {start.model} from "
        + (start.path or ("drawn values (scratch)" if start.state is None else "timm's own weights")),
        head,
        f"resolution {size[0]}, crop {size[1]} ({why}); flip {cfg.data.flip:g}; mean {start.mean}, std {start.std}",
        f"BiT-HyperRule ({cfg.protocol}): {rule.steps} steps of {cfg.global_batch} images, peak learning rate "
        f"{peak}, warm-up {rule.warmup}, decays at {', '.join(map(str, rule.decays))}, "
        + (f"mixup {cfg.mixup:g}" if cfg.mixup else "no mixup")
        + (f", CutMix {cfg.cutmix:g}" if cfg.cutmix else ""),
        *([f"frozen: all up to {cfg.model.freeze_through}"] if cfg.model.freeze_through else []),
        *(["frozen: all but the classifier"] if cfg.model.linear_probe else []),
    ]


def _select(cfg: FinetuneConfig, target: Target, targets: np.ndarray) -> tuple[Selection, list[str]]:
    """The training samples by examples_per_class, and what a person should know of how."""
    split, shot = cfg.data.train_split, cfg.examples_per_class
    files = target.index.in_memory
    if shot is not None and (cfg.few_shot == "paper" or (cfg.few_shot == "auto" and cfg.protocol == "paper" and files)):
        found, note = select_paper(
            target.index, split, targets, target.names, shot=shot, seed=cfg.seed, allow_fewer=cfg.allow_fewer
        )
        return found, [note]
    found = select(target.index, split, targets, target.names, shot=shot, seed=cfg.seed, allow_fewer=cfg.allow_fewer)
    asked = shot is not None and cfg.protocol == "paper" and cfg.few_shot == "auto"
    note = "note: shards have no published order: few-shot samples are chosen by their keys, not as published"
    return found, [note] if asked else []


def without_samples(targets: np.ndarray, names: Sequence[str]) -> list[str]:
    """Names of the classes (targets int64 [n]) or labels (float32 [n, L]) that no sample has."""
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=len(names))
    else:
        counts = (targets == 1).sum(axis=0)
    return [name for name, count in zip(names, counts, strict=True) if count == 0]


def _fit_memory(
    cfg: FinetuneConfig, target: Target, before: FinetuneConfig | None, device: torch.device, world: int
) -> tuple[FinetuneConfig, list[str]]:
    """Micro-batch, checkpointing and precision: as configured, as before, or as memory allows."""
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    same = before is not None and (before.model.name, before.data.resolution, before.global_batch) == (
        cfg.model.name,
        cfg.data.resolution,
        cfg.global_batch,
    )
    if before is not None and same:
        cfg = replace(
            cfg,
            micro_batch=cfg.micro_batch or before.micro_batch,
            model=replace(
                cfg.model,
                activation_checkpointing=before.model.activation_checkpointing
                if cfg.model.activation_checkpointing is None
                else cfg.model.activation_checkpointing,
            ),
        )
        if cfg.precision == "auto":
            precision = before.precision
    per_rank = cfg.global_batch // world
    if per_rank * world != cfg.global_batch:
        raise ValueError(f"global_batch {cfg.global_batch} is not a multiple of the {world} processes: change one")
    pairs = 2 if cfg.mixup or cfg.cutmix else 1
    if cfg.micro_batch is not None and cfg.micro_batch % pairs:
        raise ValueError(
            f"micro_batch {cfg.micro_batch} is odd, but mixup mixes pairs (CutMix too): make it even, or set 0"
        )
    if cfg.micro_batch is not None and per_rank % cfg.micro_batch:
        raise ValueError(
            f"micro_batch {cfg.micro_batch} does not divide the {per_rank} images of each of {world} processes: change "
            "one of them"
        )
    budget = None if cfg.memory_gb is None else int(cfg.memory_gb * 1e9)
    if budget is None and device.type == "cpu":
        # Not what is free: that differs by the minute, and with it the micro-batch, and with that the rounding.
        budget = memory.installed() // 2 // world
    name, size = cfg.model.name, cfg.data.resolution
    assert name is not None and size is not None
    checkpointing = cfg.model.activation_checkpointing
    if cfg.micro_batch is not None and checkpointing is not None:  # nothing to choose, and an estimate takes seconds
        how = "with" if checkpointing else "without"
        said = f"micro-batch {cfg.micro_batch}, {how} activation checkpointing, {precision}: as configured"
        return replace(cfg, precision=precision), [said]

    def create() -> nn.Module:
        return freeze(create_model(name, len(target.names)), cfg.model.freeze_through, cfg.model.linear_probe)

    copies = (cfg.optimizer.name == "adamw") + (cfg.ema_decay is not None)
    if copies:  # beyond the one of momentum, with which the estimate counts
        with torch.device("meta"):
            trained = sum(p.numel() for p in create().parameters() if p.requires_grad)
        budget = (memory.available(device) if budget is None else budget) - 4 * copies * trained
    choice = memory.choose(
        create,
        target.channels,
        size[1],
        global_batch=per_rank,
        device=device,
        precision=precision,
        micro_batch=cfg.micro_batch,
        activation_checkpointing=cfg.model.activation_checkpointing,
        budget=budget,
        multiple_of=pairs,
        copied=1 / world if cfg.checkpoint.asynchronous else 0,
    )
    chosen = replace(
        cfg,
        micro_batch=choice.micro_batch,
        precision=choice.precision,
        model=replace(cfg.model, activation_checkpointing=choice.activation_checkpointing),
    )
    lines = memory.describe(choice).splitlines()
    free = memory.available(device) // (world if device.type == "cpu" else 1)
    if choice.estimated > free:
        lines.append(f"note: only {free / 2**30:.1f} GiB of memory are free now; set memory_gb to stay below")
    return chosen, lines
