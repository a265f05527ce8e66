"""Before a run starts: would what its engine holds fit into the memory that there is?

Shares and copies for checkpoints are certain (``shares``), activations are an estimate: so only the former refuse a
run, before anything is allocated. ``scaletransfer plan`` says what the whole would take.
"""

from __future__ import annotations

import torch

from scaletransfer.config import PretrainConfig, accumulation
from scaletransfer.engine.assemble import make_network, make_optimizer
from scaletransfer.engine.build import resolve_precision
from scaletransfer.engine.strategy import Strategy
from scaletransfer.memory import available, installed
from scaletransfer.plan_job import zero_rules
from scaletransfer.shares import Held, Shape, copied, held

GIB = 2**30


def check_memory(cfg: PretrainConfig, strategy: Strategy, classes: int) -> None:
    """Compare parameters, gradients and momentum of this rank with the memory of its GPU, or of this host.

    The host's memory also takes the copies from which checkpoints are written in the background. A note is printed (by
    rank 0) where more is needed than is free now, as others may go.

    Raises:
        ValueError: they are more than all the memory there is, whoever uses it.
    """
    share = share_of(cfg, strategy, classes)
    if strategy.cpu:
        ranks, where, total, free = strategy.local_world, "this host", installed(), available("cpu")
    else:
        device = torch.device("cuda", strategy.local_rank)
        ranks, where = 1, "each GPU"
        total, free = torch.cuda.get_device_properties(device).total_memory, available(device)
        if strategy.engine == "zero3_offload":
            ranks, where, total, free = strategy.local_world, "this host", installed(), available("cpu")
    needed = ranks * share.total
    said = (
        f"{strategy.engine} on {strategy.world} ranks holds {share.total / GIB:.1f} GiB a rank (parameters "
        f"{(share.parameters + share.masters) / GIB:.1f}, gradients {share.gradients / GIB:.1f}, momentum "
        f"{share.momentum / GIB:.1f}), {needed / GIB:.1f} GiB on {where}"
    )
    if needed > total:
        raise ValueError(
            f"{said}, which has {total / GIB:.1f}: take an engine that splits more, or more ranks on more machines "
            "(scaletransfer plan says which fit)"
        )
    copies = strategy.local_world * copy_of(cfg, strategy, classes)
    beside = needed if where == "this host" else 0
    if copies + beside > installed():
        also = f" beside {beside / GIB:.1f} GiB of the training's state" if beside else ""
        raise ValueError(
            f"the copies from which {strategy.local_world} ranks write checkpoints take {copies / GIB:.1f} GiB on this "
            f"host{also}, which has {installed() / GIB:.1f}: set checkpoint.asynchronous=false, training then waits "
            "for its checkpoints"
        )
    if needed > free and strategy.rank == 0:
        print(f"note: {said}, where {free / GIB:.1f} are free; activations come on top")


def copy_of(cfg: PretrainConfig, strategy: Strategy, classes: int) -> int:
    """Bytes of the copy from which this rank writes checkpoints; 0 where training waits for them."""
    if not cfg.checkpoint.asynchronous:
        return 0
    return copied(
        strategy.engine,
        _groups(cfg, classes),
        strategy.world,
        shards=strategy.shards if strategy.fsdp else None,
        momentum=cfg.optimizer.momentum > 0,
        pinned=not strategy.cpu,
    )


def _groups(cfg: PretrainConfig, classes: int) -> list[list[Shape]]:
    """Shapes of the trained parameters, one list a parameter group of the optimizer; nothing is allocated."""
    with torch.device("meta"):
        network = make_network(cfg.model, classes)
    groups = make_optimizer(cfg.optimizer, network).param_groups
    return [[tuple(p.shape) for p in group["params"]] for group in groups]


def share_of(cfg: PretrainConfig, strategy: Strategy, classes: int) -> Held:
    """What the engine holds on this rank; nothing is allocated."""
    precision = resolve_precision(cfg.precision, strategy)
    rules = zero_rules(strategy.world, precision, cfg.micro_batch, accumulation(cfg, strategy.world), cpu=strategy.cpu)
    return held(
        strategy.engine,
        _groups(cfg, classes),
        strategy.world,
        shards=strategy.shards,
        rank=strategy.rank,
        precision=precision,
        momentum=cfg.optimizer.momentum > 0,
        threshold=rules.stage3_param_persistence_threshold,
    )
