"""data.max_bad_samples: samples that cannot be used are named, counted, bounded, and train nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, make_image_folder
from helpers_loader import POLICY
from helpers_run import launch, make_shards, run_single, write_config
from torch import nn

from scaletransfer.fused import build_fused
from scaletransfer.index import load_index
from scaletransfer.loader import ShardDataset, Source, StepSampler
from scaletransfer.losses import UNKNOWN_CLASS, make_loss
from scaletransfer.order import Order, rank_positions
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.streams import batches, make_loader
from scaletransfer.transfer.data import make_target
from scaletransfer.transforms import TransformOptions, build_transform


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("bad")
    root = make_image_folder(base / "images", per_class=8, splits=("train",))
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=6), base / "shards")
    return base / "shards"


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def spoil(folder: Path, rows: list[int]) -> list[str]:
    """Flip a byte of these images; their keys."""
    index = load_index(folder)
    for row in index.table("train")[rows]:
        with index.path("train", int(row["shard"])).open("r+b") as handle:
            handle.seek(int(row["offset"]) + 100)
            byte = handle.read(1)[0]
            handle.seek(-1, 1)
            handle.write(bytes([byte ^ 255]))
    return index.keys("train", rows)


def read(folder: Path, max_bad: int, workers: int, kind: str) -> list[dict]:
    index = load_index(folder)
    source = Source(index=index, split="train", policy=POLICY, names=index.label_names)
    order = Order(shards=(source.shards,), weights=(None,), seed=0, global_batch=8)
    fused = build_fused("natural", True, 16)
    assert fused is not None
    data = ShardDataset([source], order, fused, 3, 0, max_bad=max_bad)
    return list(batches(make_loader(data, StepSampler(0, 24, 0, 1, 8, 8), workers, kind)))


@pytest.mark.parametrize(("workers", "kind"), [(0, "auto"), (2, "threads"), (2, "processes")])
def test_bad_samples_are_black_unknown_and_named(folder, workers, kind):
    keys = spoil(folder, [3, 11])
    with pytest.raises(ValueError, match="is damaged"):
        read(folder, 0, workers, kind)
    found = read(folder, 2, workers, kind)
    sentences = [sentence for batch in found for sentence in batch["bad"]]
    assert len(sentences) == 2 and all(any(key in sentence for sentence in sentences) for key in keys)
    words = {int(key[-16:], 16) for key in keys}
    for batch in found:
        for row, key in enumerate(batch["key"].tolist()):
            bad = key & (2**64 - 1) in words
            assert (int(batch["target"][row]) == UNKNOWN_CLASS) == bad
            assert (int(batch["image"][row].max()) == 0) == bad


def test_a_missing_shard_counts_as_its_samples(folder):
    index = load_index(folder)
    (folder / "train-000002.tar").unlink()
    lost = index.splits["train"].shards[2].samples
    source = Source(index=index, split="train", policy=POLICY, names=index.label_names)
    order = Order(shards=(source.shards,), weights=(None,), seed=0, global_batch=8)
    fused = build_fused("natural", True, 16)
    assert fused is not None
    for max_bad in (0, 100):
        data = ShardDataset([source], order, fused, 3, 0, max_bad=max_bad)
        stream = batches(make_loader(data, StepSampler(0, 24, 0, 1, 8, 8), 2))
        if not max_bad:
            with pytest.raises(ValueError, match=r"train-000002\.tar at offset \d+ cannot be read \(No such file"):
                list(stream)
        else:
            assert sum(len(batch["bad"]) for batch in stream) == lost


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_nothing_but_bad_samples_is_black_in_torchvisions_pipeline_too(folder, workers):
    index = load_index(folder)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    source = Source(index=index, split="train", policy=POLICY, names=index.label_names)
    order = Order(shards=(source.shards,), weights=(None,), seed=0, global_batch=8)
    augmented = build_transform("natural", True, 16, options=TransformOptions(randaugment=True))
    data = ShardDataset([source], order, augmented, 3, 0, max_bad=100)
    for batch in batches(make_loader(data, StepSampler(0, 16, 0, 1, 8, 8), workers)):
        assert batch["image"].shape == (8, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert not batch["image"].any() and (batch["target"] == UNKNOWN_CLASS).all()
        assert len(batch["bad"]) == 8 and batch["bad_key"].tolist() == batch["key"].tolist()


def test_an_unknown_class_adds_nothing_to_the_loss():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, UNKNOWN_CLASS, 2, 1, UNKNOWN_CLASS])
    loss = make_loss("multiclass")
    total, count = loss(logits, target)
    known = [0, 2, 3]
    expected = nn.functional.cross_entropy(logits[known], target[known], reduction="sum")
    assert int(count) == int(loss.count(target)) == 3 and torch.allclose(total, expected)
    total.backward()
    assert logits.grad is not None and not logits.grad[[1, 4]].any() and logits.grad[known].all()


# ---- in a run


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("run"))


def run(config: Path, *overrides: str) -> list[dict]:
    trainer = run_single(config, "epochs=1", "validate.every_epochs=null", "log.every_steps=1", *overrides)
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_names_counts_and_bounds_them(chexpert, tmp_path, capsys):
    shards = Path(shutil.copytree(chexpert, tmp_path / "shards"))
    keys = spoil(shards, [0, 5, 9])
    config = write_config(tmp_path, shards)
    with pytest.raises(ValueError, match="is damaged"):
        run(config, "name=strict")
    with pytest.raises(ValueError, match=r"samples could not be used and data\.max_bad_samples is 1"):
        run(config, "name=bounded", "data.max_bad_samples=1")
    capsys.readouterr()
    # one that is met in each of two epochs is one
    rows = run(config, "name=lenient", "data.max_bad_samples=3", "epochs=2")
    said = [line for line in capsys.readouterr().err.splitlines() if "bad sample, left out" in line]
    assert all(sum(key in line for line in said) == 1 for key in keys)
    counted = [row["bad_samples"] for row in rows if row.get("event") == "log"]
    assert counted == sorted(counted) and counted[-1] == len(said) == 3
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def rewrite_table(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Another sample table for the split train, and an index.json that agrees with it."""
    path, content = folder / "samples-train.npy", json.loads((folder / "index.json").read_text())
    table = change(np.load(path))
    np.save(path, table)
    split = content["splits"]["train"]
    split["table_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    counts = np.bincount(table["shard"], minlength=len(split["shards"])).tolist()
    for shard, count in zip(split["shards"], counts, strict=True):
        shard["samples"] = count
    split["samples"] = len(table)
    (folder / "index.json").write_text(json.dumps(content))


def test_a_sample_that_is_there_twice(chexpert, tmp_path, capsys):
    """The rows of one shard once more, as if of another: refused, or left out as often as is allowed."""
    shards = Path(shutil.copytree(chexpert, tmp_path / "shards"))
    rows = np.flatnonzero(np.load(shards / "samples-train.npy")["shard"] == 0)[:2]

    key = load_index(shards).keys("train", rows[:1])[0]
    rewrite_table(shards, lambda table: np.sort(np.concatenate([table, table[rows]]), order=["shard", "offset"]))
    config = write_config(tmp_path, shards)
    sentence = rf"image {key} in \S+train-000000\.tar at offset \d+ is the same sample as image {key} in .*2 row\(s\)"
    with pytest.raises(ValueError, match=sentence):
        run(config, "name=strict")
    with pytest.raises(ValueError, match=sentence):
        run(config, "name=bounded", "data.max_bad_samples=1")
    with pytest.raises(ValueError, match=sentence):
        make_target(load_index(shards), "chexpert", POLICY)
    capsys.readouterr()
    rows_logged = run(config, "name=lenient", "data.max_bad_samples=2")
    said = [line for line in capsys.readouterr().err.splitlines() if "is another row's sample once more" in line]
    assert 1 <= len(said) <= 2 and rows_logged


@pytest.mark.engine
def test_ranks_stop_together_where_one_alone_has_too_many(chexpert, tmp_path):
    shards = Path(shutil.copytree(chexpert, tmp_path / "shards"))
    sizes = tuple(shard.samples for shard in load_index(shards).splits["train"].shards)
    order = Order(shards=(sizes,), weights=(None,), seed=3, global_batch=16)  # as the configuration has it
    spoil(shards, order.locate(rank_positions(2, 1, 2, 4, 16).ravel())[1].tolist()[:3])
    config = write_config(tmp_path, shards)
    options = ["validate.every_epochs=null", "data.max_bad_samples=2"]
    run = launch("ddp", ["--config", str(config), *options], tmp_path)
    try:
        assert run.wait(120) != 0
        assert run.error() == "error: 3 samples could not be used and data.max_bad_samples is 2; they are named above"
        assert "Connection closed" not in run.text() and not run.survivors()
    finally:
        run.end()
