"""Bytes that a GPU sends in a step under each engine, and a lower bound of the step's time.

Volumes are those of ring algorithms, which are the least there is for large messages (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"): of n ranks each sends (n-1)/n of the message
to gather it or to reduce and scatter it, and twice that to reduce it for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaletransfer.plan_bytes import Job, kept_for_backward
from scaletransfer.plan_devices import Device
from scaletransfer.shares import FLOAT, parameter_share, persistent, row_share


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one GPU sends in one step."""

    near: int = 0
    """Within the group of ranks that share one copy of the state (all of them, but under hsdp)."""
    across: int = 0
    """Between hsdp's copies."""

    @property
    def total(self) -> int:
        return self.near + self.across


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a step at the least."""

    compute: float
    communication: float
    update: float

    @property
    def step(self) -> float:
        """Communication at best hides behind computation; the optimizer's update waits for both."""
        return max(self.compute, self.communication) + self.update

    @property
    def bound(self) -> str:
        """What the bound comes from."""
        return "compute" if self.compute >= self.communication else "links"


def traffic(engine: str, job: Job, units: int = 0) -> Traffic:
    """Bytes sent by a rank in a step.

    Args:
        engine: name; job: its accumulation counts, as sharded engines communicate in every micro-batch.
        units: rows whose norms SGD_AGC adds over the ranks, two float32 each (0: none, or nothing is split).
    """
    n, times = job.world, job.accumulation
    if engine == "single" or n == 1:
        return Traffic()
    whole = job.parameters
    norms = 2 * ring(n) * 2 * FLOAT * units
    if engine == "ddp":
        return Traffic(near=int(2 * ring(n) * FLOAT * whole))
    if engine in ("fsdp2", "hsdp"):
        shards = job.shards if engine == "hsdp" else n
        padded = row_share(job.shapes, shards) * shards
        gathered = (2 * padded - _root(job, shards)) * job.compute
        near = times * ring(shards) * (gathered + FLOAT * padded)
        copies = n // shards
        across = times * 2 * ring(copies) * FLOAT * padded / shards
        return Traffic(near=int(near + norms), across=int(across))
    if engine in ("zero1", "zero2"):
        # DeepSpeed 0.19 all-reduces a bucket and keeps its part; ZeRO-1 once a step, ZeRO-2 in every micro-batch
        reductions = times if engine == "zero2" else 1
        gathered = job.compute * whole
        return Traffic(near=int(reductions * 2 * ring(n) * FLOAT * whole + ring(n) * gathered + norms))
    threshold = job.zero.stage3_param_persistence_threshold
    padded = parameter_share(job.shapes, n) * n
    small = persistent(job.shapes, threshold)
    again = max(0, padded - small - kept_for_backward(job))
    gathered = job.compute * (times * (padded - small + again) + small)
    return Traffic(near=int(ring(n) * (gathered + times * FLOAT * padded) + norms))


def ring(ranks: int) -> float:
    """Share of a message that a rank sends to gather it, or to reduce and scatter it."""
    return (ranks - 1) / ranks


def _root(job: Job, shards: int) -> int:
    """Numbers that FSDP2 gathers once a micro-batch: the root's, which stay gathered from forward to backward."""
    return row_share(job.root, shards) * shards


def step_time(
    engine: str, job: Job, device: Device, *, flops: float, sent: Traffic, state: int, nodes: int, per_node: int
) -> Time | None:
    """A lower bound, or None where the device's speed is not known.

    Args:
        flops: of a GPU in a step. sent: what it sends. state: bytes of parameters, gradients and momentum that its
            optimizer reads, and writes but for the gradients.
        nodes: over which the ranks run; per_node: ranks of each.
    """
    peak = device.bf16 if job.precision == "bf16" else device.fp32
    if not peak:
        return None
    if engine == "hsdp" and job.shards <= per_node:
        links = [(sent.near, device.link), (sent.across, device.network if nodes > 1 else device.link)]
        communication = sum(size / speed for size, speed in links)
    elif nodes > 1:
        # what leaves a node is what one of its GPUs sends in a ring, spread over all its adapters
        leaving = sent.total / (device.network * per_node)
        communication = max(leaving, sent.total / device.link)
    else:
        communication = sent.total / device.link
    return Time(compute=flops / peak, communication=communication, update=state / device.memory_speed)
