"""Engines on CPU ("rehearsal"): the one place that leans on private state of accelerate.

accelerate 1.15 silently runs plain DDP when FSDP or DeepSpeed is asked for on CPU, and with DeepSpeed without
``cpu=True`` every process believes that it is rank 0 of 1 (measured, see docs/ENGINES.md). What makes the real engines
run over gloo is the distributed type of ``PartialState``, set before the ``Accelerator`` is made. ``verify`` asserts
afterwards that what runs is what was asked for, and ``tests/test_engine_strategy.py`` fails when a release changes
this.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
from datetime import timedelta

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from scaletransfer.engine.strategy import Strategy


def join(strategy: Strategy, timeout: timedelta) -> None:
    """Meet the other ranks in a process group whose messages may take so long; before ``make_accelerator``."""
    if strategy.cpu and strategy.deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    PartialState(cpu=strategy.cpu, timeout=timeout)


def make_accelerator(strategy: Strategy) -> Accelerator:
    """An Accelerator for the strategy, on CUDA by accelerate's own rules, on CPU by rehearsal.

    Precision is the engine's own business (``build``), so accelerate's is always "no".

    Raises:
        ValueError: ZeRO is asked for and DeepSpeed, or what it needs, is not installed.
    """
    if strategy.deepspeed:
        _check_installed(strategy.engine)
    if strategy.cpu and strategy.deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported, else it probes for devices
    if not strategy.cpu:
        return Accelerator(mixed_precision="no")
    state = PartialState(cpu=True)
    if strategy.deepspeed:
        state._shared_state["_cpu"] = False
        state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        return Accelerator(mixed_precision="no")
    if strategy.fsdp:
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(cpu=True, mixed_precision="no")


def _check_installed(engine: str) -> None:
    """ValueError unless what accelerate asks for is there: of transformers it wants the version alone."""
    for package in ("deepspeed", "transformers"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"{engine} needs the package {package}: pip install 'scaletransfer[deepspeed]'") from error


def end_group() -> None:
    """The end of a command that may run on several processes: wait for the other ranks, then leave the group."""
    if dist.is_initialized():
        # Wrapped networks lie in reference cycles and hold the group: torn down with the interpreter its threads can
        # abort a process that has done its work (https://github.com/pytorch/pytorch/issues/90549).
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
