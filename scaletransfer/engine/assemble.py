"""From a configuration to a Trainer: data, model, engine, where the run stands."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletransfer.config import ModelConfig, OptimizerConfig, PretrainConfig, accumulation
from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine import verify
from scaletransfer.engine.build import Engine, build_engine, resolve_precision
from scaletransfer.engine.checkpoint import Checkpoint
from scaletransfer.engine.checkpoint_fetch import LATEST, Start, place
from scaletransfer.engine.checkpoint_upload import Uploader
from scaletransfer.engine.data import open_data, remote_settings
from scaletransfer.engine.filling import Values
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.reading import Reading
from scaletransfer.engine.runfolder import take_folder
from scaletransfer.engine.runlog import check_writable
from scaletransfer.engine.strategy import Strategy
from scaletransfer.engine.trainer import Trainer
from scaletransfer.loader import ShardDataset
from scaletransfer.losses import make_loss
from scaletransfer.models import create_model, head_names, initial_tensors
from scaletransfer.models.weights import first_difference, load_pretrained, network_options
from scaletransfer.optim import SGD_AGC, split_head
from scaletransfer.order import ORDER_VERSION
from scaletransfer.schedules import Schedule, lr_at
from scaletransfer.transforms import Normalizer

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "sgd_agc": SGD_AGC}


def make_network(cfg: ModelConfig, classes: int, **options: Any) -> nn.Module:
    """The configured network, with activation checkpointing and compilation switched on where asked for. options: of
    `create_model`."""
    network = create_model(cfg.name, classes, **options)
    if cfg.activation_checkpointing:
        switch = getattr(network, "set_grad_checkpointing", None)
        if switch is None:
            raise ValueError(f"model.activation_checkpointing is true but {cfg.name} does not offer it")
        switch(True)
    if cfg.compile:
        by_unit = getattr(network, "set_compiled", None)
        if by_unit is None:
            network.compile()
        else:
            by_unit(True)
    return network


def make_optimizer(settings: OptimizerConfig, network: nn.Module) -> torch.optim.Optimizer:
    """The configured base optimizer over the network's parameters; the engine sets the learning rate each step."""
    common: dict[str, Any] = {
        "lr": settings.base_lr,
        "momentum": settings.momentum,
        "dampening": settings.dampening,
        "weight_decay": settings.weight_decay,
        "nesterov": settings.nesterov,
    }
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if settings.name == "sgd":
        return torch.optim.SGD([p for _, p in trained], **common)
    weight, bias = _head(network)
    groups = [g for g in split_head(trained, weight, bias, settings.head_exempt) if g["params"]]
    return SGD_AGC(groups, clipping=settings.clipping, eps=settings.eps, **common)


def _head(network: nn.Module) -> tuple[str, str | None]:
    names = head_names(network)
    weights = [name for name in names if name.endswith("weight")]
    if len(weights) != 1:
        raise ValueError(
            f"the head of this network has the tensors {list(names)}: sgd_agc needs exactly one weight, use sgd"
        )
    biases = [name for name in names if name.endswith("bias")]
    return weights[0], biases[0] if biases else None


def starting_values(
    cfg: PretrainConfig, found: Checkpoint | None, names: Sequence[str], skeleton: nn.Module
) -> tuple[Values, dict[str, Any]]:
    """Where each tensor's values come from: the checkpoint, ``model.init_from``, or the seed. And what
    `create_model` must be told to compute with them as they were made (`network_options`).

    Args:
        names: of the outputs. A head from ``model.init_from`` must have as many, and the same where it names its own.
    """
    if found is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        checkpoints.check_same_shapes(found, shapes)
        return checkpoints.model_values(found), network_options(found.facts)
    drawn = initial_tensors(skeleton, cfg.seed)
    if cfg.model.init_from is None:
        return drawn, {}
    state, meta = load_pretrained(cfg.model.init_from, model_name=cfg.model.name)
    return _pretrained(cfg.model, skeleton, state, drawn, names, meta.get("label_names")), network_options(meta)


def _pretrained(
    cfg: ModelConfig, skeleton: nn.Module, state: dict[str, Tensor], drawn: Values, names: Sequence[str], theirs: Any
) -> Values:
    own, head = skeleton.state_dict(), set(head_names(skeleton))
    used = {name for name in own if not (cfg.new_head and name in head)}
    odd = sorted(n for n in used if n not in state or state[n].shape != own[n].shape)
    if odd and set(odd) <= head:
        found = state[odd[0]].shape[0] if odd[0] in state else "no"
        raise ValueError(
            f"model.init_from {cfg.init_from} has a head of {found} classes but this run has {len(names)}: set "
            "model.new_head=true to draw a new one"
        )
    if odd:
        shapes = [{n: tuple(t.shape) for n, t in tensors.items() if n in used} for tensors in (state, own)]
        difference = first_difference(*shapes)
        raise ValueError(
            f"model.init_from {cfg.init_from} does not fit {cfg.name}: {difference}; set model.name to the network of "
            "that checkpoint"
        )
    if theirs is not None and not cfg.new_head and list(theirs) != list(names):
        raise ValueError(
            f"model.init_from {cfg.init_from} has the label names {_short(theirs)} but this run {_short(list(names))}: "
            "its head means something else; set model.new_head=true to draw a new one"
        )
    return lambda name: state[name].float() if name in used else drawn(name)


def run_facts(cfg: PretrainConfig, train: ShardDataset, names: tuple[str, ...]) -> dict[str, Any]:
    """What must stay as it is inside a run, and what an exported model must know of its making."""
    assert train.order is not None
    data = cfg.data
    return {
        "model": cfg.model.name,
        "task": train.sources[0].index.task,
        "label_names": list(names),
        "policy": {
            "name": data.policy.name,
            "uncertain": data.policy.uncertain,
            "blank": data.policy.blank,
            "per_label": dict(data.policy.per_label),
        },
        "normalisation": {"mean": data.mean, "std": data.std, "pixel_max": pixel_max(train)},
        "transform": {
            "kind": data.transform,
            "size": data.image_size,
            "augmentation": data.augment_protocol,
            "rand_augment": data.rand_augment,
        },
        "seed": cfg.seed,
        "global_batch": cfg.global_batch,
        "order_version": ORDER_VERSION,
        "data": [{"source": s.index.source, "split": s.split, "index_sha256": s.index.digest} for s in train.sources],
        "weights": [weight for _, weight in data.folders],
        "samples_per_epoch": train.order.samples_per_epoch,
        "optimizer": cfg.optimizer.name,
    }


def pixel_max(train: ShardDataset) -> int:
    """The pixel value that stands for 1: 255, or of 16-bit shards the end of the range that they use."""
    return train.pixel_max


def check_continues(found: Checkpoint, facts: dict[str, Any]) -> None:
    """ValueError that names the first fact in which the checkpoint's run and this configuration differ."""
    difference = _difference("", {key: found.facts.get(key) for key in facts}, facts)
    if difference is not None:
        name, stored, wanted = difference
        raise ValueError(
            f"{found.folder} was made with {name} {_short(stored)}, but this run has {_short(wanted)}: a run cannot "
            "change it on the way; give the new run another name (name=...; for fine-tuning, --logdir) or restore the "
            "old value"
        )


def _difference(name: str, stored: Any, wanted: Any) -> tuple[str, Any, Any] | None:
    """(dotted name, value, value) of the innermost fact in which the two differ first, or None."""
    if stored == wanted:
        return None
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(stored, dict) and isinstance(wanted, dict):
        above = f"{name}." if name else ""
        pairs = [(above + key, stored.get(key), wanted.get(key)) for key in {**wanted, **stored}]
    elif name == "data" and len(stored or ()) == len(wanted):
        pairs = [(f"{name}[{i}]", stored[i], wanted[i]) for i in range(len(wanted))]
    found = (_difference(*pair) for pair in pairs)
    return next((one for one in found if one is not None), (name, stored, wanted))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def check_same_start(engine: Engine, step: int) -> None:
    """ValueError unless all ranks found the same checkpoint. All ranks call this."""
    total = int(engine.sum_over_ranks(torch.tensor(step, device=engine.device)))
    if total != step * engine.world:
        raise ValueError(
            f"rank {engine.rank} found a checkpoint of step {step}, other ranks another one: the shared file system "
            "lags behind; start again in a minute"
        )


def build_trainer(
    cfg: PretrainConfig,
    strategy: Strategy,
    guard: Guard | None = None,
    *,
    dry: bool = False,
    weigh: Callable[[PretrainConfig, Strategy, int], None] | None = None,
) -> Trainer:
    """Everything that a run needs, resumed from the newest complete checkpoint if there is one. All ranks call this.

    guard: what surrounds the run; None: nothing does.
    dry: nothing is written, and the trainer must not run. weigh: called with the number of classes before anything
    large is allocated; it refuses by ValueError.

    Raises:
        ValueError: configuration, data or checkpoint that do not fit; EngineMismatch: another engine than asked for.
    """
    if not strategy.cpu:
        torch.cuda.set_device(strategy.local_rank)
        if strategy.rank == 0 and torch.cuda.device_count() > strategy.local_world:
            print(
                f"note: {torch.cuda.device_count()} GPUs are here, {strategy.local_world} used: --num_processes sets it"
            )
    steps = accumulation(cfg, strategy.world)
    train, valid, names = open_data(cfg)
    if weigh is not None:
        weigh(cfg, strategy, len(names))
    assert train.order is not None
    total = cfg.epochs * train.order.steps_per_epoch
    total = total if cfg.max_steps is None else min(total, cfg.max_steps)
    folder = Path(cfg.run_dir) / cfg.name
    facts = run_facts(cfg, train, names)
    schedule = make_schedule(cfg)
    per_epoch = train.order.samples_per_epoch
    lr_at(schedule, 0, per_epoch, cfg.global_batch)  # a schedule that cannot be is refused here
    check_writable(folder)
    remote = remote_settings(cfg.data.remote)
    start = Start(
        folder / "checkpoints",
        None if dry else place(cfg.checkpoint.resume, cfg.checkpoint.upload, cfg.name),
        demanded=cfg.checkpoint.resume != LATEST,
        accept=lambda checkpoint: check_continues(checkpoint, facts),
        remote=remote,
    )

    options: dict[str, Any] = {}  # known once the values are, which is before the network itself is made

    def values(skeleton: nn.Module) -> Values:
        start.look(strategy.rank, torch.device("cpu" if strategy.cpu else f"cuda:{strategy.local_rank}"))
        found, how = starting_values(cfg, start.found, names, skeleton)
        options.update(how)
        facts.update(how)
        return found

    engine = build_engine(
        strategy,
        lambda: make_network(cfg.model, len(names), **options),
        values,
        lambda network: make_optimizer(cfg.optimizer, network),
        precision=resolve_precision(cfg.precision, strategy),
        micro_batch=cfg.micro_batch,
        accumulation=steps,
    )
    verify.check_built(engine, OPTIMIZERS[cfg.optimizer.name])
    found = start.found
    check_same_start(engine, 0 if found is None else found.step)
    if found is not None:
        checkpoints.load_momentum(engine, found)
    seed_generators(cfg.seed, strategy.rank, 0 if found is None else found.step)
    held = None
    if strategy.rank == 0 and not dry:  # only now: what does not fit leaves no folder behind
        held = take_folder(folder, cfg, strategy, None if found is None else found.folder)
    if not dry:
        say_start(engine, found, total)
    return Trainer(
        cfg=cfg,
        engine=engine,
        loss=make_loss(train.sources[0].index.task),  # type: ignore[arg-type]
        names=names,
        train=train,
        valid=valid,
        normalize=Normalizer(cfg.data.mean, cfg.data.std, pixel_max(train)).to(engine.device),
        lr=lambda seen: lr_at(schedule, seen, per_epoch, cfg.global_batch),
        folder=folder,
        held=held,
        facts=facts,
        start=0 if found is None else found.step,
        total=total,
        best=None if found is None else found.facts.get("best"),
        generators=None if found is None else checkpoints.generator_states(found, strategy.rank, strategy.world),
        away=uploader(cfg) if strategy.rank == 0 else None,
        skipped=0 if found is None else int(found.facts.get("skipped") or 0),
        guard=guard or Guard(),
        reading=Reading(max_bad=cfg.data.max_bad_samples),
        worker_kind=cfg.data.worker_kind,
    )


def uploader(cfg: PretrainConfig) -> Uploader | None:
    """What copies the run's checkpoints away, where that is configured."""
    settings = cfg.checkpoint
    where = place(LATEST, settings.upload, cfg.name)
    return None if where is None else Uploader(where, settings.upload_keep, remote_settings(cfg.data.remote))


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed torch's global generators, from which dropout of timm's networks draws: every rank draws its own, and so
    does a run that goes on where nothing is stored for its number of ranks."""
    digest = hashlib.sha256(f"{seed}/{rank}/{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def make_schedule(cfg: PretrainConfig) -> Schedule:
    """The configured schedule over the configured epochs."""
    chosen = cfg.schedule
    return Schedule(
        kind=chosen.kind,
        base_lr=cfg.optimizer.base_lr,
        epochs=cfg.epochs,
        warmup_epochs=chosen.warmup_epochs,
        warmup_start_factor=chosen.warmup_start_factor,
        decay_epochs=tuple(chosen.decay_epochs),
        decay_factor=chosen.decay_factor,
        min_lr=chosen.min_lr,
    )


def say_start(engine: Engine, found: Checkpoint | None, total: int) -> None:
    """One line on rank 0, and this process's id for whoever wants to signal it."""
    if engine.rank == 0:
        where = "from the beginning" if found is None else f"from {found.folder} (step {found.step})"
        print(f"{engine.strategy.engine} on {engine.world} ranks: training {where} to step {total}", flush=True)
    print(f"rank {engine.rank} is process {os.getpid()}", file=sys.stderr, flush=True)
