"""One optimizer step over a global batch, the same numbers whatever the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaletransfer.engine.build import Engine
from scaletransfer.engine.zero_memory import forget_gradients
from scaletransfer.losses import Loss
from scaletransfer.optim import SGD_AGC
from scaletransfer.units import flat

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """0-d tensors on the device, still unread: reading one waits for the device."""

    loss: Tensor
    """This rank's share of the global mean loss: the sum over ranks is the loss of the global batch."""
    square_norm: Tensor
    """Squared norm of the whole gradient before clipping."""
    clipped: Tensor
    """Share of units that were clipped; NaN where nothing clips."""


def global_count(engine: Engine, loss: Loss, batches: Sequence[Batch]) -> Tensor:
    """float32 scalar > 0: the known terms of the loss (or the sum of their weights) over all ranks and micro-batches,
    from the targets alone; 1 where nothing is known."""
    count = torch.stack([loss.count(batch["target"]) for batch in batches]).sum().to(engine.device)
    count = engine.sum_over_ranks(count).to(torch.float32)
    return torch.where(count > 0, count, 1.0)


def train_step(
    engine: Engine,
    loss: Loss,
    normalize: Callable[[Tensor], Tensor],
    batches: Sequence[Batch],
    lr: float,
    before_step: Callable[[], None] | None = None,
) -> StepResult:
    """Forward, backward and update over ``batches`` (this rank's micro-batches of one step). All ranks call this.

    The loss is the sum over known labels divided by their number in the *global* batch, which is known before the
    first backward. Every engine averages gradients over ranks, DeepSpeed also divides by the number of micro-batches:
    both are undone here, and only here.
    """
    assert len(batches) == engine.accumulation
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    count = global_count(engine, loss, batches)
    undo = engine.world * (engine.accumulation if engine.strategy.deepspeed else 1)
    total = torch.zeros((), dtype=engine.master_dtype, device=engine.device)
    if not engine.strategy.deepspeed:
        engine.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        images = normalize(batch["image"].to(engine.device, non_blocking=True))
        target = batch["target"].to(engine.device, non_blocking=True)
        with engine.no_sync(last):
            value = loss(engine.forward(images), target)[0] / count
            total += value.detach()
            _backward(engine, value * undo)
        if engine.strategy.deepspeed and not last:
            engine.model.step()  # type: ignore[operator]  # counts the micro-batch; updates at the last one only
    if before_step is not None:
        before_step()
    norm = None if isinstance(engine.optimizer, SGD_AGC) else _watch_norm(engine)
    if engine.strategy.deepspeed:
        engine.model.step()  # type: ignore[operator]
        if engine.strategy.engine == "zero3":
            forget_gradients(engine.zero)
    else:
        engine.optimizer.step()
    return _result(engine, total, norm)


def no_step(engine: Engine) -> StepResult:
    """What a global batch without any known label does: nothing; not even weight decay and momentum move weights."""
    nothing = torch.zeros((), device=engine.device)
    return StepResult(nothing, nothing.clone(), torch.full((), float("nan"), device=engine.device))


def _backward(engine: Engine, loss: Tensor) -> None:
    if engine.strategy.deepspeed:
        engine.model.backward(loss)  # type: ignore[operator]
    else:
        loss.backward()


def _watch_norm(engine: Engine) -> Callable[[], Tensor]:
    """Sums the squares of what the base optimizer is given; the returned function removes the hook and adds ranks."""
    squares: list[Tensor] = []

    def see(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            squares.extend(
                torch.linalg.vector_norm(flat(p.grad)).square() for p in group["params"] if p.grad is not None
            )

    hook = engine.optimizer.register_step_pre_hook(see)

    def total() -> Tensor:
        hook.remove()
        value = torch.stack(squares).sum() if squares else torch.zeros((), device=engine.device)
        return engine.sum_over_shards(value.to(engine.device))

    return total


def _result(engine: Engine, total: Tensor, norm: Callable[[], Tensor] | None) -> StepResult:
    nothing = torch.full((), float("nan"), device=engine.device)
    if norm is not None:
        return StepResult(total, norm(), nothing)
    assert isinstance(engine.optimizer, SGD_AGC)
    stats = engine.optimizer.pop_stats()
    if stats is None:
        return StepResult(total, nothing, nothing)
    return StepResult(total, stats.square_norm, stats.clipped / max(1, stats.units))
