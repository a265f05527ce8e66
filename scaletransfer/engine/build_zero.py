"""A model under DeepSpeed: born whole under ZeRO-1 and 2, born partitioned under ZeRO-3, and the settings we own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from scaletransfer.engine.filling import Values, fill, persistent_buffers
from scaletransfer.engine.pieces import Piece
from scaletransfer.engine.strategy import Strategy
from scaletransfer.engine.zero_memory import (
    bound_norms,
    buffer_settings,
    forget_gradients,
    give_gradients_in_place,
    shared_masters,
)


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
        "zero_optimization": buffer_settings(strategy.zero_stage, cpu=strategy.cpu),
    }


def build_zero(
    strategy: Strategy,
    accelerator: Accelerator,
    create: Callable[[], nn.Module],
    source: Values,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    settings: dict[str, Any],
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    """What is called, the bare network, the base optimizer and DeepSpeed's own; arguments as for ``build_engine``.

    Raises:
        ValueError: accelerate has no DeepSpeed plugin.
    """
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        raise ValueError("ZeRO was asked for but accelerate made no DeepSpeed plugin: start with launch/zero2.yaml")
    deepspeed.init_distributed(auto_mpi_discovery=False)  # takes over torch's group; zero.Init counts ranks by it
    chosen = plugin.deepspeed_config.get("zero_optimization", {})  # stage and offload, from the launch file
    settings = {**settings, "zero_optimization": {**chosen, **settings["zero_optimization"]}}
    plugin.deepspeed_config.update(settings)
    if strategy.zero_stage == 3:
        config = {k: v for k, v in plugin.deepspeed_config.items() if v != "auto"}
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = create()
        for name, p in module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                if strategy.rank == 0:
                    p.copy_(source(name))
        with torch.no_grad():
            for name, buffer in persistent_buffers(module).items():
                buffer.copy_(source(name))
    else:
        module = create()
        fill(module, source)
    optimizer = make_optimizer(module)
    with shared_masters():
        model, wrapped = accelerator.prepare(module, optimizer)
    zero = getattr(wrapped, "optimizer", None)
    bound_norms(zero)
    if strategy.engine == "zero3":
        give_gradients_in_place(zero)
        forget_gradients(zero)
    return model, module, optimizer, zero


@torch.no_grad()
def fill_masters(pieces: Sequence[Piece], source: Values) -> None:
    """DeepSpeed makes fp32 masters from the bf16 copies: give them back what rounding took."""
    for piece in pieces:
        if len(piece):
            piece.value().copy_(source(piece.name).view(-1)[piece.start : piece.stop])
