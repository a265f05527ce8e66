"""Reads an epoch on every rank and counts what the operating system is asked for; validates; as itself and in disguise.

Arguments: configuration of a multi-label run, one of a multi-class run, folder for rank-<r>.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scaletransfer.config import PretrainConfig, parse_args
from scaletransfer.engine.assemble import build_trainer
from scaletransfer.engine.evaluate import predict
from scaletransfer.engine.strategy import asked
from scaletransfer.engine.trainer import Trainer
from scaletransfer.loader import Batch, EvalSampler, ShardDataset
from scaletransfer.order import Order
from scaletransfer.streams import batches, make_loader

Read = Callable[[ShardDataset, Sequence[int]], Batch]


def build(config: str, *overrides: str) -> Trainer:
    cfg, _ = parse_args(["--config", config, *overrides], PretrainConfig, prog="test", description="")
    return build_trainer(cfg, asked(cuda=False))


def counted() -> Any:
    """A number in shared memory to which every ``os.preadv`` of this process and of its loader processes adds."""
    total = multiprocessing.Value("q", 0)
    original = os.preadv

    def preadv(handle: int, memory: list[memoryview], offset: int) -> int:
        found = original(handle, memory, offset)
        with total.get_lock():
            total.value += found
        return found

    os.preadv = preadv
    return total


def whole_round(data: ShardDataset, positions: Sequence[int], rank: int, world: int) -> list[int]:
    """The positions that all ranks together have at this moment: each has the same place in its part of the batch."""
    assert isinstance(data.order, Order)
    part = data.order.global_batch // world
    return [position + (other - rank) * part for other in range(world) for position in positions]


def share(batch: Batch, positions: Sequence[int], counted_as: int) -> Batch:
    mine = torch.isin(batch["position"], torch.tensor(positions))
    rows = {name: batch[name][mine] for name in ("image", "target", "position", "key")}
    return {**batch, **rows, "bytes": torch.tensor(counted_as)}


def everyone_reads_all(read: Read, rank: int, world: int) -> Read:
    """Planted: every rank reads the batch of all and throws away what is not its own."""

    def fault(data: ShardDataset, positions: Sequence[int]) -> Batch:
        batch = read(data, whole_round(data, positions, rank, world))
        return share(batch, positions, int(batch["bytes"]))

    return fault


def rank_0_reads_for_all(read: Read, rank: int, world: int, *, quiet: bool) -> Read:
    """Planted: rank 0 reads and broadcasts, as accelerate's dispatcher does; ``quiet`` books each rank its share."""

    def fault(data: ShardDataset, positions: Sequence[int]) -> Batch:
        batch = [read(data, whole_round(data, positions, rank, world)) if rank == 0 else None]
        dist.broadcast_object_list(batch, src=0)
        assert batch[0] is not None
        total = int(batch[0]["bytes"])
        return share(batch[0], positions, total // world if quiet else total * (rank == 0))

    return fault


def read_epochs(config: str, total: Any, name: str, workers: int, read: Read) -> int:
    """Bytes that this rank asked for in a training run with the loader ``read``."""
    honest = ShardDataset.__getitems__
    ShardDataset.__getitems__ = read
    try:
        trainer = build(config, f"name={name}", f"data.workers={workers}", "epochs=1", "validate.every_epochs=null")
        before = total.value
        trainer.run()
        return int(total.value - before)
    finally:
        ShardDataset.__getitems__ = honest


def validated(config: str, name: str, *overrides: str) -> dict[str, Any]:
    """Validation of the untrained network: the report, and which positions the predictions are of."""
    trainer = build(config, f"name={name}", *overrides)
    assert trainer.valid is not None
    report = trainer.validate()
    sampler = EvalSampler(len(trainer.valid), trainer.engine.rank, trainer.engine.world, 4)
    found = predict(trainer.engine, trainer.normalize, batches(make_loader(trainer.valid, sampler, 0)))
    return {
        "report": report,
        "positions": found["position"].tolist(),
        "logits": found["logits"].tolist(),
        "decoded": len({p for batch in sampler for p in batch}),
    }


def main(config: str, classes: str, out: str) -> None:
    strategy = asked(cuda=False)
    rank, world = strategy.rank, strategy.world
    total = counted()
    honest = ShardDataset.__getitems__
    disguises: dict[str, tuple[int, Read]] = {
        "own": (0, honest),
        "own, by workers": (2, honest),
        "everyone": (0, everyone_reads_all(honest, rank, world)),
        "rank 0": (0, rank_0_reads_for_all(honest, rank, world, quiet=False)),
        "rank 0, quiet": (0, rank_0_reads_for_all(honest, rank, world, quiet=True)),
    }
    result: dict[str, Any] = {"multilabel": validated(config, "v1"), "multiclass": validated(classes, "v2")}
    if world > 1:
        result["read"] = {
            name: read_epochs(config, total, f"case-{number}", workers, read)
            for number, (name, (workers, read)) in enumerate(disguises.items())
        }
    (Path(out) / f"world-{world}-rank-{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
