"""What really runs, against what was asked for: live objects, storages and numbers, never configuration read back.

Every known silent failure of the engines (docs/ENGINES.md) ends here in one sentence, before the second step and
before the first checkpoint. ``check_started`` looks at the processes, ``check_wrapped`` at what the engine made of the
network, ``check_built`` at the finished engine, ``FirstStep`` measures the first step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scaletransfer.engine.holdings import (
    ZERO1_BF16,
    Bytes,
    expected_bytes,
    made_gradients,
    measured_gradients,
    measured_parameters,
    storage_bytes,
    within,
)
from scaletransfer.engine.rounding import LIMIT, ROUNDING, amplification, standardised, worst
from scaletransfer.engine.strategy import Strategy
from scaletransfer.optim import SGD_AGC
from scaletransfer.units import local, square_norm

if TYPE_CHECKING:
    from scaletransfer.engine.build import Engine  # which calls the first two checks below


class EngineMismatch(ValueError):
    """What runs is not what was asked for."""


def _must(ok: bool, sentence: str) -> None:
    if not ok:
        raise EngineMismatch(sentence)


_WRAPPERS = {
    "single": (),
    "ddp": ("DistributedDataParallel",),
    "fsdp2": ("FSDPModule",),
    "hsdp": ("FSDPModule",),
    "zero1": ("DeepSpeedEngine",),
    "zero2": ("DeepSpeedEngine",),
    "zero3": ("DeepSpeedEngine",),
    "zero3_offload": ("DeepSpeedEngine",),
}
_ZERO = {
    "zero1": "DeepSpeedZeroOptimizer",
    "zero2": "DeepSpeedZeroOptimizer",
    "zero3": "DeepSpeedZeroOptimizer_Stage3",
    "zero3_offload": "DeepSpeedZeroOptimizer_Stage3",
}


def wrapper_of(model: torch.nn.Module) -> str:
    """Which engine's wrapper a live model is: one of the names above, or the plain class's name."""
    known = {name for names in _WRAPPERS.values() for name in names}
    for cls in type(model).__mro__:
        if cls.__name__ in known:
            return cls.__name__
    return type(model).__name__


def check_started(strategy: Strategy, accelerator: Any) -> None:
    """Ranks, process group and accelerate's idea of itself, before anything is wrapped. All ranks must call this.

    Raises:
        EngineMismatch: every process believes that it is alone, or accelerate ignored the engine.
    """
    seen = (accelerator.num_processes, accelerator.process_index)
    _must(
        seen == (strategy.world, strategy.rank),
        f"the launcher started process {strategy.rank} of {strategy.world} but accelerate believes that this is "
        f"process {seen[1]} of {seen[0]}: every process would read all the data",
    )
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    _must(
        (world, rank) == (strategy.world, strategy.rank),
        f"the launcher started process {strategy.rank} of {strategy.world} but the process group says {rank} of "
        f"{world}: every process would train alone",
    )
    wanted = "DEEPSPEED" if strategy.deepspeed else "FSDP" if strategy.fsdp else None
    found = str(accelerator.distributed_type.value)
    _must(
        wanted is None or found == wanted,
        f"{strategy.engine} was asked for but accelerate runs {found}, not {wanted}: the engine was ignored",
    )


def zero_class(name: str, precision: str) -> str:
    """The class of DeepSpeed's optimizer that must run: another one for ZeRO-1 in bf16 with fp32 accumulation."""
    return ZERO1_BF16 if (name, precision) == ("zero1", "bf16") else _ZERO[name]


def check_wrapped(strategy: Strategy, model: nn.Module, module: nn.Module, zero: Any, precision: str) -> None:
    """What the engine made of the network.

    Args:
        model: what is called; module: the bare network inside; zero: DeepSpeed's ZeRO optimizer or None;
        precision: "fp32" or "bf16".

    Raises:
        EngineMismatch: another wrapper runs.
    """
    name, wrapper, wanted = strategy.engine, wrapper_of(model), _WRAPPERS[strategy.engine]
    if wanted:
        _must(wrapper in wanted, f"{name} was asked for but the model runs as {wrapper}: the engine was ignored")
    else:
        _must(model is module, f"single was asked for but the model is wrapped as {wrapper}")
    if strategy.deepspeed:
        right, found = zero_class(name, precision), type(zero).__name__
        _must(found == right, f"{name} was asked for but DeepSpeed runs {found}, not {right}")


def check_built(engine: Engine, optimizer: type[torch.optim.Optimizer]) -> None:
    """Classes, ranks, masters, clipping and reduction of a freshly built engine. All ranks must call this.

    Args:
        optimizer: the class of base optimizer that the configuration asked for.

    Raises:
        EngineMismatch: with one sentence that says what runs instead.
    """
    check_started(engine.strategy, engine.accelerator)
    check_wrapped(engine.strategy, engine.model, engine.module, engine.zero, engine.precision)
    _check_devices(engine)
    if engine.strategy.deepspeed:
        _check_zero(engine)
    if engine.strategy.fsdp:
        _check_fsdp2(engine)
    _must(
        type(engine.optimizer) is optimizer,
        f"the optimizer that steps is {type(engine.optimizer).__name__}, not {optimizer.__name__}: it was replaced",
    )
    if isinstance(engine.optimizer, SGD_AGC):
        _must(
            engine.optimizer.group is engine.shards,
            "SGD_AGC adds up norms over other ranks than those that share a copy of the model",
        )
    stepped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    if engine.strategy.zero_stage != 3:  # which lends its tensors to the optimizer only while it steps
        _must(
            {id(piece.holder) for piece in engine.pieces} == stepped,
            "the optimizer steps other tensors than those that hold the model's parameters",
        )
    for piece in engine.pieces:
        dtype = piece.holder.dtype
        _must(
            dtype == engine.master_dtype,
            f"the master weights of {piece.name} are {dtype}, not float32: small updates would be rounded away",
        )
    _check_rounding(engine)


def _check_devices(engine: Engine) -> None:
    asked = engine.strategy
    if asked.world > 1:
        counted = engine.sum_over_ranks(torch.ones((), dtype=torch.int64, device=engine.device))
        _must(int(counted) == asked.world, f"a sum over ranks reached {int(counted)} processes, not {asked.world}")
    wanted = "cpu" if asked.cpu or asked.offload else "cuda"
    found = {local(piece.holder).device.type for piece in engine.pieces}
    if asked.zero_stage == 3:
        found |= {getattr(p, "ds_tensor", p).device.type for p in engine.module.parameters()}
    _must(found == {wanted}, f"parameters lie on {sorted(found)}, not on {wanted}")


def _check_zero(engine: Engine) -> None:
    name, zero = engine.strategy.engine, engine.zero
    wanted = zero_class(name, engine.precision)
    if wanted == _ZERO["zero2"]:
        _must(
            bool(zero.partition_gradients) == (name == "zero2"),
            f"{name} was asked for but gradients are {'split' if zero.partition_gradients else 'not split'} over ranks",
        )
    _must(
        zero.optimizer is engine.optimizer,
        f"DeepSpeed steps another optimizer than the {type(engine.optimizer).__name__} it was given: "
        f"{type(zero.optimizer).__name__}",
    )
    if engine.strategy.zero_stage == 3:
        kept, where = (zero.offload_param, zero.offload_optimizer), engine.strategy.offload
        _must(
            kept == (where, where),
            f"{name} was asked for but DeepSpeed {'does not keep' if where else 'keeps'} parameters and optimizer "
            "state in the host's memory",
        )
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
    dtype = (engine.model if wanted == ZERO1_BF16 else zero).communication_data_type
    _must(dtype == torch.float32, f"DeepSpeed reduces gradients in {dtype}, not float32")


def _check_fsdp2(engine: Engine) -> None:
    asked = engine.strategy
    shape = (asked.world,) if asked.engine == "fsdp2" else (asked.replicas, asked.shards)
    place = [asked.rank] if asked.engine == "fsdp2" else [asked.replica, asked.rank % asked.shards]
    for piece in engine.pieces:
        _must(
            isinstance(piece.holder, DTensor) and tuple(piece.holder.device_mesh.shape) == shape,
            f"{asked.engine} was asked for but {piece.name} is not sharded over {' x '.join(map(str, shape))} ranks",
        )
        found = piece.holder.device_mesh.get_coordinate()  # type: ignore[attr-defined]
        _must(
            list(found or ()) == place,
            f"rank {asked.rank} should be {place} in the mesh of {asked.engine} but is {found}: neighbours would not "
            "share a replica",
        )
    for policy in _policies(engine.module):
        _must(
            policy.reduce_dtype == engine.master_dtype,
            f"FSDP2 reduces gradients in {policy.reduce_dtype}, not float32",
        )


def _policies(module: nn.Module) -> list[Any]:
    """The live mixed-precision policy of each FSDP2 unit; none under other engines."""
    from torch.distributed.fsdp import FSDPModule

    units = [part._get_fsdp_state() for part in module.modules() if isinstance(part, FSDPModule)]
    return [unit._fsdp_param_group.mp_policy for unit in units if unit._fsdp_param_group is not None]


def _check_rounding(engine: Engine) -> None:
    """Where the network sees weights that are rounded to bf16 already, standardising must not blow the error up."""
    seen = {policy.param_dtype for policy in _policies(engine.module)} | {p.dtype for p in engine.module.parameters()}
    if torch.bfloat16 not in seen:
        return
    epsilons = standardised(engine.module)
    name, number, factor = worst(amplification(engine.pieces, epsilons, engine.sum_over_shards, engine.device))
    _must(
        factor <= LIMIT,
        f"{engine.strategy.engine} in bf16 rounds weights before they are standardised, and filter {number} of {name} "
        f"lies so far from zero ({factor:.3g} times its deviation) that up to {factor * ROUNDING:.0%} of its deviation "
        "would be rounding errors: use precision fp32, or single or ddp, which standardise in float32",
    )


@dataclass
class FirstStep:
    """Measures the first step: bytes, and whether the optimizer gets the gradients that backward made.

    Use: ``after_backward()`` between the last backward and the step, ``after_step()`` behind it; the optimizer's
    pre-step hook in between sees what the base optimizer is given.
    """

    engine: Engine
    momentum: int
    """Tensors that the optimizer keeps for each parameter."""
    measured: Bytes = field(default_factory=lambda: Bytes(0, 0, 0))
    norm_made: float = 0.0
    _given: list[Tensor] = field(default_factory=list)
    _reached: set[str] = field(default_factory=set)
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hooks.append(self.engine.optimizer.register_step_pre_hook(self._see))
        if self.engine.strategy.deepspeed:
            for name, p in self.engine.module.named_parameters():
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._reach, name)))

    def _reach(self, name: str, _: Tensor) -> None:
        self._reached.add(name)

    def _see(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            self._given += [square_norm(p.grad) for p in group["params"] if p.grad is not None]

    def _norm(self, squares: list[Tensor]) -> float:
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        return float(self.engine.sum_over_shards(total.to(self.engine.device)).sqrt())

    def after_backward(self) -> None:
        _must(
            not self._given,
            "the optimizer stepped inside backward, before its turn: accelerate's backward makes it under DeepSpeed",
        )
        self.measured.gradients = measured_gradients(self.engine)
        self.norm_made = self._norm([square_norm(g) for g in made_gradients(self.engine)])

    def discard(self) -> None:
        """Measure nothing: the step was left out."""
        for hook in self._hooks:
            hook.remove()

    def after_step(self) -> None:
        """Raises EngineMismatch on gradients that were changed on the way, or on bytes that the strategy denies."""
        self.discard()
        self._check_reached()
        given = self._norm(self._given)
        _must(
            abs(given - self.norm_made) <= 1e-3 * max(self.norm_made, 1e-12),
            f"backward made gradients of norm {self.norm_made:.6g} but the optimizer was given {given:.6g}: they were "
            "clipped or scaled on the way",
        )
        self.measured.parameters = measured_parameters(self.engine)
        state = [
            v for s in self.engine.optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim()
        ]
        self.measured.state = storage_bytes(state)
        wanted_device = {local(piece.holder).device for piece in self.engine.pieces}
        _must(
            {local(tensor).device for tensor in state} <= wanted_device,
            "the optimizer's state does not lie where the master weights do",
        )
        expected = expected_bytes(self.engine, self.momentum)
        for what in ("parameters", "gradients", "state"):
            found, wanted = getattr(self.measured, what), getattr(expected, what)
            _must(
                within(found, wanted),
                f"{self.engine.strategy.engine} on {self.engine.world} ranks should hold {wanted:,} bytes of {what} on "
                f"rank {self.engine.rank} but holds {found:,}: what runs is not {self.engine.strategy.engine}",
            )

    def _check_reached(self) -> None:
        """ZeRO's flat partitions give a parameter without gradient zeros: it decays, elsewhere it stays as it is."""
        decays = any(group["weight_decay"] for group in self.engine.optimizer.param_groups)
        missed = sorted(self.engine.shapes.keys() - self._reached)
        _must(
            not (self.engine.strategy.deepspeed and decays and missed),
            f"{len(missed)} parameters got no gradient, first {missed[:1]}: {self.engine.strategy.engine} would decay "
            "them where other engines leave them alone; set optimizer.weight_decay to 0 or use another engine",
        )


def check_positions(positions: Tensor, step: int, global_batch: int) -> None:
    """The positions that all ranks read in ``step`` must be exactly that step's.

    Raises:
        EngineMismatch: some were read twice and others by nobody, as when every rank reads all the data.
    """
    expected = torch.arange(step * global_batch, (step + 1) * global_batch)
    found = positions.flatten().cpu().sort().values
    if found.shape == expected.shape and torch.equal(found, expected):
        return
    distinct = int(torch.isin(expected, found).sum())
    raise EngineMismatch(
        f"step {step}: the ranks read {distinct} different samples of the {global_batch} of this step: the data is not "
        "split over the ranks"
    )


def table(engine: Engine, first: FirstStep, rows: list[tuple[str, str]]) -> str:
    """The verification table that rank 0 prints after the first step."""
    expected = expected_bytes(engine, first.momentum)
    clips = [group["clipping"] for group in engine.optimizer.param_groups if group.get("clipping") is not None]
    clip = f"AGC {clips[0]:g}, head exempt" if clips else "none"
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
