"""Few-shot selections: nested, n a class, from the table alone, replayable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletransfer import keys
from scaletransfer.index import from_records, load_index
from scaletransfer.labels import LabelPolicy
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer.data import make_target
from scaletransfer.transfer.selection import Selection, load_selection, save_selection, select

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=CLASSES, per_class=9)


@pytest.fixture(scope="module")
def index(folder):
    return from_records(open_source("image_folder", folder), keys.PUBLIC_SALT)


def chosen(index, shot, seed, **options) -> Selection:
    targets = index.table("train")["label"].astype(np.int64)
    return select(index, "train", targets, CLASSES, shot=shot, seed=seed, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_n_of_each_class_and_nested(index, a, b, seed):
    small, large = chosen(index, min(a, b), seed), chosen(index, max(a, b), seed)
    assert set(small.keys) <= set(large.keys)
    for selection in (small, large):
        labels = index.table("train")["label"][selection.rows]
        assert np.bincount(labels, minlength=3).tolist() == [selection.shot] * 3
        assert list(selection.keys) == index.keys("train", selection.rows) == sorted(selection.keys)


def test_seeds_differ_and_every_image_can_be_chosen(index):
    drawn = [frozenset(chosen(index, 1, seed).keys) for seed in range(60)]
    assert len(set(drawn)) > 40 and len(frozenset.union(*drawn)) == 27
    assert chosen(index, 2, 5).sha256 == chosen(index, 2, 5).sha256 != chosen(index, 2, 6).sha256


def test_all_is_all(index):
    everything = chosen(index, None, 3)
    assert sorted(everything.rows.tolist()) == list(range(27)) and everything.shot is None


def test_shards_give_the_same_selection_as_the_folder(folder, tmp_path):
    source = open_source("image_folder", folder)
    build(plan_shards(source, SALT, shard_size=5), tmp_path / "shards")
    shards, files = load_index(tmp_path / "shards"), from_records(source, SALT)
    assert shards.table("train")["key"].tolist() != files.table("train")["key"].tolist()  # another order of rows
    for seed in range(5):
        assert chosen(shards, 4, seed).keys == chosen(files, 4, seed).keys


def test_a_class_with_too_few(index):
    with pytest.raises(ValueError, match=r"class 'cat' has 9 training samples, 10 were asked for.*--allow-fewer"):
        chosen(index, 10, 0)
    assert len(chosen(index, 10, 0, allow_fewer=True).rows) == 27
    with pytest.raises(ValueError, match="1 or more"):
        chosen(index, 0, 0)


def test_labels_count_positives_and_a_sample_once(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=80, seed=3, images=True)
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    target = make_target(load_index(tmp_path / "shards"), "chexpert", LabelPolicy())
    truth = target.targets("train")
    options = {"seed": 1, "allow_fewer": True}
    found = {n: select(target.index, "train", truth, target.names, shot=n, **options) for n in (1, 3)}
    assert set(found[1].keys) < set(found[3].keys) and len(set(found[3].keys)) == len(found[3].keys)
    there = (truth == 1).sum(0)
    assert ((truth[found[3].rows] == 1).sum(0) >= np.minimum(there, 3)).all()
    assert len(found[3].rows) <= 3 * len(target.names)


def test_a_saved_selection_is_replayed(index, tmp_path):
    before = chosen(index, 3, 11)
    save_selection(before, index, "train", tmp_path / "selection.json")
    after = load_selection(tmp_path / "selection.json", index, "train")
    assert after.keys == before.keys and after.sha256 == before.sha256 and (after.shot, after.seed) == (3, 11)
    assert after.rows.tolist() == before.rows.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(keys=c["keys"][1:]), "was changed"),
        (lambda c: c.update(format="x"), "not a selection"),
        (lambda c: c.update(format_version=9), "format_version 9"),
        (lambda c: c.update(salt_fingerprint="0" * 16), "another salt"),
        (lambda c: c.update(seed="zero"), "'shot' and 'seed'"),
        (lambda c: c.pop("keys"), "keys"),
    ],
)
def test_bad_selection_files(index, tmp_path, change, message):
    path = tmp_path / "selection.json"
    save_selection(chosen(index, 3, 11), index, "train", path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_selection(path, index, "train")


def test_a_selection_of_other_data_or_of_nothing(index, tmp_path):
    path = tmp_path / "selection.json"
    other = make_image_folder(tmp_path / "others", classes=("x", "y", "z"), seed=5)
    others = from_records(open_source("image_folder", other), keys.PUBLIC_SALT)
    save_selection(chosen(index, 3, 11), index, "train", path)
    with pytest.raises(ValueError, match="9 of its 9 samples are not in the split train"):
        load_selection(path, others, "train")
    with pytest.raises(ValueError, match="there is no selection file"):
        load_selection(tmp_path / "none.json", index, "train")
    path.write_text("not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_selection(path, index, "train")
