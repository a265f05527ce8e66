"""Held-out validation, shares of the training images and single-label images, decided from the sample table."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import config, make_pretrained

from scaletransfer.evaluate import evaluate
from scaletransfer.finetune import finetune
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.data import open_target
from scaletransfer.transfer.parts import portion


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """CheXpert shards with a training split alone, three images a patient at most."""
    base = tmp_path_factory.mktemp("chexpert")
    root = make_chexpert(base / "CheXpert-v1.0", rows=60, seed=3, images=True, laterals=False)
    (root / "valid.csv").unlink()
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=16), base / "shards")
    return base / "shards"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=("cat", "dog", "emu"), per_class=10)


def opened(*overrides: str):
    return open_target(config("model.path=none", *overrides))


def test_shards_with_a_training_split_alone_hold_some_out_by_patient(shards, tmp_path, capsys):
    target = opened(f"data.shards={shards}")
    train, valid = target.index.table("train"), target.index.table("valid")
    assert len(train) + len(valid) == 60 and 6 <= len(valid) <= 12 and target.valid_split == "valid"
    assert not set(train["patient"].tolist()) & set(valid["patient"].tolist())
    assert not set(train["key"].tolist()) & set(valid["key"].tolist())
    assert any("held out for validation, by patients" in note for note in target.notes)
    again = pickle.loads(pickle.dumps(target.index))  # noqa: S301
    assert again.table("valid").tobytes() == valid.tobytes() and again.digest == target.index.digest
    pre = make_pretrained(tmp_path / "pre", kind="xray")
    result = finetune(tmp_path / "run", config(f"data.shards={shards}", f"model.path={pre}", "data.workers=1"))
    assert result["valid_samples"] == len(valid) and result["train_samples"] == len(train)
    assert "held out for validation" in capsys.readouterr().out
    lines = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == set(target.index.keys("valid", slice(None)))


def test_a_ratio_takes_the_place_of_the_split_that_there_is(images, tmp_path):
    plain = opened(f"data.images={images}")
    assert len(plain.index.table("valid")) == 30
    found = opened(f"data.images={images}", "data.valid_ratio=0.3", "data.valid_seed=1", "seed=7")
    train, valid = found.index.table("train"), found.index.table("valid")
    assert (len(train), len(valid)) == (21, 9) and found.index.digest != plain.index.digest
    assert set(train["key"]) | set(valid["key"]) == set(plain.index.table("train")["key"])
    same = opened(f"data.images={images}", "data.valid_ratio=0.3", "data.valid_seed=1", "seed=8")
    assert same.index.table("valid")["key"].tolist() == valid["key"].tolist()  # the run's seed does not move it
    other = opened(f"data.images={images}", "data.valid_ratio=0.3", "data.valid_seed=2")
    assert other.index.table("valid")["key"].tolist() != valid["key"].tolist()
    pre, words = (
        make_pretrained(tmp_path / "pre"),
        ("data.valid_ratio=0.3", "data.valid_seed=1", "data.train_ratio=0.5"),
    )
    result = finetune(tmp_path / "run", config(f"data.images={images}", f"model.path={pre}", *words))
    assert result["valid_samples"] == 9 and 10 <= result["train_samples"] <= 12
    shown = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert len(shown) == 10 and all(line.split(",")[1].startswith("train/") for line in shown[1:])
    with pytest.raises(ValueError, match=r"data\.valid_ratio must be a share above 0 and below 1"):
        opened(f"data.images={images}", "data.valid_ratio=1.5")
    with pytest.raises(ValueError, match=r"data\.valid_split must be null with data\.valid_ratio"):
        opened(f"data.images={images}", "data.valid_ratio=0.5", "data.valid_split=test")


def test_a_share_of_the_training_images_has_every_class(images, shards):
    sizes = {}
    for ratio in (0.05, 0.2, 0.5):
        found = opened(f"data.images={images}", f"data.train_ratio={ratio}", "seed=1").index
        sizes[ratio] = set(found.table("train")["key"].tolist())
        assert set(found.table("train")["label"].tolist()) == {0, 1, 2}
        assert len(found.table("valid")) == 30
    assert sizes[0.2] < sizes[0.5] and len(sizes[0.5]) == 15
    assert opened(f"data.images={images}", "data.train_ratio=0.5", "seed=2").index.table("train")[
        "key"
    ].tolist() != list(sizes[0.5])
    both = opened(f"data.shards={shards}", "data.train_ratio=0.5").index
    assert not set(both.table("train")["patient"].tolist()) & set(both.table("valid")["patient"].tolist())


def test_a_portion_takes_whole_patients_and_leaves_every_class():
    table = np.zeros(40, dtype=[("key", "<u8"), ("patient", "<i4")])
    table["key"], table["patient"] = np.random.default_rng(0).integers(0, 2**63, 40), np.arange(40) // 4
    taken = portion(table, 0.35, 3)
    assert taken.sum() == 12 and all(taken[i : i + 4].all() or not taken[i : i + 4].any() for i in range(0, 40, 4))
    classes = np.zeros(40, dtype=np.int64)
    classes[4:8] = 1  # one patient has all of a class
    for seed in range(20):
        assert not portion(table, 0.9, seed, keep=classes)[4:8].any()
    again = portion(table[::-1], 0.35, 3)[::-1]
    assert np.array_equal(again, taken)


def test_images_of_one_label_become_classes(shards, tmp_path):
    whole = opened(f"data.shards={shards}")
    found = opened(f"data.shards={shards}", "data.multilabel_force_classification=true")
    assert found.task == "multiclass" and found.names == whole.names
    truth = np.concatenate([whole.targets(split) for split in ("train", "valid")])
    one = (truth == 1).sum(axis=1) == 1
    counts = np.bincount(np.concatenate([found.targets(s) for s in ("train", "valid")]), minlength=len(found.names))
    assert counts.tolist() == (truth[one] == 1).sum(axis=0).tolist() and counts.sum() == one.sum() > 0
    pre = make_pretrained(tmp_path / "pre", kind="xray")
    words = (f"data.shards={shards}", f"model.path={pre}", "data.multilabel_force_classification=true")
    result = finetune(tmp_path / "run", config(*words))
    assert result["task"] == "multiclass" and result["metric"] == "accuracy"
    with pytest.raises(ValueError, match=r"multiclass model but .* is multilabel .--multilabel-force-classification"):
        evaluate(tmp_path / "run", shards=shards, split="train", workers=0)
    again = evaluate(
        tmp_path / "run", shards=shards, split="train", workers=0, resamples=0, multilabel_force_classification=True
    )
    assert again["samples"] == one.sum()
    assert "confusion" in again and json.dumps(again)


def test_one_label_an_image_is_refused_where_there_are_classes(images):
    with pytest.raises(ValueError, match="one class an image already"):
        opened(f"data.images={images}", "data.multilabel_force_classification=true")
