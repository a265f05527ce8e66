"""Makes a model run under the engine that was asked for: created, filled by name, sharded, given its optimizer.

The order matters: under fsdp2 the model is born on ``meta`` and each rank fills its own rows; under ZeRO-3 it is born
partitioned; elsewhere it is born whole. Values come by name from ``values`` (initial values or a checkpoint), so every
engine starts equal and a checkpoint loads under any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from scaletransfer.engine import pieces as pieces_module
from scaletransfer.engine import verify
from scaletransfer.engine.average import WeightAverage
from scaletransfer.engine.build_fsdp2 import build_fsdp2
from scaletransfer.engine.build_zero import build_zero, deepspeed_settings, fill_masters
from scaletransfer.engine.filling import Values, fill, persistent_buffers
from scaletransfer.engine.heap import HEAVY, bound_heap
from scaletransfer.engine.pieces import Piece
from scaletransfer.engine.rehearsal import make_accelerator
from scaletransfer.engine.strategy import Strategy
from scaletransfer.models.convolution import OnceAStep
from scaletransfer.optim import SGD_AGC


@dataclass(kw_only=True)
class Engine:
    """A model under one engine. ``model`` is what is called, ``module`` the bare network inside."""

    strategy: Strategy
    accelerator: Accelerator
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    zero: Any
    precision: str
    micro_batch: int
    accumulation: int
    shapes: dict[str, tuple[int, ...]]
    """Whole shapes of the trainable parameters."""
    pieces: list[Piece] = field(default_factory=list)
    average: WeightAverage | None = None
    """A running mean of the weights, where one is kept."""
    once: OnceAStep | None = None
    """What standardises weights once a step, where it has been asked to."""
    shards: dist.ProcessGroup | None = None
    """The ranks over which one copy of the model is cut; None where every rank holds it whole."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def world(self) -> int:
        return self.strategy.world

    @property
    def rank(self) -> int:
        return self.strategy.rank

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else self.master_dtype

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (batch-norm statistics of timm models; BiT has none). Not sharded by any engine."""
        return persistent_buffers(self.module)

    def frozen(self) -> dict[str, Tensor]:
        """Parameters that are not trained, by name; only engines that hold them whole have any."""
        return {name: p.data for name, p in self.module.named_parameters() if not p.requires_grad}

    @property
    def whole(self) -> bool:
        """Whether every rank holds every tensor of the network, as it is."""
        return self.strategy.engine in ("single", "ddp")

    def average_buffers(self) -> None:
        """Mean over the ranks of what batch norm has seen, in place. All ranks call this.

        Each rank has seen other images: unaveraged, validation would mix several networks.
        """
        if self.world > 1:
            for buffer in self.buffers().values():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum_over_ranks(buffer.float()) / self.world)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, classes] of normalised float images [b, c, H, W], in the engine's precision."""
        if self.precision == "bf16" and self.strategy.engine in ("single", "ddp"):
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return self.model(images)
        return self.model(images.to(self.compute_dtype) if self.strategy.deepspeed else images)

    def no_sync(self, last: bool) -> AbstractContextManager[Any]:
        """DDP leaves gradients local until the last micro-batch; sharded engines reduce each, which is their point."""
        if self.strategy.engine == "ddp" and not last:
            return self.model.no_sync()  # type: ignore[operator, no-any-return]
        return nullcontext()

    @contextmanager
    def standardised_once(self, micro_batches: int) -> Iterator[OnceAStep | None]:
        """Around the micro-batches of a step: what standardises weights once for all of them; None where it does not.

        Engines that gather weights block by block have no place for more than one block. ZeRO-2 keeps a buffer of its
        whole share from each micro-batch in which some gradients come and others do not.
        """
        if micro_batches == 1 or not self.whole:
            yield None
            return
        if self.once is None:
            self.once = OnceAStep(self.module)
        with self.once.step():
            yield self.once

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if dist.is_initialized() and self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Adds up in place what the ranks found of their parts of the model, so that all know it of the whole."""
        if self.shards is not None:
            dist.all_reduce(tensor, group=self.shards)
        return tensor

    def barrier(self) -> None:
        if dist.is_initialized() and self.world > 1:
            dist.barrier()


def resolve_precision(precision: str, strategy: Strategy) -> str:
    """``auto`` is bf16 on CUDA and fp32 on CPU."""
    if precision == "auto":
        return "fp32" if strategy.cpu else "bf16"
    return precision


def build_engine(
    strategy: Strategy,
    create: Callable[[], nn.Module],
    values: Callable[[nn.Module], Values],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    precision: str,
    micro_batch: int,
    accumulation: int,
) -> Engine:
    """Build the engine; all ranks must call it.

    Args:
        strategy: what the launcher asked for.
        create: makes the network, with no assumption about the values.
        values: given the network (on any device, whole shapes), the function that gives each tensor's values by name.
        make_optimizer: given the (sharded) network, the base optimizer.
        precision: "fp32" or "bf16", or "fp64" to measure how far the others are off (DeepSpeed has none);
        micro_batch: per rank; accumulation: micro-batches a step.

    Raises:
        ValueError: DeepSpeed in fp64.
        EngineMismatch: the processes or the wrapped network are not what was asked for.
    """
    if precision == "fp64":
        if strategy.deepspeed:
            raise ValueError(f"precision is fp64, which {strategy.engine} does not offer: use fp32 or bf16")
        create = _in_float64(create)
    accelerator = make_accelerator(strategy)
    verify.check_started(strategy, accelerator)
    with torch.device("meta"):
        skeleton = create()  # names and whole shapes, no memory: engines that shard at birth show neither
    source = values(skeleton)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if p.requires_grad}
    share = 12 * sum(map(math.prod, shapes.values())) // strategy.shards
    if strategy.cpu and (strategy.fsdp or strategy.deepspeed) and share >= HEAVY:
        bound_heap()
    zero: Any = None
    if strategy.deepspeed:
        settings = deepspeed_settings(strategy, precision, micro_batch, accumulation)
        model, module, optimizer, zero = build_zero(strategy, accelerator, create, source, make_optimizer, settings)
    elif strategy.fsdp:
        model, module, optimizer = build_fsdp2(accelerator, create, source, make_optimizer, precision)
    else:
        model, module, optimizer = _replicated(strategy, accelerator, create, source, make_optimizer)
    verify.check_wrapped(strategy, model, module, zero, precision)
    engine = Engine(
        strategy=strategy,
        accelerator=accelerator,
        model=model,
        module=module,
        optimizer=optimizer,
        zero=zero,
        precision=precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        shapes=shapes,
    )
    engine.pieces = find_pieces(engine)
    pieces_module.check_cover(engine.pieces, module)
    if zero is not None and precision == "bf16":
        fill_masters(engine.pieces, source)
    engine.shards = find_shards(engine)
    if isinstance(optimizer, SGD_AGC) and engine.shards is not None:
        optimizer.set_layout(pieces_module.layout(engine.pieces), engine.shards, engine.device)
    return engine


def _in_float64(create: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: create().double()


def find_pieces(engine: Engine) -> list[Piece]:
    """Where each parameter lives on this rank."""
    if engine.strategy.fsdp:
        return pieces_module.fsdp2_pieces(engine.module)
    if engine.strategy.engine in ("zero1", "zero2"):
        return pieces_module.zero12_pieces(engine.module, engine.zero)
    if engine.strategy.zero_stage == 3:
        return pieces_module.zero3_pieces(engine.module, engine.zero, engine.rank)
    return pieces_module.plain_pieces(engine.module)


def find_shards(engine: Engine) -> dist.ProcessGroup | None:
    """The ranks over which the model is cut: all, or under hsdp those of this rank's replica."""
    if engine.strategy.engine == "hsdp":
        mesh = engine.pieces[0].holder.device_mesh  # type: ignore[attr-defined]  # a DTensor: find_pieces asserts it
        return mesh.get_group(mesh.ndim - 1)  # type: ignore[no-any-return]
    return dist.group.WORLD if engine.strategy.fsdp or engine.strategy.deepspeed else None


def _replicated(
    strategy: Strategy, accelerator: Accelerator, create: Any, source: Values, make_optimizer: Any
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    module = create()
    fill(module, source)
    module.to(accelerator.device)
    model = module
    if strategy.engine == "ddp":
        model = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[accelerator.device.index] if accelerator.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )
    return model, module, make_optimizer(module)
