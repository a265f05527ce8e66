"""Bytes that a GPU sends in a step under each engine, and a lower bound of the step's time.

Volumes are those of ring algorithms, which are the least there is for large messages (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"): of n ranks each sends (n-1)/n of the message
to gather it or to reduce and scatter it, and twice that to reduce it for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from scaletransfer.plan_bytes import Job
from scaletransfer.plan_devices import Device
from scaletransfer.shares import FLOAT, parameter_share, persistent, row_share


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one GPU sends in one step."""

    near: int = 0
    """Within the group of ranks that share one copy of the state (all of them, but under hsdp)."""
    across: int = 0
    """Between hsdp's copies."""
    host: int = 0
    """From the GPU to its host and back, the larger of the two: they do not share a wire."""

    @property
    def total(self) -> int:
        """To other GPUs."""
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
    if engine == "single" or (n == 1 and not job.away(engine)):
        return Traffic()
    whole = job.parameters
    norms = 2 * ring(job.shards if engine == "hsdp" else n) * 2 * FLOAT * units
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
    again = max(0, padded - small - job.zero.kept_for_backward(job.shapes))
    gathered = job.compute * (times * (padded - small + again) + small)
    host = 0
    if job.away(engine):
        # a rank's parts come before each gathering; its gradients go, and come back where more are added to them
        come, go = gathered // n + (times - 1) * FLOAT * padded // n, times * FLOAT * padded // n
        host = max(come, go)
    return Traffic(near=int(ring(n) * (gathered + times * FLOAT * padded) + norms), host=host)


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
            optimizer reads and writes in the GPU's memory.
        nodes: over which the ranks run; per_node: ranks of each.
    """
    peak = device.bf16 if job.precision == "bf16" else device.fp32
    if not peak:
        return None
    return Time(
        compute=flops / peak,
        communication=max(_links(engine, job, device, sent, nodes, per_node), sent.host / device.host_link),
        update=state / device.memory_speed,
    )


def _links(engine: str, job: Job, device: Device, sent: Traffic, nodes: int, per_node: int) -> float:
    """Seconds at the least, as all links work at once."""
    if nodes == 1:
        return sent.total / device.link
    if engine == "hsdp" and job.shards <= per_node:
        # each GPU of a node has other rows, and sends them to its like in other nodes
        return max(sent.near / device.link, sent.across / device.network)
    # whatever the number of its GPUs a node needs a message once, over all of its adapters
    leaving = sent.total * ring(nodes) / ring(job.world)
    return max(leaving / (device.network * per_node), sent.total / (device.link + device.network))
