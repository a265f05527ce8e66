"""Shares of many ranks: the planner's arithmetic against what FSDP2 really does on torch's fake process group."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scaletransfer import shares
from scaletransfer.fake_ranks import fake_ranks, local_shapes
from scaletransfer.models import create_model
from scaletransfer.plan_bytes import ZeroRules

CLASSES = 21_843
"""Of ImageNet-21k, as in the published head; no number of ranks below divides it."""


def large() -> nn.Module:
    return create_model("BiT-S-R152x4", CLASSES)


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in large().named_parameters()}


@pytest.mark.parametrize("world", [64, 256, 1024])
def test_r152x4_on_many_ranks_is_sharded_as_planned(world: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """FSDP2 itself on the first, the middle and the last rank: rows, and bytes of storages, empty shards included."""
    planned = shares.held("fsdp2", [list(shapes.values())], world)
    for rank in (0, world // 2, world - 1):
        found = local_shapes(large, world, rank)
        assert found.keys() == shapes.keys()
        for name, (local, _) in found.items():
            first, last = shares.shard_rows(shapes[name][0], world, rank)
            assert local == (last - first, *shapes[name][1:]), (name, rank)
        held = sum(size for _, size in found.values())
        assert held == planned.parameters == planned.gradients == planned.momentum
    if world == 1024:  # GroupNorms of 256 channels have rows for a quarter of the ranks
        assert any(math.prod(local) == 0 for local, _ in found.values())
        assert all(size > 0 for _, size in found.values())
    ideal = 4 * sum(map(math.prod, shapes.values())) / world
    assert ideal <= planned.parameters < 1.15 * ideal


@pytest.mark.parametrize(("world", "group"), [(64, 4), (1024, 8)])
def test_hybrid_shards_are_those_of_one_group(world: int, group: int, shapes: dict[str, tuple[int, ...]]) -> None:
    planned = shares.held("hsdp", [list(shapes.values())], world, shards=group)
    assert planned == shares.held("fsdp2", [list(shapes.values())], group)
    for rank in (0, world - 1):
        found = local_shapes(large, world, rank, shards=group)
        assert sum(size for _, size in found.values()) == planned.parameters


def test_fake_ranks_leave_nothing_behind() -> None:
    with fake_ranks(8, 3):
        assert (dist.get_world_size(), dist.get_rank()) == (8, 3)
        with pytest.raises(ValueError, match="8 real ranks run here"), fake_ranks(2):
            pass
    assert not dist.is_initialized()


def test_shares_by_hand() -> None:
    """Two parameters, 5 x 3 and 4, on 2 ranks: 19 numbers."""
    groups = [[(5, 3), (4,)]]
    held = {engine: shares.held(engine, groups, 2) for engine in ("single", "ddp", "fsdp2", "zero1", "zero2")}
    assert held["single"].total == held["ddp"].total == 3 * 4 * 19
    # rows 3 + 2, and 2 + 2: the first rank has 9 + 2
    assert held["fsdp2"] == shares.Held(parameters=44, masters=0, gradients=44, momentum=44)
    # a flat group of 19 is cut at 10: the first parameter lies on both ranks, the second on the last one
    assert held["zero2"] == held["zero1"] == shares.Held(parameters=76, masters=40, gradients=60, momentum=40)
    assert shares.held("zero2", groups, 2, rank=1).gradients == 76
    # ZeRO-3 cuts each parameter: 8 + 2; both are small enough to stay whole as well
    assert shares.held("zero3", groups, 2) == shares.Held(parameters=116, masters=0, gradients=40, momentum=40)
    away = shares.held("zero3_offload", groups, 2)
    assert away == shares.Held(parameters=116, masters=40, gradients=80, momentum=40)
    assert shares.held("zero3", groups, 2, threshold=4).parameters == 4 * (10 + 4)
    assert shares.held("ddp", groups, 2, momentum=False).momentum == 0
    bf16 = {engine: shares.held(engine, groups, 2, precision="bf16") for engine in ("ddp", "zero1", "zero2", "zero3")}
    assert bf16["ddp"] == held["ddp"]  # autocast: weights stay float32
    assert (bf16["zero1"].parameters, bf16["zero1"].gradients) == (38, 4 * (19 + 9))
    assert (bf16["zero2"].parameters, bf16["zero2"].gradients) == (38, 40)
    assert (bf16["zero3"].parameters, bf16["zero3"].masters) == (58, 40)


def test_deepspeeds_defaults_are_those_of_the_installed_release() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs, ours = config.DeepSpeedZeroConfig(), ZeroRules()
    assert ours.reduce_bucket_size == theirs.reduce_bucket_size
    assert ours.stage3_prefetch_bucket_size == theirs.prefetch_bucket_size
    assert ours.stage3_param_persistence_threshold == theirs.param_persistence_threshold == shares.PERSISTENT
    assert ours.stage3_max_reuse_distance == theirs.max_reuse_distance
    assert ours.sub_group_size == theirs.sub_group_size
