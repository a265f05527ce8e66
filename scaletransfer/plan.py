"""What a pre-training run would take, before it is started: bytes, traffic and least time under each engine.

    scaletransfer plan --config configs/imagenet21k_bit152x4.yaml --nodes 64 --gpus-per-node 4 --gpu a100-40

For each engine: the bytes on one GPU at the fullest moment of a step (parameters with their float32 masters, gradients,
momentum, activations of a micro-batch, blocks gathered whole, buffers of communication, the optimizer's copies),
whether they fit, the bytes a GPU sends in a step, and a lower bound of a step's time. Then which engine to take and
why, and where the configured micro-batch fits nowhere, which one would.

Nothing is allocated and no GPU is needed: activations are measured by running the network on tensors without values,
FSDP2 on ranks that are not there. Times are bounds from the makers' data sheets, not measurements: real steps are
slower. The number of classes comes from the shards, where they are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scaletransfer.cli import CommandParser
from scaletransfer.config import PretrainConfig, accumulation, load_config
from scaletransfer.memory import COMFORTABLE
from scaletransfer.plan_bytes import ENGINES, Estimator, Memory
from scaletransfer.plan_devices import DEVICES, Device, find_device
from scaletransfer.plan_job import agc_units, count_classes, make_job
from scaletransfer.plan_show import show
from scaletransfer.plan_time import Time, Traffic, step_time, traffic
from scaletransfer.plan_trace import flops_per_image

SIMPLEST = ("single", "ddp", "fsdp2", "hsdp", "zero2", "zero1", "zero3", "zero3_offload")
"""The order in which engines are preferred that are equally fast. On several nodes hsdp comes before fsdp2: what a
forward waits for, gathered weights, then travels inside a node, and bounds do not know of latency."""
ALIKE = 1.1
"""Lower bounds whose ratio is less do not say which engine is faster,"""
NOISE = 0.005
"""nor do those that differ by so many seconds: starting the kernels and collectives of some hundred layers takes as
long."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What would fit where the configured micro-batch does not."""

    micro_batch: int
    activation_checkpointing: bool
    asynchronous: bool
    """False: only where training waits for its checkpoints (``checkpoint.asynchronous``)."""
    total: int
    changes: str
    """What to append to the command."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine."""

    engine: str
    impossible: str | None
    """Why this engine cannot run on these ranks at all; the rest is None then."""
    memory: Memory | None = None
    state: int = 0
    """Bytes of parameters, masters, gradients and momentum alone, which are there in every step, on the GPU."""
    fits: bool = False
    certain: bool = False
    """It does not fit whatever the micro-batch: ``state`` alone is too much."""
    traffic: Traffic | None = None
    time: Time | None = None
    advice: Advice | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it, as ``--json`` prints it."""

    model: str
    parameters: int
    classes: int
    classes_from: str
    image_size: int
    channels: int
    precision: str
    activation_checkpointing: bool
    global_batch: int
    micro_batch: int
    accumulation: int
    nodes: int
    gpus_per_node: int
    shards: int
    """Ranks that share one copy of the state under hsdp."""
    device: Device
    flops_per_image: int
    rows: tuple[Row, ...]
    recommended: str | None
    reason: str

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def row(self, engine: str) -> Row:
        """One engine's row."""
        return next(row for row in self.rows if row.engine == engine)

    def as_json(self) -> dict[str, Any]:
        """Plain data: dataclasses as objects, with each row's total bytes, step time and what bounds it."""
        found = asdict(self)
        for plain, row in zip(found["rows"], self.rows, strict=True):
            for key, names in (("memory", ("total",)), ("traffic", ("total",)), ("time", ("step", "bound"))):
                if plain[key] is not None:
                    plain[key] |= {name: getattr(getattr(row, key), name) for name in names}
        found["device"]["usable"] = self.device.usable
        return found


class Planner:
    """Weighs the engines for one configuration."""

    def __init__(self, cfg: PretrainConfig, classes: int, device: Device, nodes: int, per_node: int) -> None:
        self.cfg, self.classes, self.device = cfg, classes, device
        self.nodes, self.per_node, self.world = nodes, per_node, nodes * per_node
        self.precision = cfg.precision
        if self.precision == "auto":
            self.precision = "bf16" if device.kind == "cuda" else "fp32"
        self.checkpointing = cfg.model.activation_checkpointing
        self._estimators: dict[tuple[int, bool, bool], Estimator] = {}

    def estimator(self, world: int, micro_batch: int, checkpointing: bool) -> Estimator:
        """Estimates depend on accumulation only in whether there is any."""
        accumulated = self.cfg.global_batch > world * micro_batch
        key = (world, accumulated, checkpointing)
        if key not in self._estimators:
            job = make_job(
                self.cfg,
                self.classes,
                world=world,
                per_node=self.per_node,
                precision=self.precision,
                device_type=self.device.kind,
                checkpointing=checkpointing,
                micro_batch=micro_batch,
            )
            self._estimators[key] = Estimator(job)
        return self._estimators[key]

    def row(self, engine: str, flops: int) -> Row:
        """One engine at the configured micro-batch, and what would fit where that does not."""
        cfg, world = self.cfg, 1 if engine == "single" else self.world
        if self.world == 1 and engine not in ("single", "zero3_offload"):
            return Row(engine=engine, impossible="one GPU: nothing to split or to average over")
        if self.device.kind == "cpu" and engine == "zero3_offload" and self.world == 1:
            return Row(engine=engine, impossible="on a CPU host and device are one: nothing to offload")
        estimator = self.estimator(world, cfg.micro_batch, self.checkpointing)
        job = estimator.job
        if engine == "hsdp" and job.shards == world:
            return Row(engine=engine, impossible="needs 2 nodes, or 4 GPUs: with fewer it is fsdp2")
        found = estimator.memory(engine, cfg.micro_batch)
        sent = traffic(engine, job, agc_units(cfg, job) if engine not in ("single", "ddp") else 0)
        fits = found.total <= self.device.usable
        held = job.held(engine)
        state = held.total - job.away(engine)
        return Row(
            engine=engine,
            impossible=None,
            memory=found,
            state=state,
            fits=fits,
            certain=state > self.device.usable,
            traffic=sent,
            time=step_time(
                engine,
                job,
                self.device,
                flops=flops * cfg.global_batch / world,
                sent=sent,
                # weights, gradients and momentum are read, weights and momentum written
                state=0 if job.away(engine) else 5 * held.momentum if held.momentum else 3 * held.gradients,
                nodes=1 if engine == "single" else self.nodes,
                per_node=self.per_node,
            ),
            advice=None if fits else self._advice(engine, world, found),
        )

    def _advice(self, engine: str, world: int, found: Memory) -> Advice | None:
        """What would fit: the least change that does."""
        without = found.total - found.copy
        if without <= self.device.usable:
            return self._changed(self.cfg.micro_batch, self.checkpointing, copies=False, total=without)
        smaller = self._smaller(engine, world, copies=True)
        return smaller or (self._smaller(engine, world, copies=False) if found.copy else None)

    def _smaller(self, engine: str, world: int, *, copies: bool) -> Advice | None:
        """The largest smaller micro-batch that fits; with checkpointing where that allows a comfortable one."""
        each = self.cfg.global_batch // world
        smaller = [m for m in range(self.cfg.micro_batch, 0, -1) if each % m == 0]
        best: Advice | None = None
        for way in [False, True] if not self.checkpointing else [True]:
            for micro_batch in smaller:
                if best is not None and micro_batch <= best.micro_batch:
                    break
                try:
                    needed = self.estimator(world, micro_batch, way).memory(engine, micro_batch)
                except ValueError:  # this network has no checkpointing
                    break
                total = needed.total - (0 if copies else needed.copy)
                if total <= self.device.usable:
                    best = self._changed(micro_batch, way, copies=copies, total=total)
            if best is not None and best.micro_batch >= min(COMFORTABLE, self.cfg.micro_batch):
                break
        return best

    def _changed(self, micro_batch: int, checkpointing: bool, *, copies: bool, total: int) -> Advice:
        changes = {
            f"micro_batch={micro_batch}": micro_batch != self.cfg.micro_batch,
            "model.activation_checkpointing=true": checkpointing != self.checkpointing,
            "checkpoint.asynchronous=false": not copies,
        }
        return Advice(
            micro_batch=micro_batch,
            activation_checkpointing=checkpointing,
            asynchronous=copies,
            total=total,
            changes=" ".join(text for text, needed in changes.items() if needed),
        )


def make_plan(
    cfg: PretrainConfig,
    device: Device,
    *,
    nodes: int,
    per_node: int,
    classes: int | None = None,
    engines: Sequence[str] = ENGINES,
) -> Plan:
    """Weigh the engines; nothing is allocated.

    Raises:
        ValueError: a number of classes that nobody says, a global batch that is no multiple of ranks x micro-batch, a
            network or an optimizer that is refused.
    """
    steps = accumulation(cfg, nodes * per_node)
    number, whence = count_classes(cfg, classes)
    planner = Planner(cfg, number, device, nodes, per_node)
    job = planner.estimator(planner.world, cfg.micro_batch, planner.checkpointing).job
    flops = flops_per_image(job.create, job.images)
    rows = tuple(planner.row(engine, flops) for engine in engines)
    recommended, reason = recommend(rows, device, planner.world, nodes)
    return Plan(
        model=cfg.model.name,
        parameters=job.parameters,
        classes=number,
        classes_from=whence,
        image_size=cfg.data.image_size,
        channels=job.images.channels,
        precision=planner.precision,
        activation_checkpointing=planner.checkpointing,
        global_batch=cfg.global_batch,
        micro_batch=cfg.micro_batch,
        accumulation=steps,
        nodes=nodes,
        gpus_per_node=per_node,
        shards=job.shards,
        device=device,
        flops_per_image=flops,
        rows=rows,
        recommended=recommended,
        reason=reason,
    )


def recommend(rows: Sequence[Row], device: Device, world: int, nodes: int = 1) -> tuple[str | None, str]:
    """The engine to take, and why; None where none fits even with a smaller micro-batch."""
    order = list(SIMPLEST)
    if nodes > 1:
        order[2:4] = "hsdp", "fsdp2"

    def simplicity(row: Row) -> int:
        return order.index(row.engine)

    able = [row for row in rows if row.impossible is None and (row.engine != "single" or world == 1)]
    fitting = [row for row in able if row.fits]
    onboard = [row for row in fitting if row.engine != "zero3_offload"] or fitting
    if onboard:
        least = min(map(_cost, onboard))
        enough = max(ALIKE * least, least + NOISE) if onboard[0].time is not None else ALIKE * least
        chosen = min((row for row in onboard if _cost(row) <= enough), key=simplicity)
        return chosen.engine, _why(chosen, rows, onboard, device)
    advised = [row for row in able if row.advice is not None]
    advised = [row for row in advised if row.engine != "zero3_offload"] or advised
    if not advised:
        return None, _nothing(able, device) if able else "no engine was weighed"
    largest = max(row.advice.micro_batch for row in advised if row.advice)
    chosen = min((row for row in advised if row.advice and row.advice.micro_batch == largest), key=simplicity)
    assert chosen.advice is not None
    return chosen.engine, f"no engine fits as configured; {chosen.engine} fits with {chosen.advice.changes}"


def _nothing(able: Sequence[Row], device: Device) -> str:
    least = min(able, key=lambda row: row.state)
    if least.certain:
        return (
            f"parameters, gradients and momentum alone take {least.state / 2**30:.1f} of {device.usable / 2**30:.1f} "
            f"GiB a GPU under {least.engine}, which splits most: more GPUs, or GPUs with more memory, are needed"
        )
    return (
        "nothing fits, not even one image a micro-batch: smaller images (data.image_size), a smaller network, more "
        "GPUs or GPUs with more memory are needed"
    )


def _cost(row: Row) -> float:
    assert row.traffic is not None
    return row.time.step if row.time is not None else float(row.traffic.total)


def _why(chosen: Row, rows: Sequence[Row], fitting: Sequence[Row], device: Device) -> str:
    assert chosen.memory is not None
    if chosen.engine == "single":
        return "one GPU is enough"
    ddp = next((row for row in rows if row.engine == "ddp"), None)
    room = f"{chosen.memory.total / 2**30:.1f} of {device.usable / 2**30:.1f} GiB"
    if chosen.engine == "ddp":
        return f"everything fits whole ({room}), and no engine is simpler or sends less"
    if chosen.engine == "zero3_offload":
        return f"only with the optimizer's state in the host's memory does it fit ({room})"
    why = f"it fits ({room})"
    if ddp is not None and ddp.memory is not None and not ddp.fits:
        why += f", ddp does not ({ddp.memory.total / 2**30:.1f} GiB)"
    if ddp is not None and ddp.fits and chosen.time is not None and ddp.time is not None:
        return f"{why} and takes {chosen.time.step:.3f} s a step at least, ddp {ddp.time.step:.3f} s"
    if len(fitting) > 1:
        measure = "time" if chosen.time is not None else "traffic"
        why += f"; of the {len(fitting)} that fit it is the simplest within {ALIKE - 1:.0%} of the least {measure}"
    return why


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = CommandParser(
        prog="scaletransfer plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", action="append", default=[], metavar="FILE", required=True, help="as for pretrain")
    made.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    made.add_argument("--gpus-per-node", type=int, default=4, metavar="G", help="GPUs of each (default 4)")
    made.add_argument(
        "--gpu",
        default="a100-40",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or cpu:GIB for ranks on a CPU that may take so much each (default a100-40)",
    )
    made.add_argument("--network", type=float, metavar="GBIT", help="Gbit/s that a node sends (default: the table's)")
    made.add_argument("--classes", type=int, metavar="N", help="outputs of the network, where the shards are not here")
    made.add_argument("--json", action="store_true", help="print all numbers as JSON, in bytes and seconds")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="set one key, for example micro_batch=8")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command: print the plan. Returns the exit status; raises ValueError for what a person can mend."""
    options = parser().parse_intermixed_args(argv)
    for name in ("nodes", "gpus_per_node", "classes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: must be at least 1")
    device = find_device(options.gpu, options.network, options.gpus_per_node)
    cfg = load_config(options.config, options.overrides)
    plan = make_plan(cfg, device, nodes=options.nodes, per_node=options.gpus_per_node, classes=options.classes)
    print(json.dumps(plan.as_json(), indent=1) if options.json else show(plan))
    return 0
