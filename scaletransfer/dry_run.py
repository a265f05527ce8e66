"""``pretrain --dry-run``: everything that a run builds, and nothing that it does.

    python -m scaletransfer.pretrain --config C --dry-run --fake-world 256 --engine fsdp2 [--gpu a100-40]
    accelerate launch --config_file launch/fsdp2.yaml -m scaletransfer.pretrain --config C --dry-run --fake-world 256
    accelerate launch --config_file launch/zero2.yaml ... -m scaletransfer.pretrain --config C --dry-run

With ``--fake-world`` one process stands for all ranks (others that a launcher starts have nothing to do): data and
order are opened, the batch arithmetic, the schedule and the checkpoint to go on from are checked, wherever it lies, the
network is sharded on ranks that are not there by FSDP2, whose optimizer is made as well, or by ZeRO-3. DDP holds all of
it, and ZeRO-1 and 2 copy real values when they start: of these the shares are computed only. Under a real launcher the
real engine is built and verified, and the run stops before its first step. Either prints a table and what would be
refused, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from scaletransfer.cli import CommandParser
from scaletransfer.config import PretrainConfig, accumulation
from scaletransfer.engine import pieces
from scaletransfer.engine.assemble import check_continues, make_network, make_optimizer, make_schedule, run_facts
from scaletransfer.engine.checkpoint_fetch import LATEST, Start, place
from scaletransfer.engine.data import open_data, remote_settings
from scaletransfer.engine.holdings import expected_bytes, measured_parameters
from scaletransfer.engine.runlog import check_writable
from scaletransfer.engine.strategy import asked
from scaletransfer.engine.trainer import Trainer
from scaletransfer.fake_ranks import fake_mesh, fake_ranks, shard, zero3_numbers
from scaletransfer.loader import ShardDataset
from scaletransfer.optim import SGD_AGC
from scaletransfer.order import rank_positions
from scaletransfer.plan import Planner, Row
from scaletransfer.plan_bytes import ENGINES
from scaletransfer.plan_devices import find_device
from scaletransfer.plan_job import node_shards
from scaletransfer.schedules import lr_at
from scaletransfer.shares import Held, parameter_share
from scaletransfer.units import local

T = TypeVar("T")
GPUS = 4
"""Of a node, where nobody says it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for beside the configuration."""

    fake_world: int | None
    engine: str
    gpu: str | None
    per_node: int


@dataclass
class Found:
    """The lines of the table, and the sentences with which a run would end."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """One line."""
        self.lines.append((name, text))

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What ``work`` gives; None, and its sentence kept, where a run would be refused there."""
        try:
            return work()
        except (ValueError, OSError) as error:
            self.refused.append(" ".join(str(error).split()))
            return None

    def text(self, title: str) -> str:
        """All of it."""
        width = max((len(name) for name, _ in self.lines), default=0)
        rows = [f"  {name:<{width}}  {text}" for name, text in self.lines]
        verdict = [f"  {sentence}" for sentence in self.refused]
        end = ["would be refused:", *verdict] if verdict else ["nothing would be refused"]
        return "\n".join([title, *rows, *end, "dry run: nothing was trained or written"])


def take_options(argv: Sequence[str]) -> tuple[list[str], Options | None]:
    """The arguments without those of a dry run, and these; None where none was asked for.

    Raises:
        ValueError: options of a dry run without ``--dry-run``, a world below 1, an engine that there is not.
    """
    parser = CommandParser(prog="scaletransfer.pretrain", add_help=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--fake-world", type=int)
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--gpu")
    parser.add_argument("--gpus-per-node", type=int)
    mine, rest = argparse.ArgumentParser.parse_known_args(parser, list(argv))
    given = [name for name in ("fake_world", "engine", "gpu", "gpus_per_node") if getattr(mine, name) is not None]
    if given and not (mine.dry_run and mine.fake_world is not None):
        raise ValueError(f"--{given[0].replace('_', '-')} has a meaning with --dry-run --fake-world N only")
    if not mine.dry_run:
        return rest, None
    for name in ("fake_world", "gpus_per_node"):
        value = getattr(mine, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: must be at least 1")
    engine = mine.engine or ("single" if mine.fake_world == 1 else _launched() or "fsdp2")
    if mine.fake_world is not None and (engine == "single") != (mine.fake_world == 1):
        raise ValueError(f"--engine {engine} does not run on --fake-world {mine.fake_world}")
    per_node = mine.gpus_per_node or min(GPUS, mine.fake_world or GPUS)
    return rest, Options(fake_world=mine.fake_world, engine=engine, gpu=mine.gpu, per_node=per_node)


def _launched() -> str | None:
    """The engine of accelerate's launch file, where this was started with one."""
    return asked().engine if "ACCELERATE_MIXED_PRECISION" in os.environ else None


def on_fake_ranks(cfg: PretrainConfig, options: Options) -> int:
    """Build the run on ranks that are not there, and print what was found. 2 where a run would be refused, else 0."""
    assert options.fake_world is not None
    if os.environ.get("RANK", "0") != "0":
        return 0
    found, world = Found(), options.fake_world
    found.add("engine", f"{options.engine} on {world} fake ranks")
    steps = found.attempt(lambda: accumulation(cfg, world))
    opened = found.attempt(lambda: open_data(cfg))
    found.attempt(lambda: check_writable(Path(cfg.run_dir) / cfg.name))
    start = 0
    if opened is not None:
        train, valid, names = opened
        describe_data(found, train, valid, names)
        start = found.attempt(lambda: _resumes(found, cfg, run_facts(cfg, train, names))) or 0
        if steps is not None:
            found.attempt(lambda: describe_course(found, cfg, train, world, steps, start, validates=valid is not None))
    classes = len(opened[2]) if opened is not None else cfg.data.nb_classes or len(cfg.data.expect_labels or ())
    if steps is not None and classes:
        found.attempt(lambda: _build(found, cfg, options, classes))
    print(found.text(f"{cfg.name}: what would be trained"))
    return 2 if found.refused else 0


def describe_data(found: Found, train: ShardDataset, valid: ShardDataset | None, names: Sequence[str]) -> None:
    """What was opened."""
    for title, data in (("train", train), ("validate", valid)):
        for source in data.sources if data is not None else ():
            found.add(title, f"{source.index.where} {source.split}: {sum(source.shards):,} samples")
    shown = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:3])}, ..."
    found.add("outputs", f"{len(names):,} ({shown})")


def _resumes(found: Found, cfg: PretrainConfig, facts: dict[str, Any]) -> int:
    """The step from which the run would go on, 0 for its beginning; ValueError where it may not. Nothing is fetched."""
    start = Start(
        Path(cfg.run_dir) / cfg.name / "checkpoints",
        place(cfg.checkpoint.resume, cfg.checkpoint.upload, cfg.name),
        demanded=cfg.checkpoint.resume != LATEST,
        accept=lambda checkpoint: check_continues(checkpoint, facts),
        remote=remote_settings(cfg.data.remote),
    )
    step, where = start.peek()
    if where:
        found.add("goes on from", f"{where}, step {step:,}")
    return step


def describe_course(
    found: Found, cfg: PretrainConfig, train: ShardDataset, world: int, steps: int, start: int, *, validates: bool
) -> None:
    """Batch arithmetic, learning rates, checkpoints. ValueError for a schedule that cannot be."""
    order = train.order
    assert order is not None
    for step in (start, start + 1):
        read = np.concatenate([rank_positions(step, r, world, cfg.micro_batch, cfg.global_batch) for r in range(world)])
        assert sorted(read.reshape(-1)) == list(range(step * cfg.global_batch, (step + 1) * cfg.global_batch))
    total = cfg.epochs * order.steps_per_epoch
    total = total if cfg.max_steps is None else min(total, cfg.max_steps)
    found.add(
        "batch",
        f"{cfg.global_batch} = {world} ranks x {cfg.micro_batch} images x {steps} micro-batches, each read once",
    )
    found.add(
        "epoch", f"{order.steps_per_epoch:,} steps of {sum(order.sizes):,} samples in {len(order.sizes)} source(s)"
    )
    found.add("steps", f"{total:,}" + (f", of which {start:,} are done" if start else ""))
    schedule, per_epoch = make_schedule(cfg), order.samples_per_epoch
    marks = {0: "start", int(cfg.schedule.warmup_epochs * order.steps_per_epoch): "after warm-up", total - 1: "end"}
    if cfg.schedule.kind == "step":
        marks |= {int(e * order.steps_per_epoch): f"epoch {e:g}" for e in cfg.schedule.decay_epochs}
    for step, name in sorted(marks.items()):
        if 0 <= step < total:
            rate = lr_at(schedule, step * cfg.global_batch, per_epoch, cfg.global_batch)
            found.add("learning rate", f"{rate:.4g} in step {step + 1:,} ({name})")
    every = cfg.checkpoint.every_steps
    due = "at the end" if every is None else f"every {every:,} steps and at the end: {-(-total // every):,}"
    minutes = "" if cfg.checkpoint.every_minutes is None else f", and every {cfg.checkpoint.every_minutes:g} minutes"
    found.add("checkpoints", f"{due}{minutes}; {cfg.checkpoint.keep} kept")
    if validates:
        by = [
            f"{n} {unit}"
            for n, unit in ((cfg.validate.every_steps, "steps"), (cfg.validate.every_epochs, "epochs"))
            if n
        ]
        found.add("validation", f"every {' and every '.join(by)}, and at the end")


def _build(found: Found, cfg: PretrainConfig, options: Options, classes: int) -> None:
    """The engine's bytes: planned, and under FSDP2 those of real shards on the first, middle and last rank."""
    assert options.fake_world is not None
    world, engine = options.fake_world, options.engine
    cuda = torch.cuda.is_available()
    device = find_device(options.gpu) if options.gpu else find_device("a100-80" if cuda else "cpu:1048576")
    planner = Planner(cfg, classes, device, max(1, world // options.per_node), min(world, options.per_node))
    planner.world = world
    row = planner.row(engine, 0)
    if row.impossible is not None:
        raise ValueError(f"{engine} on {world} ranks: {row.impossible}")
    job = planner.estimator(world, cfg.micro_batch, planner.checkpointing).job
    held = job.held(engine)
    guessed = "" if options.gpu or cfg.precision != "auto" else f" (on {'GPUs' if cuda else 'CPUs'}; --gpu says where)"
    found.add("precision", f"{planner.precision}, fp32 masters{guessed}")
    found.add("optimizer", cfg.optimizer.name)
    _describe_bytes(found, row, held, device.usable if options.gpu else None)
    if engine in ("fsdp2", "hsdp"):
        shards = node_shards(world, options.per_node) if engine == "hsdp" else world
        for rank in sorted({0, world // 2, world - 1}):
            made = shard_on(cfg, classes, world, rank, shards, planner.precision)
            same = "as planned" if made == held.parameters else f"but {held.parameters:,} were planned"
            found.add(f"rank {rank}", f"{made:,} bytes of parameters, sharded by FSDP2: {same}")
            if made != held.parameters:
                raise ValueError(
                    f"rank {rank} of {world} would hold {made:,} bytes of parameters, not {held.parameters:,}"
                )
    elif engine in ("zero3", "zero3_offload"):
        cut = zero3_numbers(lambda: make_network(cfg.model, classes), world, 0)
        share = parameter_share(job.shapes, world)
        if cut is None:
            found.add("built", "shares computed; DeepSpeed is not installed here")
        elif cut == share:
            found.add("rank 0", f"{cut:,} numbers, cut by DeepSpeed's zero.Init: as planned")
        else:
            raise ValueError(f"rank 0 of {world} would hold {cut:,} numbers by DeepSpeed's zero.Init, not {share:,}")
    else:
        found.add("built", "shares computed; this engine does not start on fake ranks")


def _describe_bytes(found: Found, row: Row, held: Held, usable: int | None) -> None:
    assert row.memory is not None and row.traffic is not None
    for name in ("parameters", "masters", "gradients", "momentum"):
        found.add(f"bytes of {name}", f"{getattr(held, name):,} a rank")
    found.add("fullest moment", f"{row.memory.total:,} bytes a rank, in {row.memory.moment}")
    for size, where in ((row.memory.copy, "counted above"), (row.memory.host, "of the host's memory")):
        if size:
            what = "what is offloaded, and copies" if row.engine == "zero3_offload" and row.memory.host else "copies"
            found.add("on the host", f"{size:,} bytes a rank, {where}: {what} from which checkpoints are written")
    found.add("sent", f"{row.traffic.total:,} bytes a rank and step")
    if usable is not None and not row.fits:
        raise ValueError(
            f"{row.engine} needs {row.memory.total:,} bytes a rank and there are {usable:,}: see scaletransfer plan"
        )


def shard_on(cfg: PretrainConfig, classes: int, world: int, rank: int, shards: int, precision: str) -> int:
    """Network, FSDP2 and optimizer on one fake rank, on ``meta``; bytes of the storages that the optimizer steps."""
    with fake_ranks(world, rank):
        with torch.device("meta"):
            network = make_network(cfg.model, classes)
        shard(network, fake_mesh(world, shards), precision)
        optimizer = make_optimizer(cfg.optimizer, network)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, SGD_AGC) and shards == world:
            owned = pieces.fsdp2_pieces(network)
            pieces.check_cover(owned, network)
            optimizer.set_layout(pieces.layout(owned), dist.group.WORLD)
        return sum(local(p).untyped_storage().nbytes() for p in stepped)


def on_real_ranks(cfg: PretrainConfig, trainer: Trainer) -> None:
    """Print what the built run is; all ranks call this, rank 0 prints. The engine was verified when it was built."""
    engine, found = trainer.engine, Found()
    strategy = engine.strategy
    expected = expected_bytes(engine, cfg.optimizer.momentum > 0)
    kind = type(engine.model).__name__
    found.add("engine", f"{strategy.engine} ({kind}) on {engine.world} ranks, verified as built")
    found.add("precision", f"{engine.precision}, fp32 masters")
    found.add("optimizer", type(engine.optimizer).__name__)
    if engine.rank:
        return
    describe_data(found, trainer.train, trainer.valid, trainer.names)
    start = _resumes(found, cfg, trainer.facts)
    describe_course(
        found, cfg, trainer.train, engine.world, engine.accumulation, start, validates=trainer.valid is not None
    )
    found.add("bytes of parameters", f"{measured_parameters(engine):,} on rank 0, expected {expected.parameters:,}")
    for name, size in dataclasses.asdict(expected).items():
        if name != "parameters":
            found.add(f"bytes of {name}", f"expected {size:,} in the first step")
    print(found.text(f"{cfg.name}: what would be trained"))
