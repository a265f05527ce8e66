"""Memory of the loader: the same after epoch 5 as after epoch 2, and no larger for larger shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image

from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

PROGRAM = """
import json, os, sys
from scaletransfer.fused import build_fused
from scaletransfer.index import load_index
from scaletransfer.labels import LabelPolicy
from scaletransfer.loader import ShardDataset, Source, StepSampler
from scaletransfer.order import Order
from scaletransfer.streams import batches, make_loader

folder, workers, kind, prefetch = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
index = load_index(folder)
source = Source(index=index, split="train", policy=LabelPolicy(), names=index.label_names)
order = Order(shards=(source.shards,), weights=(None,), seed=0, global_batch=16)
data = ShardDataset([source], order, build_fused("natural", True, 64), 3, 0)


def resident():
    # of this process and of its workers, in pages; file pages count too
    own = [os.getpid()]
    children = open(f"/proc/{own[0]}/task/{own[0]}/children").read().split()
    return sum(int(open(f"/proc/{pid}/statm").read().split()[1]) for pid in [*own, *children])


found = []
sampler = StepSampler(0, 6 * order.samples_per_epoch, 0, 1, 16, 16)
for number, batch in enumerate(batches(make_loader(data, sampler, workers, kind, prefetch)), 1):
    if number % order.steps_per_epoch == 0:
        found.append(resident() * os.sysconf("SC_PAGE_SIZE"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """320 images of about 100 KB, in 32 shards and in one."""
    base = tmp_path_factory.mktemp("memory")
    for number in range(320):
        draw_image(
            base / "images" / "train" / "abcd"[number % 4] / f"{number}.jpg", number, width=320, height=300, mode="RGB"
        )
    found = {}
    for name, size in (("small", 10), ("large", 320)):
        build(plan_shards(open_source("image_folder", base / "images"), SALT, shard_size=size), base / name)
        found[name] = base / name
    return found


def resident(folder: Path, workers: int, kind: str, prefetch_mb: float = 8.0) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(workers), kind, str(prefetch_mb)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout)


@pytest.mark.parametrize(("workers", "kind"), [(2, "threads"), (2, "processes"), (0, "auto")])
def test_memory_does_not_grow_with_epochs(folders, workers, kind):
    epochs = resident(folders["small"], workers, kind)
    assert len(epochs) == 6 and abs(epochs[4] / epochs[1] - 1) < 0.05


def test_memory_is_not_that_of_a_shard(folders):
    """The one shard has 32 MB more than the small ones; nothing of that is resident."""
    large = (folders["large"] / "train-000000.tar").stat().st_size
    assert large > 20e6
    small, whole = (resident(folders[name], 2, "threads")[4] for name in ("small", "large"))
    assert whole - small < large / 4


def test_what_is_prepared_ahead_is_bounded_in_bytes(folders):
    """Batches of 16 x 3 x 64 x 64: a limit below one batch leaves one, a larger one fewer than it would fit."""
    from scaletransfer.fused import build_fused
    from scaletransfer.index import load_index
    from scaletransfer.labels import LabelPolicy
    from scaletransfer.loader import ShardDataset, Source, StepSampler
    from scaletransfer.order import Order
    from scaletransfer.streams import make_loader

    index = load_index(folders["small"])
    source = Source(index=index, split="train", policy=LabelPolicy(), names=index.label_names)
    order = Order(shards=(source.shards,), weights=(None,), seed=0, global_batch=16)
    fused = build_fused("natural", True, 64)
    assert fused is not None
    one = 16 * 3 * 64 * 64
    for limit, most in ((one / 2, 1), (3 * one, 3), (1e12, 8)):
        data = ShardDataset([source], order, fused, 3, 0)
        begun: list[int] = []
        begin = data.begin

        def count(positions, *, pinned=False, begun=begun, begin=begin):
            begun.append(1)
            return begin(positions, pinned=pinned)

        data.begin = count  # type: ignore[method-assign]
        taken = 0
        for _ in make_loader(data, StepSampler(0, 160, 0, 1, 16, 16), 2, "threads", limit / 1e6):
            taken += 1
            assert len(begun) - (taken - 1) <= most
        assert taken == 10
