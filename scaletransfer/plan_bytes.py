"""Bytes on one GPU at the fullest moment of a step, engine by engine.

What an engine holds between steps comes from ``shares``; activations, and FSDP2's gathered blocks, from ``plan_trace``;
what DeepSpeed gathers and copies from its own rules (deepspeed 0.19, runtime/zero), which are written down here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import nn

from scaletransfer.memory import FRAGMENTATION
from scaletransfer.plan_trace import Images, Trace, trace, trace_fsdp
from scaletransfer.plan_zero import ZeroRules
from scaletransfer.shares import (
    FLOAT,
    Held,
    Shape,
    copied,
    cut_parameters,
    flat_share,
    held,
    parameter_share,
    persistent,
    row_share,
)

Moment = Literal["forward", "backward", "reduction", "update"]
ENGINES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "zero3_offload")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and how: everything but the engine."""

    create: Callable[[], nn.Module]
    """Makes the network, with activation checkpointing as configured."""
    groups: Sequence[Sequence[Shape]]
    """Shapes of the trained parameters, one list a parameter group of the optimizer."""
    root: Sequence[Shape]
    """Of them, those outside residual units: FSDP2's root holds them."""
    images: Images
    precision: str
    world: int
    shards: int
    """Ranks that share one copy of the state under hsdp."""
    accumulation: int
    momentum: bool
    temporaries: int
    """Copies of a gradient that the optimizer makes in a tensor's update: weight decay and Nesterov add one each."""
    buffers: int = 0
    """Bytes of the network's buffers."""
    standardised: int = 0
    """Numbers in the weights that are standardised."""
    zero: ZeroRules = field(default_factory=ZeroRules)
    asynchronous: bool = False
    """Checkpoints are written from a copy while training goes on."""

    @cached_property
    def shapes(self) -> list[Shape]:
        """Of all parameters."""
        return [shape for group in self.groups for shape in group]

    @cached_property
    def parameters(self) -> int:
        """Numbers in the network."""
        return sum(map(math.prod, self.shapes))

    @property
    def cuda(self) -> bool:
        return self.images.device_type == "cuda"

    @property
    def compute(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.precision == "bf16" else FLOAT

    @property
    def once(self) -> int:
        """Bytes of the weights that single and ddp standardise once for all micro-batches."""
        return FLOAT * self.standardised if self.accumulation > 1 else 0

    def held(self, engine: str) -> Held:
        """What an engine holds on the rank that holds most."""
        ranks = range(self.world) if engine in ("zero1", "zero2") and self.world <= 64 else (0, self.world // 2)
        found = [
            held(
                engine,
                self.groups,
                self.world,
                shards=self.shards if engine == "hsdp" else None,
                rank=rank,
                precision=self.precision,
                momentum=self.momentum,
                threshold=self.zero.stage3_param_persistence_threshold,
            )
            for rank in ranks
        ]
        return max(found, key=lambda h: h.total)

    def away(self, engine: str) -> int:
        """Bytes of ``held`` that lie in the host's memory: all but the small parameters, with offload from a GPU."""
        if engine != "zero3_offload" or not self.cuda:
            return 0
        small = persistent(self.shapes, self.zero.stage3_param_persistence_threshold)
        return self.held(engine).total - self.compute * small

    def copied(self, engine: str) -> int:
        """Bytes of host memory for the copy from which checkpoints are written."""
        if not self.asynchronous:
            return 0
        shards = self.shards if engine == "hsdp" else None
        return copied(engine, self.groups, self.world, shards=shards, momentum=self.momentum, pinned=self.cuda)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a GPU at one moment of a step."""

    moment: Moment
    """forward, backward: of a micro-batch. reduction: gradients are added over the ranks. update: the optimizer."""
    parameters: int
    """With float32 masters and the network's buffers."""
    gradients: int
    momentum: int
    standardised: int = 0
    """Weights that are standardised once for all micro-batches of a step."""
    activations: int = 0
    """With what convolutions copy and an allocator loses."""
    gathered: int = 0
    """Blocks of parameters that are whole for a while, and whole gradients on their way to be split."""
    buckets: int = 0
    """Buffers of communication."""
    update: int = 0
    """The optimizer's temporary copies."""
    copy: int = 0
    """What a checkpoint is copied to before it is written, where that is the same memory (on a CPU)."""
    host: int = 0
    """Not on the GPU but in its host's memory, for each GPU: what is offloaded, and the copy for checkpoints."""

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.momentum
            + self.standardised
            + math.ceil((self.activations + self.gathered) * FRAGMENTATION)
            + self.buckets
            + self.update
            + self.copy
        )


class Estimator:
    """Bytes of one job under each engine, for any micro-batch. Traces are made once, when an engine asks for them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._traces: dict[tuple[object, ...], Trace] = {}

    def memory(self, engine: str, micro_batch: int) -> Memory:
        """The fullest moment of a step under ``engine``."""
        if engine in ("single", "ddp"):
            found = self._whole(engine, micro_batch)
        elif engine in ("fsdp2", "hsdp"):
            found = self._fsdp(engine, micro_batch)
        elif engine in ("zero1", "zero2"):
            found = self._zero12(engine, micro_batch)
        else:
            found = self._zero3(engine, micro_batch)
        fullest, copy = max(found, key=lambda m: m.total), self.job.copied(engine)
        if self.job.cuda:
            return replace(fullest, host=self.job.away(engine) + copy)
        return replace(fullest, copy=copy)

    def _live(self, micro_batch: int, gradients: str, *, native: bool = False, kept: float = 0.0) -> int:
        """Bytes that a micro-batch needs where the network is whole; ``native``: its weights are bf16."""
        job = self.job
        key = ("whole", gradients, native, kept)
        if key not in self._traces:
            bf16 = job.precision == "bf16"
            self._traces[key] = trace(
                job.create,
                job.images,
                autocast=bf16 and not native,
                native=bf16 and native,
                gradients=gradients,  # type: ignore[arg-type]
                kept=kept,
            )
        return self._traces[key].live(micro_batch)

    def _whole(self, engine: str, micro_batch: int) -> list[Memory]:
        """Single and ddp: everything whole.

        ddp's gradients are views of its buckets, which stay. Where micro-batches are accumulated, those before the last
        make gradients of their own beside the buckets.
        """
        job, h = self.job, self.job.held(engine)
        base = {"parameters": h.parameters + job.buffers, "momentum": h.momentum, "standardised": job.once}
        if engine == "ddp" or job.accumulation > 1:
            activations, gradients = self._live(micro_batch, "there"), h.gradients
        else:
            # gradients come while activations go: their sum is the trace's, split here for the eye
            live = self._live(micro_batch, "new")
            gradients = min(h.gradients, live)
            activations = live - gradients
        largest = max(map(math.prod, job.shapes))
        step = job.parameters * min(1, job.temporaries) if job.cuda else largest * job.temporaries
        return [
            Memory(
                moment="backward",
                gradients=gradients,
                activations=activations,
                buckets=h.gradients if engine == "ddp" and job.accumulation > 1 else 0,
                **base,
            ),
            Memory(moment="update", gradients=h.gradients, update=FLOAT * step, **base),
        ]

    def _fsdp(self, engine: str, micro_batch: int) -> list[Memory]:
        job, h = self.job, self.job.held(engine)
        shards = job.shards if engine == "hsdp" else job.world
        gradients: Literal["there", "new"] = "there" if job.accumulation > 1 else "new"
        key = ("fsdp", gradients, shards)
        if key not in self._traces:
            self._traces[key] = trace_fsdp(
                job.create,
                job.images,
                world=job.world,
                shards=shards,
                precision=job.precision,
                gradients=gradients,
            )
        live = self._traces[key].live(micro_batch)
        activations = min(live, self._live(micro_batch, "taken", native=True))
        rest = live - activations
        held_now = h.gradients if gradients == "there" else min(h.gradients, rest)
        gathered = rest - (0 if gradients == "there" else held_now)
        base = {"parameters": h.parameters + job.buffers, "momentum": h.momentum}
        largest = max(row_share([shape], shards) for shape in job.shapes)
        return [
            Memory(moment="backward", gradients=held_now, activations=activations, gathered=gathered, **base),
            Memory(moment="update", gradients=h.gradients, update=FLOAT * largest * job.temporaries, **base),
        ]

    def _zero12(self, engine: str, micro_batch: int) -> list[Memory]:
        """ZeRO-1 and 2 copy gradients into a bucket, all-reduce a flat copy of it, and keep what lies in their part."""
        job, h, rules = self.job, self.job.held(engine), self.job.zero
        base = {"parameters": h.parameters + h.masters + job.buffers, "momentum": h.momentum}
        bf16 = job.precision == "bf16"
        filled = min(job.parameters, rules.reduce_bucket_size)
        staged = 2 if bf16 and engine == "zero2" else FLOAT
        # torch.empty: a CPU gives pages when they are written, a GPU all of them at once
        bucket = staged * (rules.reduce_bucket_size if job.cuda else filled) * (2 if rules.overlap_comm else 1)
        if engine == "zero1" and bf16:
            bucket = 0  # BF16_Optimizer has none: fp32 gradients are accumulated whole
        copies = filled * (staged + (FLOAT if staged != FLOAT else 0))
        once = job.parameters <= rules.reduce_bucket_size
        kept = FLOAT * max(cut_parameters(job.groups, job.world, rank) for rank in {0, job.world // 2, job.world - 1})
        whole = job.compute * job.parameters
        accumulated = 0
        if job.accumulation > 1:
            accumulated = (kept if not bf16 else h.gradients) if engine == "zero2" else 0
        if engine == "zero1":
            live = self._live(micro_batch, "there" if job.accumulation > 1 else "new", native=True)
            lasting = h.gradients if bf16 else whole if job.accumulation > 1 else min(whole, live)
            activations = live if bf16 or job.accumulation > 1 else live - lasting
            backward = Memory(
                moment="backward",
                gradients=lasting,
                activations=activations,
                buckets=bucket if job.cuda else 0,
                **base,
            )
        else:
            # Written pages of the bucket come as gradients do. Where it is filled more than once, copies do too.
            gradual = once and not job.cuda
            live = self._live(micro_batch, "new" if gradual else "taken", native=True)
            backward = Memory(
                moment="backward",
                gradients=accumulated,
                activations=live,
                buckets=0 if gradual else bucket + (0 if once else copies),
                **base,
            )
        reduced = h.masters if bf16 and engine == "zero2" else kept
        reduction = Memory(
            moment="reduction",
            gradients=h.gradients if engine == "zero1" and bf16 else accumulated,
            buckets=bucket + max(copies, reduced),
            **base,
        )
        largest = max(flat_share(group, job.world) for group in job.groups)
        update = Memory(
            moment="update",
            gradients=h.gradients,
            update=FLOAT * largest * (1 + (min(1, job.temporaries) if job.cuda else job.temporaries)),
            **base,
        )
        return [backward, reduction, update]

    def _zero3(self, engine: str, micro_batch: int) -> list[Memory]:
        """ZeRO-3 keeps what backward needs again soon, prefetches, and reduces gradients from a lasting bucket."""
        job, h, rules = self.job, self.job.held(engine), self.job.zero
        away = job.away(engine) > 0
        parameters = (h.total - job.away(engine) if away else h.parameters + h.masters) + job.buffers
        base = {"parameters": parameters, "momentum": 0 if away else h.momentum}
        gradients = 0 if away else h.gradients
        filled = min(job.parameters, rules.reduce_bucket_size)
        bucket = FLOAT * (rules.reduce_bucket_size if job.cuda else filled)
        # the bucket by ranks; in float32 where it is not; and gloo reduces a copy (ProcessGroupGloo, torch 2.14)
        copies = FLOAT * filled * (1 + (job.compute != FLOAT) + (not job.cuda))
        once = job.parameters <= rules.reduce_bucket_size
        forward, kept = rules.gathered(job.shapes), rules.kept_for_backward(job.shapes)
        # where nothing is gathered in backward, what came in one tensor is let go of when forward ends, and a
        # parameter when its gradient is there
        everything = kept == sum(rules.large(job.shapes))
        gathered = kept if everything else forward
        # on a CPU the engine gives their pages back after each step, but for those that the offloaded optimizer has
        gradual = engine == "zero3" and not job.cuda and job.accumulation == 1
        share = h.gradients / (FLOAT * job.parameters) * gradual
        live = self._live(micro_batch, "taken", native=True, kept=share - everything)
        backward = Memory(
            moment="backward",
            gradients=0 if gradual else gradients,
            activations=live,
            gathered=job.compute * gathered,
            buckets=bucket + (0 if once else copies),
            **base,
        )
        first = Memory(
            moment="forward",
            gradients=0 if gradual else gradients,
            activations=self._forward(micro_batch),
            gathered=job.compute * forward,
            buckets=bucket,
            **base,
        )
        # what is reduced comes to its place when gloo's copy is gone
        there = gradients - math.floor(gradual * gradients * filled / job.parameters)
        reduction = Memory(moment="reduction", gradients=there, buckets=bucket + copies, **base)
        # the engine gives the optimizer each sub-group's gradients where they lie
        step = min(parameter_share(job.shapes, job.world), rules.sub_group_size)
        temporaries = min(1, job.temporaries) if job.cuda else job.temporaries
        update = Memory(
            moment="update",
            gradients=gradients,
            update=0 if away else FLOAT * step * temporaries,
            buckets=bucket,
            **base,
        )
        return [first, backward, reduction, update]

    def _forward(self, micro_batch: int) -> int:
        """Bytes at the end of a forward under DeepSpeed."""
        self._live(micro_batch, "taken", native=True)
        return self._traces["whole", "taken", True, 0.0].kept(micro_batch)
