"""How much memory a training step on one device takes, found without allocating any, and what fits.

`ledger.record` tells every storage that comes and goes in a micro-batch, in forward and in backward. As each is a fixed
number of bytes plus so many an image, two records of different micro-batches give every moment's bytes for all others.

Counted exactly: weights, gradients, momentum, and what PyTorch's operations return and keep. Allowed for by two named
constants, as no framework can know them beforehand: what convolution libraries take inside an operation
(``ledger.CONVOLUTION_COPIES``) and what an allocator cannot use (``FRAGMENTATION``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from scaletransfer.ledger import fake_network, record, size_of
from scaletransfer.models.convolution import StdConv2d

Precision = Literal["fp32", "bf16"]

FRAGMENTATION = 1.05
"""What the activations take of the allocator, over what they hold. CUDA's caching allocator rounds blocks of more than
10 MiB up to 2 MiB and keeps the rests of split blocks; it gives back whole free segments before it fails."""
DEVICE_MARGIN = 512 * 2**20
"""Bytes of a GPU left alone: kernels are loaded at first use, and cuBLAS and cuDNN keep small buffers."""
HOST_MARGIN = 0.1
"""Share of a host's free memory left alone, for the loader's workers and the page cache."""
COMFORTABLE = 4
"""Checkpointing costs about a third more time; a micro-batch below this one costs a GPU more."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one training step takes, as a function of the micro-batch. All numbers are bytes but ``parameters``."""

    precision: Precision
    activation_checkpointing: bool
    parameters: int
    """Numbers in the network's parameters."""
    state_bytes: int
    """Weights, buffers, gradients and momentum."""
    fixed_bytes: int
    """What backward needs at the end of a forward whatever the micro-batch: standardised weights and bf16 copies."""
    activation_bytes_per_image: int
    """What backward needs at the end of a forward for each image."""
    moments: tuple[tuple[int, int], ...]
    """(fixed bytes, bytes an image) beside the state, at each moment that is the fullest for some micro-batch."""
    copy_bytes: int = 0
    """Of the copy from which checkpoints are written, where that is the same memory (on a CPU)."""
    once_bytes: int = 0
    """Of the weights that are standardised once a step, where micro-batches are accumulated."""
    global_batch: int = 0
    """Smaller micro-batches are accumulated."""

    def live(self, micro_batch: int) -> int:
        """Bytes of activations, their gradients and workspace at the fullest moment of a step."""
        return max(fixed + micro_batch * each for fixed, each in self.moments)

    def transient(self, micro_batch: int) -> int:
        """The part of ``live`` that backward or one operation takes on top of what forward had kept."""
        return max(0, self.live(micro_batch) - self.fixed_bytes - micro_batch * self.activation_bytes_per_image)

    def total(self, micro_batch: int) -> int:
        """Bytes on the device while it trains with this micro-batch."""
        once = self.once_bytes if micro_batch < self.global_batch else 0
        return self.state_bytes + self.copy_bytes + once + math.ceil(self.live(micro_batch) * FRAGMENTATION)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a network is trained on one device, and what that takes."""

    micro_batch: int
    activation_checkpointing: bool
    precision: Precision
    estimated: int
    """Bytes that training takes, estimated."""
    budget: int
    """Bytes that there are for it."""
    candidates: tuple[int, ...]
    """The micro-batches that were weighed, ascending."""
    estimates: tuple[Estimate, ...]
    """Of the ways that were weighed; the chosen one is among them."""


def estimate(
    create: Callable[[], nn.Module],
    channels: int,
    size: int,
    *,
    precision: Precision,
    activation_checkpointing: bool,
    momentum: bool = True,
    copied: float = 0.0,
    device_type: str = "cuda",
) -> Estimate:
    """Estimate the memory of training a network on one device, gradients accumulated over micro-batches.

    Args:
        create: makes the network; it is made of fake tensors, so size and values do not matter.
        channels: of the images [b, channels, size, size]; size: in pixels.
        precision: "fp32", or "bf16" for float32 weights under autocast.
        activation_checkpointing: blocks are recomputed in backward (the network's ``set_grad_checkpointing``).
        momentum: the optimizer keeps one number a parameter.
        copied: share of the parameters whose float32 values and momentum are copied to the host's memory before they
            are written into a checkpoint; 0 where training waits for the disk.
        device_type: "cuda" or "cpu", which differ in what autocast leaves in float32. Neither has to be there.

    Raises:
        ValueError: the network has no activation checkpointing, or does not take such images.
    """
    with fake_network(create) as network:
        return _estimate(network, channels, size, precision, activation_checkpointing, momentum, device_type, copied)


def choose(
    create: Callable[[], nn.Module],
    channels: int,
    size: int,
    *,
    global_batch: int,
    device: torch.device | str,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    micro_batch: int | None = None,
    activation_checkpointing: bool | None = None,
    budget: int | None = None,
    multiple_of: int = 1,
    largest: int = 64,
    momentum: bool = True,
    copied: float = 0.0,
) -> Choice:
    """Choose micro-batch and activation checkpointing so that training fits; nothing is allocated.

    What is given is kept, None is chosen. Without checkpointing the largest micro-batch that fits is taken if it is
    at least ``COMFORTABLE`` or the largest there is; otherwise checkpointing is used where that allows a larger one.
    Where both are given nothing is refused, as the estimate may err: ``describe`` says when it is over the budget.

    Args:
        create, channels, size, momentum, copied: as for ``estimate``.
        global_batch: images a step; micro-batches divide it.
        device: what is trained on; precision: "auto" is bf16 on CUDA and fp32 elsewhere.
        budget: bytes that training may take; None: what is ``available`` on the device.
        multiple_of: micro-batches are multiples of it; largest: the largest one that is considered.

    Raises:
        ValueError: nothing that was left to choose fits, or a given value contradicts another.
    """
    device = torch.device(device)
    resolved: Precision = precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    candidates = _candidates(global_batch, micro_batch, multiple_of, largest)
    if budget is None:
        budget = available(device)
    estimates: list[Estimate] = []
    fitting: list[tuple[int, Estimate]] = []
    with fake_network(create) as network:
        able = _set_checkpointing(network, True)
        ways = [False, True] if able and activation_checkpointing is None else [bool(activation_checkpointing)]
        for way in ways:
            weighed = _estimate(network, channels, size, resolved, way, momentum, device.type, copied)
            weighed = replace(weighed, global_batch=global_batch)
            estimates.append(weighed)
            fits = [m for m in candidates if weighed.total(m) <= budget]
            fitting += [(m, weighed) for m in fits[-1:]]
            if fits and fits[-1] >= min(COMFORTABLE, candidates[-1]):
                break
    if not fitting and micro_batch is not None and activation_checkpointing is not None:
        fitting = [(micro_batch, estimates[0])]
    if not fitting:
        given = micro_batch is not None and candidates[0] > 1
        raise ValueError(_nothing_fits(estimates, candidates[0], budget, given, able))
    chosen, way_chosen = max(fitting, key=lambda pair: (pair[0], not pair[1].activation_checkpointing))
    return Choice(
        micro_batch=chosen,
        activation_checkpointing=way_chosen.activation_checkpointing,
        precision=resolved,
        estimated=way_chosen.total(chosen),
        budget=budget,
        candidates=candidates,
        estimates=tuple(estimates),
    )


def describe(choice: Choice) -> str:
    """The lines to print about a choice: what was chosen, what it takes of how much, and what others would take."""
    way = "with" if choice.activation_checkpointing else "without"
    chosen = next(e for e in choice.estimates if e.activation_checkpointing == choice.activation_checkpointing)
    fits = "" if choice.estimated <= choice.budget else ", which is more than there is"
    lines = [
        f"Memory: micro-batch {choice.micro_batch}, {choice.precision}, {way} activation checkpointing: estimated "
        f"{_size(choice.estimated)} of {_size(choice.budget)}{fits} "
        f"(weights, gradients, momentum {_size(chosen.state_bytes)}; "
        f"activations {_size(choice.estimated - chosen.state_bytes - chosen.copy_bytes)}"
        f"{f', copies for checkpoints {_size(chosen.copy_bytes)}' if chosen.copy_bytes else ''})"
    ]
    for e in choice.estimates:
        others = ", ".join(
            f"{m}: {_size(e.total(m))}{'' if e.total(m) <= choice.budget else ' (too much)'}" for m in choice.candidates
        )
        lines.append(f"  {'with' if e.activation_checkpointing else 'without'} checkpointing, by micro-batch: {others}")
    return "\n".join(lines)


def available(device: torch.device | str) -> int:
    """Bytes that training may take on `device`, less a margin.

    cuda: what the driver calls free, and what PyTorch has reserved and not in use; less ``DEVICE_MARGIN``. cpu: the
    smaller of MemAvailable (/proc/meminfo) and what this process' control groups leave; less ``HOST_MARGIN`` of it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + idle - DEVICE_MARGIN)
    rooms = [max(0, limit - used) for limit, used in _cgroups(Path("/"))]
    return int(min([_meminfo(Path("/proc/meminfo"), "MemAvailable"), *rooms]) * (1 - HOST_MARGIN))


def installed() -> int:
    """Bytes of memory that this host (or this process' control groups, where they allow less) has, in use or not.

    It does not change from minute to minute, so a choice that is made by it is the same every time.
    """
    return min([_meminfo(Path("/proc/meminfo"), "MemTotal"), *(limit for limit, _ in _cgroups(Path("/")))])


def _set_checkpointing(network: Any, way: bool) -> bool:
    """Switch activation checkpointing on or off; False when the network cannot do that."""
    if not hasattr(network, "set_grad_checkpointing"):
        return not way
    try:
        network.set_grad_checkpointing(way)
    except AssertionError:  # timm's way to say that a network has none
        return not way
    return True


def _estimate(
    network: nn.Module,
    channels: int,
    size: int,
    precision: Precision,
    way: bool,
    momentum: bool,
    device_type: str,
    copied: float = 0.0,
) -> Estimate:
    if not _set_checkpointing(network, way):
        raise ValueError(
            f"{type(network).__name__} has no activation checkpointing: leave activation_checkpointing at false."
        )
    trained = sum(size_of(p) for p in network.parameters() if p.requires_grad)
    kept = sum(size_of(t) for t in [*network.parameters(), *network.buffers()])
    # Not 1: batch norm refuses a single value a channel.
    low, high = 2, 3
    bf16 = precision == "bf16"
    first, mark = record(network, low, channels, size, bf16=bf16, device_type=device_type)
    second, _ = record(network, high, channels, size, bf16=bf16, device_type=device_type)
    sums = moments(first, second, low, high)
    return Estimate(
        precision=precision,
        activation_checkpointing=way,
        parameters=sum(p.numel() for p in network.parameters()),
        state_bytes=kept + trained * (2 if momentum else 1),
        fixed_bytes=sums[mark][0],
        activation_bytes_per_image=sums[mark][1],
        moments=fullest(sums),
        once_bytes=sum(4 * m.weight.numel() for m in network.modules() if isinstance(m, StdConv2d)),
        copy_bytes=math.ceil(copied * trained * (2 if momentum else 1)) if device_type == "cpu" else 0,
    )


def moments(first: list[int], second: list[int], low: int, high: int) -> list[tuple[int, int]]:
    """(fixed bytes, bytes an image) that live at each moment, from the records of two micro-batches."""
    assert len(first) == len(second), "the number of tensors depends on the micro-batch"
    fixed = each = 0
    sums = []
    for a, b in zip(first, second, strict=True):
        slope = (b - a) // (high - low)
        fixed, each = fixed + a - low * slope, each + slope
        sums.append((fixed, each))
    return sums


def fullest(sums: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Those (fixed, each) that no other one exceeds in both, by falling bytes an image."""
    kept: list[tuple[int, int]] = []
    for fixed, each in sorted(set(sums), key=lambda pair: (-pair[1], -pair[0])):
        if not kept or fixed > kept[-1][0]:
            kept.append((fixed, each))
    return tuple(kept)


def _candidates(global_batch: int, micro_batch: int | None, multiple_of: int, largest: int) -> tuple[int, ...]:
    if micro_batch is not None:
        if micro_batch < 1 or global_batch % micro_batch or micro_batch % multiple_of:
            also = f" and be a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise ValueError(f"micro_batch={micro_batch} must divide global_batch={global_batch}{also}.")
        return (micro_batch,)
    top = min(global_batch, largest)
    found = tuple(m for m in range(multiple_of, top + 1, multiple_of) if global_batch % m == 0)
    if not found:
        raise ValueError(
            f"global_batch={global_batch} has no divisor that is a multiple of {multiple_of} and at most {largest}: "
            f"set a global_batch that is a multiple of {multiple_of}."
        )
    return found


def _nothing_fits(estimates: list[Estimate], smallest: int, budget: int, given: bool, able: bool) -> str:
    least = min(estimates, key=lambda e: e.total(smallest))
    way = "with" if least.activation_checkpointing else "without"
    ideas: list[str] = []
    if least.state_bytes < budget:
        ideas += ["a smaller micro_batch"] * given
        ideas += ["activation_checkpointing=true"] * (able and not any(e.activation_checkpointing for e in estimates))
        ideas += ["smaller images"]
    ideas += ["a smaller network"]
    return (
        f"Training does not fit: micro_batch={smallest} {way} activation checkpointing in {least.precision} is "
        f"estimated to take {_size(least.total(smallest))} ({_size(least.state_bytes)} of it weights, gradients and "
        f"momentum) and there are {_size(budget)}; {', '.join(ideas)} or a device with more memory would help."
    )


def _meminfo(meminfo: Path, key: str) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{meminfo} has no line {key}: set the budget of memory yourself.")


_CGROUPS = {
    # controllers of the line in /proc/self/cgroup: where it is mounted, limit, usage, reclaimable in memory.stat
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _cgroups(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each memory limit over this process; inactive files in the page cache are not used."""
    found = []
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUPS:
            continue
        mount, limit, usage, idle = _CGROUPS[controllers]
        top = root / mount
        here = top / path.lstrip("/")
        # In a container the path may be the host's, and only the top is there.
        for folder in [here, *here.parents][: len(here.relative_to(top).parts) + 1]:
            files = [folder / limit, folder / usage, folder / "memory.stat"]
            if all(f.is_file() for f in files) and files[0].read_text().strip() != "max":
                stat = dict(entry.split() for entry in files[2].read_text().splitlines())
                used = int(files[1].read_text()) - int(stat.get(idle, 0))
                found.append((int(files[0].read_text()), used))
    return found


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
