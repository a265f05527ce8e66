"""What really runs, against what was asked for: live objects, storages and numbers, never configuration read back.

Every known silent failure of the engines (docs/ENGINES.md) ends here in one sentence, before the second step and
before the first checkpoint. ``check_built`` looks at a freshly built engine, ``FirstStep`` measures the first step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from scaletransfer.engine.build import Engine
from scaletransfer.engine.pieces import shard_rows
from scaletransfer.optim import flat, local


class EngineMismatch(ValueError):
    """What runs is not what was asked for."""


def _must(ok: bool, sentence: str) -> None:
    if not ok:
        raise EngineMismatch(sentence)


_WRAPPERS = {
    "single": (),
    "ddp": ("DistributedDataParallel",),
    "fsdp2": ("FSDPModule",),
    "zero1": ("DeepSpeedEngine",),
    "zero2": ("DeepSpeedEngine",),
    "zero3": ("DeepSpeedEngine",),
}
_ZERO = {
    "zero1": "DeepSpeedZeroOptimizer",
    "zero2": "DeepSpeedZeroOptimizer",
    "zero3": "DeepSpeedZeroOptimizer_Stage3",
}


def wrapper_of(model: torch.nn.Module) -> str:
    """Which engine's wrapper a live model is: one of the names above, or the plain class's name."""
    known = {name for names in _WRAPPERS.values() for name in names}
    for cls in type(model).__mro__:
        if cls.__name__ in known:
            return cls.__name__
    return type(model).__name__


def check_built(engine: Engine, optimizer: type[torch.optim.Optimizer]) -> None:
    """Classes, ranks, masters, clipping and reduction of a freshly built engine. All ranks must call this.

    Args:
        optimizer: the class of base optimizer that the configuration asked for.

    Raises:
        EngineMismatch: with one sentence that says what runs instead.
    """
    name = engine.strategy.engine
    _check_ranks(engine)
    wrapper, wanted = wrapper_of(engine.model), _WRAPPERS[name]
    if wanted:
        _must(wrapper in wanted, f"{name} was asked for but the model runs as {wrapper}: the engine was ignored")
    else:
        _must(engine.model is engine.module, f"single was asked for but the model is wrapped as {wrapper}")
    if engine.strategy.deepspeed:
        _check_zero(engine)
    if name == "fsdp2":
        _check_fsdp2(engine)
    _must(
        type(engine.optimizer) is optimizer,
        f"the optimizer that steps is {type(engine.optimizer).__name__}, not {optimizer.__name__}: it was replaced",
    )
    stepped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    if name != "zero3":  # which lends its tensors to the optimizer only while it steps
        _must(
            {id(piece.holder) for piece in engine.pieces} == stepped,
            "the optimizer steps other tensors than those that hold the model's parameters",
        )
    for piece in engine.pieces:
        dtype = piece.holder.dtype
        _must(
            dtype == torch.float32,
            f"the master weights of {piece.name} are {dtype}, not float32: small updates would be rounded away",
        )


def _check_ranks(engine: Engine) -> None:
    asked = engine.strategy
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    _must(
        world == asked.world and rank == asked.rank,
        f"the launcher started process {asked.rank} of {asked.world} but the process group says {rank} of {world}: "
        "every process would train alone",
    )
    seen = (engine.accelerator.num_processes, engine.accelerator.process_index)
    _must(
        seen == (asked.world, asked.rank),
        f"the launcher started process {asked.rank} of {asked.world} but accelerate believes that this is process "
        f"{seen[1]} of {seen[0]}: every process would read all the data",
    )
    if world > 1:
        counted = torch.ones((), dtype=torch.int64, device=engine.device)
        dist.all_reduce(counted)
        _must(
            int(counted) == asked.world,
            f"a sum over ranks reached {int(counted)} processes, not {asked.world}",
        )
    wanted = "cpu" if asked.cpu else "cuda"
    found = {local(piece.holder).device.type for piece in engine.pieces}
    _must(found == {wanted}, f"parameters lie on {sorted(found)}, not on {wanted}")


def _check_zero(engine: Engine) -> None:
    name, zero = engine.strategy.engine, engine.zero
    _must(
        type(zero).__name__ == _ZERO[name],
        f"{name} was asked for but DeepSpeed runs {type(zero).__name__}, not {_ZERO[name]}",
    )
    if name != "zero3":
        _must(
            bool(zero.partition_gradients) == (name == "zero2"),
            f"{name} was asked for but gradients are {'split' if zero.partition_gradients else 'not split'} over ranks",
        )
    _must(zero.optimizer is engine.optimizer, "DeepSpeed steps another optimizer than the one it was given")
    _must(
        float(zero.clip_grad) == 0.0,
        f"DeepSpeed clips gradients to {zero.clip_grad}: the same configuration would train differently under other "
        "engines",
    )
    accumulation = int(engine.model.gradient_accumulation_steps())  # type: ignore[operator]
    _must(
        accumulation == engine.accumulation,
        f"DeepSpeed accumulates {accumulation} micro-batches, not {engine.accumulation}: its gradients would be off",
    )
    dtype = getattr(zero, "communication_data_type", torch.float32)
    _must(dtype == torch.float32, f"DeepSpeed reduces gradients in {dtype}, not float32")


def _check_fsdp2(engine: Engine) -> None:
    from torch.distributed.fsdp import FSDPModule

    for piece in engine.pieces:
        _must(
            isinstance(piece.holder, DTensor) and piece.holder.device_mesh.size() == engine.world,
            f"fsdp2 was asked for but {piece.name} is not sharded over {engine.world} ranks",
        )
    for module in engine.module.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                policy = group.mp_policy
                _must(
                    policy.reduce_dtype == torch.float32,
                    f"FSDP2 reduces gradients in {policy.reduce_dtype}, not float32",
                )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: what they really hold, however many views there are."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        storage = local(tensor).untyped_storage()
        if storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@dataclass
class Bytes:
    """Bytes of parameters, gradients and optimizer state on one rank."""

    parameters: int
    gradients: int
    state: int


def expected_bytes(engine: Engine, momentum: bool) -> Bytes:
    """What the strategy should hold on this rank, from shapes, ranks and precision alone.

    Counted are parameters with fp32 masters, the gradients that live between backward and step, and momentum: whole,
    or a rank's share with each engine's own rounding.
    """
    shapes, world, name = engine.shapes.values(), engine.world, engine.strategy.engine
    whole = sum(math.prod(shape) for shape in shapes)
    compute = 2 if engine.precision == "bf16" else 4
    if name in ("single", "ddp"):
        return Bytes(4 * whole, 4 * whole, 4 * whole * momentum)
    if name == "fsdp2":
        rows = ((shape[0], math.prod(shape[1:])) for shape in shapes)
        share = sum(size * (shard_rows(n, world, 0)[1]) for n, size in rows)  # every rank's storage is the first's size
        return Bytes(4 * share, 4 * share, 4 * share * momentum)
    if name in ("zero1", "zero2"):
        share = -(-whole // world)
        # Gradients are views: a parameter that is cut at the end of a partition is held whole on both sides of it.
        touched = sum(math.prod(piece.shape) for piece in engine.pieces if len(piece))
        return Bytes(compute * whole + 4 * share, 4 * touched, 4 * share * momentum)
    share = sum(-(-math.prod(shape) // world) for shape in shapes)
    kept = sum(p.ds_numel for p in engine.zero.persistent_parameters)
    return Bytes(
        compute * (share + kept) + (0 if _shares_masters(engine) else 4 * share),
        4 * share,
        4 * share * momentum,
    )


def _shares_masters(engine: Engine) -> bool:
    """Whether ZeRO-3's fp32 masters are the fp32 partitions themselves (releases differ)."""
    masters = {piece.holder.untyped_storage().data_ptr() for piece in engine.pieces}
    parts = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return all(part.untyped_storage().data_ptr() in masters for part in parts)


def measured_parameters(engine: Engine) -> int:
    """Bytes of the storages that hold parameters and masters."""
    tensors: list[Tensor] = [piece.holder for piece in engine.pieces]
    if engine.strategy.engine != "fsdp2":
        for p in engine.module.parameters():
            tensors.append(p.data)
            if hasattr(p, "ds_tensor"):
                tensors.append(p.ds_tensor)
    return storage_bytes(tensors)


def measured_gradients(engine: Engine) -> list[Tensor]:
    """The live gradients between the last backward and the optimizer step."""
    held = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.zero is not None:
        for grads in engine.zero.averaged_gradients.values():
            held += [g for g in grads or () if isinstance(g, Tensor)]
    return held


def within(measured: int, expected: int) -> bool:
    """5 % and 256 KiB for alignment, padding of flat partitions and persistent scalars."""
    return abs(measured - expected) <= 0.05 * expected + 256 * 1024


@dataclass
class FirstStep:
    """Measures the first step: bytes, and whether the optimizer gets the gradients that backward made.

    Use: ``after_backward()`` between the last backward and the step, ``after_step()`` behind it; the optimizer's
    pre-step hook in between sees what the base optimizer is given.
    """

    engine: Engine
    momentum: bool
    measured: Bytes = field(default_factory=lambda: Bytes(0, 0, 0))
    norm_made: float = 0.0
    _given: list[Tensor] = field(default_factory=list)
    _hook: Any = None

    def __post_init__(self) -> None:
        self._hook = self.engine.optimizer.register_step_pre_hook(self._see)

    def _see(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            self._given += [_square(p.grad) for p in group["params"] if p.grad is not None]

    def _norm(self, squares: list[Tensor]) -> float:
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        total = total.to(self.engine.device)
        if self.engine.strategy.engine not in ("single", "ddp"):
            self.engine.sum_over_ranks(total)
        return float(total.sqrt())

    def after_backward(self) -> None:
        grads = measured_gradients(self.engine)
        self.measured.gradients = storage_bytes(grads)
        self.norm_made = self._norm([_square(g) for g in grads])

    def after_step(self) -> None:
        """Raises EngineMismatch on gradients that were changed on the way, or on bytes that the strategy denies."""
        self._hook.remove()
        given = self._norm(self._given)
        _must(
            abs(given - self.norm_made) <= 1e-3 * max(self.norm_made, 1e-12),
            f"backward made gradients of norm {self.norm_made:.6g} but the optimizer was given {given:.6g}: they were "
            "clipped or scaled on the way",
        )
        self.measured.parameters = measured_parameters(self.engine)
        state = [v for s in self.engine.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        self.measured.state = storage_bytes(state)
        expected = expected_bytes(self.engine, self.momentum)
        for what in ("parameters", "gradients", "state"):
            found, wanted = getattr(self.measured, what), getattr(expected, what)
            _must(
                within(found, wanted),
                f"{self.engine.strategy.engine} on {self.engine.world} ranks should hold {wanted:,} bytes of {what} on "
                f"rank {self.engine.rank} but holds {found:,}: what runs is not {self.engine.strategy.engine}",
            )


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(flat(tensor), dtype=torch.float64).square()


def check_positions(positions: Tensor, step: int, global_batch: int) -> None:
    """The positions that all ranks read in ``step`` must be exactly that step's.

    Raises:
        EngineMismatch: some were read twice and others by nobody, as when every rank reads all the data.
    """
    expected = torch.arange(step * global_batch, (step + 1) * global_batch)
    found = positions.flatten().cpu().sort().values
    if found.shape == expected.shape and torch.equal(found, expected):
        return
    distinct = len(torch.unique(found))
    raise EngineMismatch(
        f"step {step}: the ranks read {distinct} different samples of the {global_batch} of this step: the data is not "
        "split over the ranks"
    )


def table(engine: Engine, first: FirstStep, rows: list[tuple[str, str]]) -> str:
    """The verification table that rank 0 prints after the first step."""
    expected = expected_bytes(engine, first.momentum)
    group = engine.optimizer.param_groups[0]
    clip = f"AGC {group['clipping']:g}, head exempt" if "clipping" in group else "none"
    lines = [
        ("engine", f"{engine.strategy.engine} ({wrapper_of(engine.model)})"),
        ("ranks", f"{engine.world}"),
        (
            "device",
            f"{engine.device.type} ({dist.get_backend() if dist.is_initialized() else 'one process'})",
        ),
        ("precision", f"{engine.precision}, fp32 masters"),
        ("optimizer", type(engine.optimizer).__name__),
        ("clipping", clip),
        *rows,
    ]
    text = "\n".join(f"  {name:<12} {value}" for name, value in lines)
    head = f"  {'bytes, rank 0':<14}{'measured':>16}{'expected':>16}"
    parts = [
        f"  {what:<14}{getattr(first.measured, what):>16,}{getattr(expected, what):>16,}"
        for what in ("parameters", "gradients", "state")
    ]
    return "\n".join([f"verified after the first step (process {os.getpid()})", text, head, *parts])
