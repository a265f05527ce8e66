"""The published code's few-shot selection, replayed by what it calls: torch.randperm, a deque a class, RandomState."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import config, make_pretrained

from scaletransfer import keys
from scaletransfer.index import from_records
from scaletransfer.labels import LabelPolicy
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.data import make_target
from scaletransfer.transfer.plan import make_plan
from scaletransfer.transfer.selection import select_paper

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=CLASSES, per_class=9)


def published(files: list[str], shot: int, seed: int) -> set[str]:
    """The released loop, on the list that torchvision's ImageFolder makes: sorted classes, sorted files."""
    torch.manual_seed(seed)
    seen = {name: deque(maxlen=shot) for name in CLASSES}
    for place in torch.randperm(len(files)).tolist():
        seen[files[place].split("/")[-2]].append(files[place])
        if all(len(mine) == shot for mine in seen.values()):
            break
    return {file for mine in seen.values() for file in mine}


@pytest.mark.parametrize("shot", [1, 4, 9])
def test_the_last_seen_of_each_class(folder, shot):
    from torchvision.datasets import ImageFolder

    files = [os.path.relpath(path, folder) for path, _ in ImageFolder(str(folder / "train")).samples]
    index = from_records(open_source("image_folder", folder), keys.PUBLIC_SALT)
    classes = index.table("train")["label"].astype(np.int64)
    drawn = []
    for seed in range(8):
        found, note = select_paper(index, "train", classes, CLASSES, shot=shot, seed=seed)
        shards = index.splits["train"].shards
        names = {shards[number].file for number in index.table("train")["shard"][found.rows]}
        assert names == published(files, shot, seed)
        assert list(found.keys) == sorted(found.keys) == index.keys("train", found.rows)
        assert f"randperm({seed})" in note
        drawn.append(found.keys)
    assert len(set(drawn)) == (1 if shot == 9 else 8)


def test_label_tables_are_shuffled_class_by_class(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=60, seed=3, images=True)
    target = make_target(from_records(open_source("chexpert", root), SALT), "chexpert", LabelPolicy())
    truth = target.targets("train")
    found, note = select_paper(target.index, "train", truth, target.names, shot=3, seed=5)
    expected = set()
    for column in range(truth.shape[1]):
        rows = np.where(truth[:, column] == 1)[0]
        np.random.RandomState(5).shuffle(rows)
        expected |= set(rows[:3].tolist())
    assert set(found.rows.tolist()) == expected and "RandomState(5)" in note


def test_when_it_is_used_and_what_it_refuses(folder, tmp_path):
    pre = make_pretrained(tmp_path / "pre")
    common = (f"model.path={pre}", "examples_per_class=2", "model.activation_checkpointing=false")
    by_files = (f"data.images={folder}", *common)
    nested = make_plan(config(*by_files)).selection
    paper = make_plan(config(*by_files, "protocol=paper"))
    assert paper.selection.keys == make_plan(config(*by_files, "few_shot=paper")).selection.keys != nested.keys
    assert make_plan(config(*by_files, "protocol=paper", "few_shot=nested")).selection.keys == nested.keys
    assert any("selection as published" in line for line in paper.says)
    with pytest.raises(ValueError, match="the class 'cat' has 9 training samples, 99 were asked for"):
        make_plan(config(f"data.images={folder}", f"model.path={pre}", "examples_per_class=99", "few_shot=paper"))
    build(plan_shards(open_source("image_folder", folder), SALT, shard_size=5), tmp_path / "shards")
    by_shards = (f"data.shards={tmp_path / 'shards'}", *common)
    shards = make_plan(config(*by_shards, "protocol=paper"))
    assert any("shards have no published order" in line for line in shards.says)
    with pytest.raises(ValueError, match="is a folder of shards: set few_shot=nested"):
        make_plan(config(*by_shards, "few_shot=paper"))


def test_tuberculosis_is_shuffled_before_it_is_split(tmp_path):
    """As the released loader lists it: each folder's sorted names after RandomState(42), the first 85 %."""
    from PIL import Image

    folders = ("ChinaSet_AllFiles/CXR_png", "Montgomery/CXR_png")
    order: list[str] = []
    for number, place in enumerate(folders):
        (tmp_path / place).mkdir(parents=True)
        names = [f"{'CHNCXR' if number == 0 else 'MCUCXR'}_{i:04d}_{i % 2}.png" for i in range(20)]
        for name in names:
            Image.new("L", (8, 8)).save(tmp_path / place / name)
        np.random.RandomState(42).shuffle(names)
        order += [f"{place}/{name}" for name in names[:17]]
    index = from_records(open_source("tuberculosis", tmp_path), SALT)
    classes = index.table("train")["label"].astype(np.int64)
    found, _ = select_paper(index, "train", classes, ("normal", "tuberculosis"), shot=3, seed=1)
    torch.manual_seed(1)
    seen = [deque(maxlen=3), deque(maxlen=3)]
    for at in torch.randperm(len(order)).tolist():
        seen[int(order[at][-5])].append(order[at])
        if all(len(mine) == 3 for mine in seen):
            break
    shards = index.splits["train"].shards
    assert {shards[n].file for n in index.table("train")["shard"][found.rows]} == {
        file for mine in seen for file in mine
    }
