"""Every sample exactly once an epoch, whatever the ranks, workers and interruptions; each rank reads its share."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_image_folder
from helpers_loader import POLICY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaletransfer.fused import build_fused
from scaletransfer.index import load_index
from scaletransfer.loader import ShardDataset, Source, StepSampler
from scaletransfer.order import Order, rank_positions
from scaletransfer.shards import build, plan_shards, shards_main
from scaletransfer.sources import open_source
from scaletransfer.streams import batches, make_loader

KEYS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=7), min_size=1, max_size=3)
"""Shards of sources, uneven."""


class Interrupted:
    """An elastic run without images: which (source, row) each step has, on ranks that change at interruptions."""

    def __init__(self, order: Order) -> None:
        self.order = order

    def steps(self, first: int, last: int, world: int, micro: int) -> list[list[tuple[int, int]]]:
        found = []
        for step in range(first, last):
            shares = [
                rank_positions(step, rank, world, micro, self.order.global_batch).ravel() for rank in range(world)
            ]
            assert len({len(share) for share in shares}) == 1  # all ranks do the same
            positions = np.sort(np.concatenate(shares))
            source, row = self.order.locate(positions)
            found.append(list(zip(source.tolist(), row.tolist(), strict=True)))
        return found


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shards=KEYS, world=st.integers(1, 8), micro=st.integers(1, 3), seed=st.integers(0, 2**63 - 1))
def test_elastic_runs_see_every_sample_once(data, shards, world, micro, seed):
    """Interruptions 1 to 5, other ranks after each, over two epochs: the sequence of batches stays what it is."""
    batch = world * micro * data.draw(st.integers(1, 3), "accumulation")
    total = sum(map(sum, shards))
    if total < batch:
        return
    weighted = data.draw(st.booleans(), "weights")
    weights = tuple(data.draw(st.floats(0.1, 5)) for _ in shards) if weighted else (None,) * len(shards)

    def order() -> Order:
        return Order(shards=tuple(map(tuple, shards)), weights=weights, seed=seed, global_batch=batch)

    whole = order()
    per_epoch, stop = whole.steps_per_epoch, 2 * whole.steps_per_epoch
    expected = Interrupted(whole).steps(0, stop, 1, batch)
    cuts = sorted(data.draw(st.lists(st.integers(0, stop), min_size=1, max_size=5), "interruptions"))
    seen: list[list[tuple[int, int]]] = []
    for first, last in zip([0, *cuts], [*cuts, stop], strict=True):
        splits = [(w, m) for w in range(1, 9) for m in range(1, batch + 1) if batch % (w * m) == 0]
        ranks, images = data.draw(st.sampled_from(splits), "ranks")
        seen += Interrupted(order()).steps(first, last, ranks, images)
    assert seen == expected
    for epoch in range(2):
        drawn = [sample for step in expected[epoch * per_epoch : (epoch + 1) * per_epoch] for sample in step]
        assert len(drawn) == per_epoch * batch
        counts = Counter(drawn)
        if not weighted:
            assert set(counts.values()) == {1}
            assert set(drawn) <= {(s, row) for s, sizes in enumerate(shards) for row in range(sum(sizes))}
        for source, sizes in enumerate(shards) if weighted else ():
            times = np.bincount([row for s, row in drawn if s == source], minlength=sum(sizes))
            assert len(times) == sum(sizes) and times.max() - times.min() <= 1


@settings(max_examples=60, deadline=None)
@given(shards=KEYS, world=st.integers(1, 8), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_a_rank_touches_its_share_of_the_shards(shards, world, seed, epoch):
    """A stretch of the epoch: as many whole shards as fit into it, those at its ends, and what a window joins."""
    from scaletransfer import order as module

    batch = 4 * world
    if sum(map(sum, shards)) < batch:
        return
    old, module.WINDOW = module.WINDOW, 8
    try:
        order = Order(shards=tuple(map(tuple, shards)), weights=(None,) * len(shards), seed=seed, global_batch=batch)
        edges = [np.cumsum(sizes) for sizes in shards]
        touched = []
        for rank in range(world):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            where = np.concatenate([rank_positions(step, rank, world, 4, batch).ravel() for step in steps])
            source, row = order.locate(where)
            found = {(s, int(np.searchsorted(edges[s], r, side="right"))) for s, r in zip(source, row, strict=True)}
            touched.append(sum(shards[s][number] for s, number in found))
        largest = max(map(max, shards))
        assert max(touched) <= len(where) + 2 * largest + 2 * 8 + 2 * largest
    finally:
        module.WINDOW = old


# ---- with images


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same 44 training images in shards of 7, and resharded to shards of 13; and another set of classes."""
    base = tmp_path_factory.mktemp("once")
    root = make_image_folder(base / "images", per_class=11, classes=("a", "b", "c", "d"), splits=("train",))
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=7), base / "sevens")
    assert shards_main(["reshard", str(base / "sevens"), "--out", str(base / "thirteens"), "--shard-size", "13"]) == 0
    other = make_image_folder(base / "other", per_class=5, classes=("a", "b", "c", "d"), splits=("train",), seed=9)
    # another salt, as the names of the images are the same
    build(plan_shards(open_source("image_folder", other), SALT[::-1], shard_size=3), base / "threes")
    return {name: base / name for name in ("sevens", "thirteens", "threes")}


def open_dataset(folders: list[Path], batch: int, weights: tuple[float | None, ...]) -> ShardDataset:
    indexes = [load_index(folder) for folder in folders]
    names = indexes[0].label_names
    sources = [Source(index=index, split="train", policy=POLICY, names=names) for index in indexes]
    order = Order(shards=tuple(s.shards for s in sources), weights=weights, seed=3, global_batch=batch)
    fused = build_fused("natural", True, 8)
    assert fused is not None
    return ShardDataset(sources, order, fused, 3, 3)


def read(data: ShardDataset, first: int, last: int, world: int, micro: int, workers: int, kind: str):
    """Step -> {position: (key, pixels)}, over all ranks."""
    order = data.order
    assert order is not None
    batch = order.global_batch
    found: dict[int, dict[int, tuple[int, bytes]]] = {step: {} for step in range(first, last)}
    for rank in range(world):
        sampler = StepSampler(first * batch, last * batch, rank, world, micro, batch)
        seen = 0
        for made in batches(make_loader(data, sampler, workers, kind)):
            seen += 1
            for number, position in enumerate(made["position"].tolist()):
                step = found[position // batch]
                assert position not in step
                step[position] = (int(made["key"][number]), made["image"][number].numpy().tobytes())
        assert seen == len(sampler)
    return found


SETS = [(["sevens"], (None,)), (["thirteens"], (None,)), (["sevens", "threes"], (None, None))]
SETS += [(["thirteens", "threes"], (1.0, 2.5))]


@pytest.mark.parametrize(("names", "weights"), SETS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_batches_do_not_depend_on_ranks_workers_or_interruptions(folders, names, weights, data):
    """Keys and pixels of every position, in threads, in processes and in the process itself."""
    chosen = [folders[name] for name in names]
    batch = data.draw(st.sampled_from([6, 8, 12]), "global batch")
    whole = open_dataset(chosen, batch, weights)
    assert whole.order is not None
    stop = whole.order.steps_per_epoch + 1
    expected = read(whole, 0, stop, 1, batch, 0, "auto")
    cuts = sorted(data.draw(st.lists(st.integers(0, stop), min_size=1, max_size=3), "interruptions"))
    found: dict[int, dict[int, tuple[int, bytes]]] = {}
    for first, last in zip([0, *cuts], [*cuts, stop], strict=True):
        splits = [(w, m) for w in range(1, 9) for m in range(1, batch + 1) if batch % (w * m) == 0]
        world, micro = data.draw(st.sampled_from(splits), "ranks")
        workers = data.draw(st.integers(0, 4), "workers")
        # a process costs a tenth of a second, a thread nothing
        kind = data.draw(st.sampled_from(["threads"] * 5 + ["processes"]), "kind") if world == 1 else "auto"
        found |= read(open_dataset(chosen, batch, weights), first, last, world, micro, workers, kind)
    assert found == expected
    epoch = [key for step in range(stop - 1) for key, _ in expected[step].values()]
    if weights[0] is None:
        assert len(epoch) == len(set(epoch)) == (stop - 1) * batch


def test_resharding_keeps_the_samples(folders):
    before, after = (load_index(folders[name]) for name in ("sevens", "thirteens"))
    assert len(after.splits["train"].shards) < len(before.splits["train"].shards)
    assert sorted(after.table("train")["key"].tolist()) == sorted(before.table("train")["key"].tolist())


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_each_rank_reads_its_share_of_the_bytes(folders, monkeypatch, world):
    """What a rank asks the operating system for in an epoch, against 1.2 / world of the epoch's bytes."""
    asked = [0]
    original = os.preadv

    def preadv(handle: int, memory: list[memoryview], offset: int) -> int:
        asked[0] += sum(map(len, memory))
        return original(handle, memory, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    total = []
    for rank in range(world):
        data = open_dataset([folders["sevens"]], 12, (None,))
        assert data.order is not None
        asked[0] = 0
        sampler = StepSampler(0, data.order.samples_per_epoch, rank, world, 12 // world, 12)
        booked = sum(int(batch["bytes"]) for batch in batches(make_loader(data, sampler, 2)))
        assert 0 < asked[0] - booked <= 512 * len(sampler) * 12  # tar headers
        total.append(asked[0])
    assert max(total) <= 1.2 * sum(total) / world


def test_resuming_decodes_no_seen_sample(folders, monkeypatch):
    from scaletransfer import fused

    data = open_dataset([folders["sevens"]], 12, (None,))
    calls = []
    original = fused.decode_at
    monkeypatch.setattr(fused, "decode_at", lambda *a: (calls.append(1), original(*a))[1])
    for _ in batches(make_loader(data, StepSampler(24, 36, 0, 1, 12, 12), 3)):
        pass
    assert len(calls) == 12
