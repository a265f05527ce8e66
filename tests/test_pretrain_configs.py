"""Every pre-training configuration runs two steps of a tiny network on shards of the official layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers_official import ALL_VIEWS, shards, write
from helpers_run import REPOSITORY

from scaletransfer import pretrain
from scaletransfer.config import load_config
from scaletransfer.index import load_index

CONFIGS = REPOSITORY / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("demo", "chexpert_tiny"))
MERGE = ("chexpert", "mimic", "nih", "padchest")
PAPER = {"mimic", "nih", "padchest", "imagenet21k"}
OPTIONS = (
    "max_steps=2",
    "global_batch=4",
    "micro_batch=4",
    "data.workers=0",
    "data.image_size=32",
    "validate.max_samples=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with `shards/` as the comments of the configurations say."""
    base = tmp_path_factory.mktemp("configs")
    for name in (*MERGE, "imagenet1k", "imagenet21k"):
        root = write(name, base / "datasets" / name)
        protocol = ["--protocol", "paper"] if name in PAPER else []
        shards(name, root, base / "shards" / name, *protocol)
        if name in MERGE:
            depth = ["--bit-depth", "8"] if name == "padchest" else []
            shards(name, root, base / "shards" / "merge" / name, *protocol, *depth, "--views", ALL_VIEWS)
    return base


def test_the_published_names_are_all_there():
    """PROTOCOL: 19 published configurations, and the one that is missing there."""
    sets = ["chexpert", "mimic", "nih", "chexpert_mimic", "chexpert_mimic_nih", "chexpert_mimic_nih_padchest"]
    sets += ["imagenet1k", "imagenet21k", "padchest"]
    expected = {f"{name}_bit{size}" for name in sets for size in ("50x1", "152x4")}
    expected |= {f"imagenet1k_bit{size}_optimized" for size in ("50x1", "152x4")}
    assert set(NAMES) == expected and len(expected) == 20


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    real = load_config(CONFIGS / f"{name}.yaml", [])
    assert real.model.name == ("BiT-S-R152x4" if "152x4" in name else "BiT-S-R50x1")
    assert real.model.activation_checkpointing == ("152x4" in name) and real.data.image_size == 224
    own = ["data.nb_classes=null"] if name.startswith("imagenet1k") else []
    if name.startswith("imagenet21k"):
        own = [f"data.nb_classes={len(load_index(folder / 'shards/imagenet21k').label_names)}"]
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(CONFIGS / "parts" / "tiny.yaml")]
    pretrain.main([*argv, *OPTIONS, *own, f"name={name}"])
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "grad_norm" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    validated = [row for row in rows if row.get("event") == "validation"]
    assert len(validated) == (0 if "imagenet21k" in name else 1)
    merged = [row for row in rows if row.get("event") == "epoch"]
    assert len(merged) == (1 if len(real.data.folders) > 1 else 0)
    if merged:
        assert sum(merged[0]["shares"]) == pytest.approx(1)


def test_the_numbers_are_the_published_ones():
    """PROTOCOL's table: base rate, warm-up, epochs, schedule, images a GPU, optimizer, classes."""
    table = {
        "chexpert_bit50x1": ("sgd_agc", 0.01, 15, 90, "step", 16, 13),
        "mimic_bit152x4": ("sgd_agc", 0.01, 15, 90, "step", 16, 13),
        "nih_bit50x1": ("sgd_agc", 0.01, 15, 90, "step", 16, 14),
        "padchest_bit152x4": ("sgd_agc", 0.01, 15, 90, "step", 16, 27),
        "chexpert_mimic_bit50x1": ("sgd_agc", 0.01, 15, 90, "step", 16, 13),
        "chexpert_mimic_nih_bit152x4": ("sgd_agc", 0.01, 15, 90, "step", 16, 7),
        "chexpert_mimic_nih_padchest_bit50x1": ("sgd_agc", 0.01, 15, 90, "step", 16, 7),
        "imagenet1k_bit50x1": ("sgd", 0.1, 5, 90, "step", 32, 1000),
        "imagenet1k_bit152x4": ("sgd_agc", 0.03, 15, 90, "step", 16, 1000),
        "imagenet1k_bit50x1_optimized": ("sgd_agc", 0.03, 15, 120, "cosine", 32, 1000),
        "imagenet1k_bit152x4_optimized": ("sgd_agc", 0.03, 15, 90, "cosine", 16, 1000),
        "imagenet21k_bit50x1": ("sgd_agc", 0.01, 2, 90, "step", 32, 21842),
        "imagenet21k_bit152x4": ("sgd_agc", 0.01, 2, 90, "step", 16, 21842),
    }
    for name, (optimizer, rate, warmup, epochs, kind, micro, classes) in table.items():
        cfg = load_config(CONFIGS / f"{name}.yaml", [])
        found = (cfg.optimizer.name, cfg.optimizer.base_lr, cfg.schedule.warmup_epochs, cfg.epochs, cfg.schedule.kind)
        assert found == (optimizer, rate, warmup, epochs, kind), name
        assert (cfg.micro_batch, cfg.global_batch) == (micro, 64 * micro), name
        assert (cfg.data.nb_classes or len(cfg.data.expect_labels)) == classes, name
        assert cfg.optimizer.momentum == 0.9 and cfg.optimizer.nesterov and cfg.optimizer.weight_decay == 1e-4
        assert (cfg.data.rand_augment == [2, 9]) == name.endswith("optimized")
        assert (cfg.data.transform == "natural") == name.startswith("imagenet")
        assert isinstance(cfg.data.mean, list) == name.startswith("imagenet")
