"""Makes a model run under the engine that was asked for: created, filled by name, sharded, given its optimizer.

The order matters: under fsdp2 the model is born on ``meta`` and each rank fills its own rows; under ZeRO-3 it is born
partitioned; elsewhere it is born whole. Values come by name from ``values`` (initial values or a checkpoint), so every
engine starts equal and a checkpoint loads under any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from scaletransfer.engine import pieces as pieces_module
from scaletransfer.engine import verify
from scaletransfer.engine.pieces import Piece
from scaletransfer.engine.rehearsal import make_accelerator
from scaletransfer.engine.strategy import Strategy
from scaletransfer.optim import SGD_AGC

Values = Callable[[str], Tensor]
"""From a parameter's or buffer's name to its full CPU tensor."""


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
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (batch-norm statistics of timm models; BiT has none). Not sharded by any engine."""
        return _persistent_buffers(self.module)

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

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if dist.is_initialized() and self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if dist.is_initialized() and self.world > 1:
            dist.barrier()


def resolve_precision(precision: str, strategy: Strategy) -> str:
    """``auto`` is bf16 on CUDA and fp32 on CPU."""
    if precision == "auto":
        return "fp32" if strategy.cpu else "bf16"
    return precision


def deepspeed_settings(strategy: Strategy, precision: str, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed configuration that the engine owns.

    ``gradient_clipping`` must be there and 0.0: without it accelerate sets 1.0. Gradients are reduced and accumulated
    in fp32 whatever the precision.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * strategy.world,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
    }


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
        precision: "fp32" or "bf16"; micro_batch: per rank; accumulation: micro-batches a step.

    Raises:
        EngineMismatch: the processes or the wrapped network are not what was asked for.
    """
    accelerator = make_accelerator(strategy)
    verify.check_started(strategy, accelerator)
    source: Values
    with torch.device("meta"):
        skeleton = create()  # names and whole shapes, no memory: engines that shard at birth show neither
    source = values(skeleton)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if p.requires_grad}
    arguments = (strategy, accelerator, create, source, make_optimizer)
    if strategy.deepspeed:
        settings = deepspeed_settings(strategy, precision, micro_batch, accumulation)
        model, module, optimizer, zero = _deepspeed(*arguments, settings)
    elif strategy.engine == "fsdp2":
        model, module, optimizer, zero = _fsdp2(*arguments, precision)
    else:
        model, module, optimizer, zero = _replicated(*arguments)
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
        _fill_masters(engine, source)
    if isinstance(optimizer, SGD_AGC) and (zero is not None or strategy.engine == "fsdp2"):
        optimizer.set_layout(pieces_module.layout(engine.pieces), dist.group.WORLD)
    return engine


def find_pieces(engine: Engine) -> list[Piece]:
    """Where each parameter lives on this rank."""
    if engine.strategy.engine == "fsdp2":
        return pieces_module.fsdp2_pieces(engine.module)
    if engine.strategy.engine in ("zero1", "zero2"):
        return pieces_module.zero12_pieces(engine.module, engine.zero)
    if engine.strategy.engine == "zero3":
        return pieces_module.zero3_pieces(engine.module, engine.zero, engine.rank)
    return pieces_module.plain_pieces(engine.module)


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = set(module.state_dict()) if any(True for _ in module.buffers()) else set()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


@torch.no_grad()
def _fill_lasting(module: nn.Module, create: Callable[[], nn.Module]) -> None:
    """Gives buffers that no checkpoint holds (tables of positions in timm's networks) the values they are born with.

    ``meta`` knows none, and what ``to_empty`` finds in memory would train without a word.
    """
    persistent = set(module.state_dict())
    lasting = {name: buffer for name, buffer in module.named_buffers() if name not in persistent}
    if lasting:
        born = dict(create().named_buffers())
        for name, buffer in lasting.items():
            buffer.copy_(born[name])


@torch.no_grad()
def _fill(module: nn.Module, source: Values) -> None:
    """Fills parameters and persistent buffers in place; a DTensor takes this rank's rows without communication."""
    persistent = set(module.state_dict())
    tensors = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n in persistent)]
    for name, tensor in tensors:
        value = source(name)
        if isinstance(tensor, DTensor):
            whole = value.to(device=tensor.device, dtype=tensor.dtype)
            value = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


@torch.no_grad()
def _fill_masters(engine: Engine, source: Values) -> None:
    """DeepSpeed makes fp32 masters from the bf16 copies: give them back what rounding took."""
    for piece in engine.pieces:
        if len(piece):
            piece.value().copy_(source(piece.name).view(-1)[piece.start : piece.stop])


def _replicated(
    strategy: Strategy, accelerator: Accelerator, create: Any, source: Values, make_optimizer: Any
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    module = create()
    _fill(module, source)
    module.to(accelerator.device)
    model = module
    if strategy.engine == "ddp":
        model = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[accelerator.device.index] if accelerator.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
        )
    return model, module, make_optimizer(module), None


def _fsdp2(
    strategy: Strategy,
    accelerator: Accelerator,
    create: Any,
    source: Values,
    make_optimizer: Any,
    precision: str,
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with torch.device("meta"):
        module = create()
    plugin = accelerator.state.fsdp_plugin
    if plugin is None:
        raise ValueError("fsdp2 was asked for but accelerate made no FSDP plugin: start with launch/fsdp2.yaml")
    if precision == "bf16":
        # accelerate's own policy reduces gradients in bf16 together with the parameters
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    else:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    plugin.cpu_ram_efficient_loading = False  # it would need rank 0 to hold the whole model
    names = {type(m).__name__ for m in module.modules()}
    if "PreActBottleneck" not in names:
        plugin.auto_wrap_policy = None
    module = fsdp2_prepare_model(accelerator, module)
    module.to_empty(device=accelerator.device)
    _fill(module, source)
    _fill_lasting(module, create)
    return module, module, make_optimizer(module), None


def _deepspeed(
    strategy: Strategy,
    accelerator: Accelerator,
    create: Any,
    source: Values,
    make_optimizer: Any,
    settings: dict[str, Any],
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        raise ValueError("ZeRO was asked for but accelerate made no DeepSpeed plugin: start with launch/zero2.yaml")
    deepspeed.init_distributed(auto_mpi_discovery=False)  # takes over torch's group; zero.Init counts ranks by it
    plugin.deepspeed_config.update(settings)
    if strategy.engine == "zero3":
        config = {k: v for k, v in plugin.deepspeed_config.items() if v != "auto"}
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = create()
        for name, p in module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                if strategy.rank == 0:
                    p.copy_(source(name))
        with torch.no_grad():
            for name, buffer in _persistent_buffers(module).items():
                buffer.copy_(source(name))
    else:
        module = create()
        _fill(module, source)
    optimizer = make_optimizer(module)
    model, wrapped = accelerator.prepare(module, optimizer)
    return model, module, optimizer, getattr(wrapped, "optimizer", None)
