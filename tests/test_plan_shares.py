"""Shares of many ranks: the planner's arithmetic against what FSDP2 really does on torch's fake process group."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scaletransfer import shares
from scaletransfer.engine.checkpoint_copy import Part, Staging, owned
from scaletransfer.engine.pieces import plain_pieces
from scaletransfer.fake_ranks import fake_ranks, local_shapes, zero3_numbers
from scaletransfer.models import create_model
from scaletransfer.plan_zero import ZeroRules

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


def cut_by_zero3(name: str, classes: int, world: int, ranks: tuple[int, ...]) -> None:
    pytest.importorskip("deepspeed")

    def create() -> nn.Module:
        return create_model(name, classes)

    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in create().parameters()]
    for rank in ranks:
        assert zero3_numbers(create, world, rank) == shares.parameter_share(shapes, world)
    assert not dist.is_initialized()


@pytest.mark.parametrize("world", [64, 1024])
def test_zero3_cuts_a_network_on_many_ranks_as_planned(world: int) -> None:
    """DeepSpeed's own zero.Init; a GroupNorm of 32 channels gives most of 1,024 ranks nothing but padding."""
    cut_by_zero3("BiT-tiny", 13, world, (0, world // 2, world - 1))


@pytest.mark.slow
def test_zero3_cuts_r152x4_on_many_ranks_as_planned() -> None:
    cut_by_zero3("BiT-S-R152x4", CLASSES, 256, (255,))


@pytest.mark.parametrize("world", [2, 3, 64, 1024])
def test_flat_groups_are_aligned_as_deepspeed_does_it(world: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """ZeRO-1 and 2: what is appended to a group before it is cut into equal parts."""
    utils = pytest.importorskip("deepspeed.runtime.utils")
    tensors = [torch.empty(shape, device="meta") for shape in shapes.values()]
    aligned = utils.align_dense_tensors([t.flatten() for t in tensors], shares.ALIGNED * world)
    assert shares.flat_share(list(shapes.values()), world) == sum(t.numel() for t in aligned) // world


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


@pytest.mark.parametrize(("world", "momentum"), [(1, True), (3, True), (3, False)])
def test_copies_for_checkpoints_are_those_that_are_made(world: int, momentum: bool) -> None:
    """What ``checkpoint_copy`` takes from the host for the rank that writes most, under ddp."""
    network = create_model("BiT-tiny", 13)
    sizes = []
    for rank in range(world):
        strategy = SimpleNamespace(replicas=world, replica=rank)
        engine = SimpleNamespace(rank=rank, buffers=dict, frozen=dict, pieces=plain_pieces(network), strategy=strategy)
        parts = [
            Part(f"{kind}.{piece.name}", 0, len(piece), torch.zeros(len(piece)))
            for piece in owned(engine)  # type: ignore[arg-type]
            for kind in ("model", "momentum")[: 1 + momentum]
        ]
        staging = Staging(torch.device("cpu"))
        staging.copy(parts)
        sizes.append(staging.bytes)
    shapes = [tuple(p.shape) for p in network.parameters()]
    planned = shares.copied("ddp", [shapes], world, momentum=momentum)
    assert planned == pytest.approx(max(sizes), rel=1e-3)


def test_copies_by_hand() -> None:
    """19 numbers; of the larger of two row shards 11, of flat halves 10, of ZeRO-3's parts 8 + 2."""
    groups = [[(5, 3), (4,)]]
    copies = {
        engine: shares.copied(engine, groups, 2) for engine in ("ddp", "fsdp2", "zero1", "zero3", "zero3_offload")
    }
    assert copies == {"ddp": 80, "fsdp2": 88, "zero1": 80, "zero3": 80, "zero3_offload": 80}
    assert shares.copied("single", groups, 1) == 8 * 19
    # two copies of the model on 4 ranks share the writing
    assert shares.copied("hsdp", groups, 4, shards=2) == 8 * 6
    # blocks of pinned memory: a power of two for the last, smaller one
    assert shares.copied("single", groups, 1, pinned=True) == 4 * 64
    large = [[(shares.COPY_BLOCK + 5,)]]
    assert shares.copied("single", large, 1, pinned=True) == 4 * (2 * shares.COPY_BLOCK + 16)


def test_deepspeeds_defaults_are_those_of_the_installed_release() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    theirs, ours = config.DeepSpeedZeroConfig(), ZeroRules()
    assert ours.reduce_bucket_size == theirs.reduce_bucket_size
    assert ours.stage3_prefetch_bucket_size == theirs.prefetch_bucket_size
    assert ours.stage3_param_persistence_threshold == theirs.param_persistence_threshold == shares.PERSISTENT
    assert ours.stage3_max_reuse_distance == theirs.max_reuse_distance
    assert ours.sub_group_size == theirs.sub_group_size
