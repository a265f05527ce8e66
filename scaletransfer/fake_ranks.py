"""Many ranks in one process, without any of the others: torch's fake process group, on which collectives move nothing.

What a network becomes on rank 700 of 1,024 is found by sharding it there, not by a formula: by FSDP2 on ``meta``, by
DeepSpeed's ZeRO-3 parameter by parameter. The planner measures FSDP2's gathered blocks so, and ``pretrain --dry-run``
builds its engine on it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from scaletransfer.models import Classifier, PreActBottleneck
from scaletransfer.shares import Shape
from scaletransfer.units import local


@contextmanager
def fake_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """This process as one of ``world`` ranks that are not there, until the block ends.

    Raises:
        ValueError: there is a process group already, whose ranks are real.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise ValueError(f"{dist.get_world_size()} real ranks run here: fake ranks need a process of their own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_mesh(world: int, shards: int) -> DeviceMesh:
    """A mesh of all ranks for FSDP2: one dimension, or (replicas, shards) where fewer than all share the state."""
    if shards == world:
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(network: nn.Module, mesh: DeviceMesh, precision: str) -> nn.Module:
    """FSDP2 as the engine applies it: each residual unit and each convolution a block, the rest the root's.

    Gradients are reduced in fp32. The root keeps its gathered parameters from forward to backward, which is FSDP2's
    default for it.
    """
    bf16 = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """What FSDP2 wraps beside the root, inner ones first (``engine.build_fsdp2``); of BiT only."""
    modules = list(network.modules())[:0:-1]
    if not any(isinstance(module, PreActBottleneck) for module in modules):
        return []
    return [module for module in modules if isinstance(module, (PreActBottleneck, Classifier))]


def local_shapes(
    create: Callable[[], nn.Module], world: int, rank: int, *, shards: int | None = None, precision: str = "fp32"
) -> dict[str, tuple[Shape, int]]:
    """What FSDP2 leaves on one of many ranks: by parameter the shape of its rows, and the bytes of their storage.

    Nothing is allocated. ``create`` makes the network; world, rank, shards: as for ``shares.held``.
    """
    with fake_ranks(world, rank):
        with torch.device("meta"):
            network = create()
        shard(network, fake_mesh(world, shards or world), precision)
        return {
            name: (tuple(local(p).shape), local(p).untyped_storage().nbytes()) for name, p in network.named_parameters()
        }


def zero3_numbers(create: Callable[[], nn.Module], world: int, rank: int) -> int | None:
    """Numbers that DeepSpeed leaves on one of many ranks under ZeRO-3: ``zero.Init`` itself cuts the network.

    Each parameter is whole in the memory of this host while it is cut. None where there is no DeepSpeed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return None
    here = {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": world}
    with mock.patch.dict(os.environ, here), redirect_stdout(sys.stderr), fake_ranks(world, rank):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        # it would compile an operator that shares memory with ranks of this machine, of which there are none
        with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
            deepspeed.init_distributed(auto_mpi_discovery=False)
        try:
            with deepspeed.zero.Init(config_dict_or_path={**batch, "zero_optimization": {"stage": 3}}):
                network = create()
            return sum(p.ds_tensor.numel() for p in network.parameters())  # type: ignore[attr-defined]
        finally:
            deepspeed.comm.comm.cdb = None  # its hold on the group that ends here
