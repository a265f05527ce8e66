"""One optimizer step over a global batch, the same numbers whatever the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaletransfer.engine.build import Engine
from scaletransfer.engine.holdings import made_gradients
from scaletransfer.engine.stopping import Late
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
    asked: Late
    """How many ranks were asked to stop before this step; the same on every rank."""
    skipped: bool = False
    """The loss or the gradient was not finite, and nothing was updated."""


def global_count(engine: Engine, loss: Loss, batches: Sequence[Batch], stop: bool = False) -> tuple[Tensor, Late]:
    """float32 scalar > 0: the known terms of the loss (or the sum of their weights) over all ranks and micro-batches,
    from the targets alone; 1 where nothing is known. And how many ranks call with ``stop``: in the same all-reduce."""
    count = torch.stack([loss.count(batch["target"]) for batch in batches]).sum().to(engine.device)
    both = engine.sum_over_ranks(torch.stack([count, torch.full_like(count, int(stop))]))
    asked = Late(both[1])
    count = both[0].to(torch.float32)
    return torch.where(count > 0, count, 1.0), asked


def train_step(
    engine: Engine,
    loss: Loss,
    normalize: Callable[[Tensor], Tensor],
    batches: Sequence[Batch],
    lr: float,
    before_step: Callable[[], None] | None = None,
    *,
    stop: bool = False,
    skip: bool = False,
) -> StepResult:
    """Forward, backward and update over ``batches`` (this rank's micro-batches of one step). All ranks call this.

    The loss is the sum over known labels divided by their number in the *global* batch, which is known before the
    first backward. Every engine averages gradients over ranks, DeepSpeed also divides by the number of micro-batches:
    both are undone here, and only here.

    Args:
        stop: this rank was asked to stop.
        skip: update nothing, neither weights nor momentum, where the loss or the gradient of the global batch is NaN or
            infinite. To know it before the update, the host waits for the device.
    """
    assert len(batches) == engine.accumulation
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # layer-wise decay
    count, asked = global_count(engine, loss, batches, stop)
    undo = engine.world * (engine.accumulation if engine.strategy.deepspeed else 1)
    total = torch.zeros((), dtype=engine.master_dtype, device=engine.device)
    if not engine.strategy.deepspeed:
        engine.optimizer.zero_grad(set_to_none=True)
    with engine.standardised_once(len(batches)) as once:
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            if last and once is not None:
                once.last()
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
    if skip and not _finite(engine, total):
        _drop(engine)
        nothing = torch.full((), float("nan"), device=engine.device)
        return StepResult(total, nothing, nothing.clone(), asked, skipped=True)
    norm = None if isinstance(engine.optimizer, SGD_AGC) else _watch_norm(engine)
    if engine.strategy.deepspeed:
        engine.model.step()  # type: ignore[operator]
        if engine.strategy.engine == "zero3":
            forget_gradients(engine.zero)
    else:
        engine.optimizer.step()
    return _result(engine, total, norm, asked)


def no_step(engine: Engine, stop: bool = False) -> StepResult:
    """What a global batch without any known label does: nothing; not even weight decay and momentum move weights."""
    nothing = torch.zeros((), device=engine.device)
    asked = Late(engine.sum_over_ranks(torch.full((), int(stop), device=engine.device)))
    return StepResult(nothing, nothing.clone(), torch.full((), float("nan"), device=engine.device), asked)


def _finite(engine: Engine, loss: Tensor) -> bool:
    """Whether the loss and the gradient of all ranks are finite; the same answer on all."""
    norms = [torch.linalg.vector_norm(flat(gradient)) for gradient in made_gradients(engine)]
    odd = ~torch.isfinite(torch.stack([loss, *(norm.to(loss.dtype) for norm in norms)])).all()
    return not bool(engine.sum_over_ranks(odd.to(torch.int64)))


def _drop(engine: Engine) -> None:
    """Forget the gradients. DeepSpeed has to step, to count on and to free its buffers: its optimizer finds none."""
    if not engine.strategy.deepspeed:
        engine.optimizer.zero_grad(set_to_none=True)
        return

    taken: list[tuple[Tensor, Tensor | None]] = []

    def take_away(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                taken.append((p, p.grad))
                p.grad = None

    hook = engine.optimizer.register_step_pre_hook(take_away)
    try:
        engine.model.step()  # type: ignore[operator]
    finally:
        hook.remove()
    if engine.strategy.offload:  # which copies the next step's gradients into the same tensors
        for p, gradient in taken:
            p.grad = gradient
    if isinstance(engine.optimizer, SGD_AGC):
        engine.optimizer.pop_stats()


def _backward(engine: Engine, loss: Tensor) -> None:
    if engine.strategy.deepspeed:
        engine.model.backward(loss)  # type: ignore[operator]
    else:
        loss.backward()


def _watch_norm(engine: Engine) -> Callable[[], Tensor]:
    """Sums the squares of what the base optimizer is given; the returned function removes the hook and adds ranks."""
    squares: list[Tensor] = []
    stepped = False

    def see(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal stepped
        stepped = True
        for group in optimizer.param_groups:
            squares.extend(
                torch.linalg.vector_norm(flat(p.grad)).square() for p in group["params"] if p.grad is not None
            )

    hook = engine.optimizer.register_step_pre_hook(see)

    def total() -> Tensor:
        hook.remove()
        value = torch.stack(squares).sum() if squares else torch.zeros((), device=engine.device)
        if not stepped:  # DeepSpeed leaves out a step whose gradient is not finite, and says nothing
            value = torch.full_like(value, float("nan"))
        return engine.sum_over_shards(value.to(engine.device))

    return total


def _result(engine: Engine, total: Tensor, norm: Callable[[], Tensor] | None, asked: Late) -> StepResult:
    nothing = torch.full((), float("nan"), device=engine.device)
    if norm is not None:
        return StepResult(total, norm(), nothing, asked)
    assert isinstance(engine.optimizer, SGD_AGC)
    stats = engine.optimizer.pop_stats()
    if stats is None:
        return StepResult(total, nothing, nothing, asked)
    return StepResult(total, stats.square_norm, stats.clipped / max(1, stats.units), asked)
