"""All optimizer and parity cases of one engine in one launch, and what accelerate says of itself."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import PartialState
from workers import optimizing, parity
from workers.common import forget_engine, work

from scaletransfer.engine.rehearsal import make_accelerator
from scaletransfer.engine.strategy import Strategy, asked


def rehearsal(strategy: Strategy) -> dict[str, Any]:
    """What the rehearsal's accelerator believes to be, and what a real sum over ranks gives."""
    forget_engine()
    made = make_accelerator(strategy)
    deepspeed = getattr(made.state, "deepspeed_plugin", None) if strategy.deepspeed else None
    plugin = deepspeed or getattr(made.state, "fsdp_plugin", None)
    count = torch.ones(())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
    return {
        "type": made.distributed_type.value,
        "partial type": PartialState().distributed_type.value,
        "processes": made.num_processes,
        "index": made.process_index,
        "main": made.is_main_process,
        "device": made.device.type,
        "sum": int(count),
        "plugin": type(plugin).__name__ if plugin is not None else None,
        "offload": bool(deepspeed is not None and deepspeed.hf_ds_config.is_offload()),
        "mesh": list(mesh.shape) if (mesh := made.torch_device_mesh) is not None else None,
        "stage": deepspeed.zero_stage if deepspeed is not None else None,
    }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    strategy = asked()
    return {
        "rehearsal": rehearsal(strategy),
        "optimizing": {name: optimizing.train(strategy, case) for name, case in spec["optimizing"].items()},
        "parity": {name: parity.train(strategy, case, spec["references"]) for name, case in spec["parity"].items()},
    }


if __name__ == "__main__":
    work(run)
