"""From a configuration to what the planner counts: classes, shapes, optimizer, batch arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletransfer.config import PretrainConfig, accumulation
from scaletransfer.engine.assemble import make_network, make_optimizer
from scaletransfer.engine.build_zero import deepspeed_settings
from scaletransfer.engine.data import open_data
from scaletransfer.engine.strategy import Strategy
from scaletransfer.fake_ranks import blocks
from scaletransfer.ledger import size_of
from scaletransfer.models.convolution import StdConv2d
from scaletransfer.plan_bytes import Job
from scaletransfer.plan_trace import Images
from scaletransfer.plan_zero import ZeroRules
from scaletransfer.units import Segment


def count_classes(cfg: PretrainConfig, given: int | None) -> tuple[int, str]:
    """How many outputs the network has, and who says so: the shards if they are there, ``--classes``, or the file.

    Raises:
        ValueError: nobody says it, or the shards say another number than ``--classes``.
    """
    folders = [folder for folder, _ in cfg.data.folders]
    if all("://" not in folder and (Path(folder) / "index.json").is_file() for folder in folders):
        found = len(open_data(dataclasses.replace(cfg, validate=_no_validation(cfg)))[2])
        if given not in (None, found):
            raise ValueError(f"--classes is {given} but the shards of data.train have {found}: leave --classes away")
        return found, f"of {', '.join(folders)}"
    if given is not None:
        return given, "--classes"
    if cfg.data.nb_classes is not None:
        return cfg.data.nb_classes, "data.nb_classes"
    if cfg.data.expect_labels is not None:
        return len(cfg.data.expect_labels), "data.expect_labels"
    raise ValueError(
        f"how many classes there are is not known: {folders[0]} is no folder of shards here; give --classes N"
    )


def _no_validation(cfg: PretrainConfig) -> Any:
    return dataclasses.replace(cfg.validate, every_steps=None, every_epochs=None)


def node_shards(world: int, per_node: int) -> int:
    """Ranks that share one copy of the state under hsdp: those of a node; on a single node half of them."""
    if world > per_node:
        return per_node
    return world // 2 if world % 2 == 0 and world > 2 else world


def make_job(
    cfg: PretrainConfig,
    classes: int,
    *,
    world: int,
    per_node: int,
    precision: str,
    device_type: str,
    checkpointing: bool | None = None,
    micro_batch: int | None = None,
) -> Job:
    """The configured training on ``world`` ranks, with another way of checkpointing or micro-batch where given.

    Nothing is allocated. Raises ValueError where the global batch is no multiple of ranks x micro-batch, and for what
    ``make_network`` and ``make_optimizer`` refuse.
    """
    cfg = dataclasses.replace(cfg, micro_batch=micro_batch or cfg.micro_batch)
    steps = accumulation(cfg, world)
    way = cfg.model.activation_checkpointing if checkpointing is None else checkpointing
    # compiled blocks keep less, which is not counted: fake tensors see the network as it is written
    model = dataclasses.replace(cfg.model, activation_checkpointing=way, compile=False)

    def create() -> nn.Module:
        return make_network(model, classes)

    with torch.device("meta"):
        skeleton = create()
    groups = make_optimizer(cfg.optimizer, skeleton).param_groups
    inside = {id(p) for block in blocks(skeleton) for p in block.parameters()}
    return Job(
        create=create,
        groups=[[tuple(p.shape) for p in group["params"]] for group in groups],
        root=[tuple(p.shape) for p in skeleton.parameters() if id(p) not in inside],
        images=Images(
            channels=1 if cfg.data.transform == "xray" else 3, size=cfg.data.image_size, device_type=device_type
        ),
        precision=precision,
        world=world,
        shards=node_shards(world, per_node),
        accumulation=steps,
        momentum=cfg.optimizer.momentum > 0,
        # ours steps in one pass over memory
        temporaries=0 if cfg.optimizer.name == "sgd_agc" else (cfg.optimizer.weight_decay > 0) + cfg.optimizer.nesterov,
        buffers=sum(size_of(b) for b in skeleton.buffers()),
        standardised=sum(m.weight.numel() for m in skeleton.modules() if isinstance(m, StdConv2d)),
        zero=zero_rules(world, precision, cfg.micro_batch, steps, cpu=device_type == "cpu"),
        asynchronous=cfg.checkpoint.asynchronous,
    )


def agc_units(cfg: PretrainConfig, job: Job) -> int:
    """Rows whose norms SGD_AGC adds over the ranks; 0 for another optimizer."""
    if cfg.optimizer.name != "sgd_agc":
        return 0
    clipped, exempt = job.groups[0], [shape for group in job.groups[1:] for shape in group]
    return sum(Segment(shape, 0, 0, 0).units for shape in clipped) + len(exempt)


def zero_rules(world: int, precision: str, micro_batch: int, steps: int, *, cpu: bool) -> ZeroRules:
    """DeepSpeed's settings as the engine makes them."""
    strategy = Strategy(engine="zero3", world=world, rank=0, local_rank=0, local_world=world, cpu=cpu)
    settings = deepspeed_settings(strategy, precision, micro_batch, steps)
    return ZeroRules.of(settings.get("zero_optimization", {}))
