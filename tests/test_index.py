"""The index: what load_index refuses, what tables and keys give, and the index made in memory."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder

from scaletransfer import keys
from scaletransfer.index import INDEX_NAME, ShardIndex, from_records, load_index
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import Record, Source, open_source


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("index")
    root = make_chexpert(base / "CheXpert-v1.0", rows=30, valid=10)
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=8), base / "shards")
    return root, base / "shards"


@pytest.fixture
def folder(chexpert, tmp_path) -> Path:
    return Path(shutil.copytree(chexpert[1], tmp_path / "shards"))


def edit(folder: Path, change) -> None:
    content = json.loads((folder / INDEX_NAME).read_text())
    change(content)
    (folder / INDEX_NAME).write_text(json.dumps(content))


def replace_table(folder: Path, change) -> None:
    """Change the table and mend its hash, as somebody would who makes a folder by hand."""
    path = folder / "samples-train.npy"
    table = np.load(path)
    change(table)
    np.save(path, table)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda content: content["splits"]["train"].update(table_sha256=digest))


def test_contents(folder):
    index = load_index(folder)
    assert (index.source, index.task, index.label_kind) == ("chexpert", "multilabel", "states")
    assert index.image.channels == 1 and index.image.bit_depth == 8 and index.image.extension == "jpg"
    assert list(index.splits) == ["train", "valid"]
    assert index.views == ("AP", "PA")
    assert index.digest == hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
    assert index.salt_fingerprint == keys.fingerprint(SALT)
    table = index.table("train")
    assert isinstance(table, np.memmap) and not table.flags.writeable
    assert len(table) == index.splits["train"].samples == 26  # 30 rows, 4 of them lateral


def test_a_row_leads_to_its_image_bytes_labels_and_patient(chexpert):
    root, folder = chexpert
    index = load_index(folder)
    for split in index.splits:
        records = {
            keys.key("chexpert", r.source_id, SALT): r for r in open_source("chexpert", root) if r.split == split
        }
        table = index.table(split)
        assert set(index.keys(split, slice(None))) == set(records)
        patient_of: dict[int, str] = {}
        for row, key in enumerate(index.keys(split, range(len(table)))):
            entry = table[row]
            with open(index.path(split, entry["shard"]), "rb") as file:
                file.seek(entry["offset"])
                assert file.read(entry["size"]) == (root / records[key].image).read_bytes()
            assert tuple(entry["labels"]) == records[key].labels
            assert index.views[entry["view"]] == records[key].view
            assert patient_of.setdefault(int(entry["patient"]), records[key].patient) == records[key].patient
        assert len(set(patient_of.values())) == len(patient_of) == index.splits[split].patients


def test_totals_count_every_state(folder):
    index = load_index(folder)
    table = index.table("valid")
    for column, name in enumerate(index.label_names):
        states = table["labels"][:, column].tolist()
        assert index.splits["valid"].totals[name] == {
            "positive": states.count(1),
            "negative": states.count(0),
            "uncertain": states.count(-1),
            "not_mentioned": states.count(-2),
        }


def test_pickled_for_a_loader_worker_it_is_small_and_opens_again(folder):
    index = load_index(folder)
    index.table("train")
    data = pickle.dumps(index)
    assert index._tables and len(data) < 20_000
    copy = pickle.loads(data)  # noqa: S301 (made in the line above)
    assert isinstance(copy, ShardIndex) and not copy._tables
    assert np.array_equal(copy.table("train"), index.table("train"))


def test_no_index_no_shards(folder, tmp_path):
    (folder / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match="unfinished or not a shard folder; run make_shards"):
        load_index(folder)
    with pytest.raises(ValueError, match="unfinished or not a shard folder"):
        load_index(tmp_path / "nowhere")


def test_truncated_shard_names_file_and_both_sizes(folder):
    path = folder / "train-000001.tar"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 512)
    with pytest.raises(ValueError, match=rf"train-000001\.tar is truncated: {size - 512} bytes.*{size};.*copy"):
        load_index(folder)


@pytest.mark.parametrize("name", ["train-000002.tar", "samples-valid.npy"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        load_index(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "not an index of scaletransfer-shards"),
        (lambda c: c.update(format_version=1), "format_version 1, this program reads 2"),
        (lambda c: c.update(task="ranking"), "task 'ranking' is unknown"),
        (lambda c: c.update(label_kind="classes"), "label_kind 'classes' does not fit"),
        (lambda c: c.pop("licence"), "field 'licence' is missing"),
        (lambda c: c.update(views="PA"), "field 'views' must be list, not str"),
        (lambda c: c["splits"]["train"].update(samples=True), "splits.train.samples' must be int, not bool"),
        (lambda c: c["splits"]["train"].update(samples=5), "is not the sum over its shards"),
        (lambda c: c["splits"]["train"]["shards"][0].update(bytes=-1), "is negative"),
        (lambda c: c["splits"]["train"]["totals"].pop("Edema"), "names in 'splits.train.totals'"),
        (
            lambda c: c["splits"]["train"]["shards"][0].update(file="../x.tar"),
            "not a plain name inside the folder",
        ),
        (lambda c: c["splits"]["train"].update(table="/etc/passwd"), "not a plain name inside the folder"),
        (lambda c: c.update(label_names=["a", "a"]), "names a label twice"),
        (lambda c: c["image"].update(channels=2), "image.channels must be 1 or 3"),
        (lambda c: c.update(splits={}), "'splits' is empty"),
    ],
)
def test_wrong_index_is_refused_in_one_sentence(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_index(folder)
    assert str(folder / INDEX_NAME) in str(error.value) and "\n" not in str(error.value)


def test_index_that_is_not_json(folder):
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_index(folder)


def test_unknown_split_is_named(folder):
    with pytest.raises(ValueError, match="no split 'test'; it has train, valid"):
        load_index(folder).table("test")


def test_damaged_table_is_refused(folder):
    path = folder / "samples-train.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"samples-train\.npy is damaged"):
        load_index(folder).table("train")


class Sprung:
    def __reduce__(self):
        return (open, ("sprung", "w"))


def test_a_pickle_in_place_of_the_table_does_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "samples-train.npy"
    for plant in (
        lambda: np.save(path, np.array([Sprung()], dtype=object)),
        lambda: path.write_bytes(pickle.dumps(Sprung())),
    ):
        plant()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit(folder, lambda content, digest=digest: content["splits"]["train"].update(table_sha256=digest))
        with pytest.raises(ValueError, match="not a plain npy table"):
            load_index(folder).table("train")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", 99, "a shard that does not exist"),
        ("shard", -1, "a shard that does not exist"),
        ("shard", 1, "not in the order of the shards|another number of rows"),
        ("offset", -5, "outside its shard"),
        ("offset", 511, "outside its shard"),  # the header before it
        ("size", 2**63 - 1, "outside its shard"),
        ("size", 0, "outside its shard"),
        ("view", 7, "a view that the index does not have"),
        ("labels", 2, "not one of 1, 0, -1, -2"),
        ("labels", -3, "not one of 1, 0, -1, -2"),
    ],
)
def test_table_that_contradicts_the_index(folder, field, value, message):
    def change(table):
        table[field][3] = value

    replace_table(folder, change)
    with pytest.raises(ValueError, match=message):
        load_index(folder).table("train")


def test_class_number_that_does_not_fit(tmp_path):
    root = make_image_folder(tmp_path / "images")
    build(plan_shards(open_source("image_folder", root), SALT), tmp_path / "shards")

    def change(table):
        table["label"][0] = 3

    replace_table(tmp_path / "shards", change)
    with pytest.raises(ValueError, match=r"a class number is outside 0\.\.2"):
        load_index(tmp_path / "shards").table("train")


def test_table_of_another_data_set(folder, tmp_path):
    root = make_image_folder(tmp_path / "images")
    build(plan_shards(open_source("image_folder", root), SALT), tmp_path / "other")
    table = tmp_path / "other" / "samples-train.npy"
    shutil.copy(table, folder)
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    edit(folder, lambda content: content["splits"]["train"].update(table_sha256=digest))
    with pytest.raises(ValueError, match="does not have the columns and the 26 rows"):
        load_index(folder).table("train")


@pytest.mark.parametrize("source", ["chexpert", "image_folder"])
def test_from_records_is_the_same_index_over_loose_files(tmp_path, source):
    root = make_chexpert(tmp_path / "r") if source == "chexpert" else make_image_folder(tmp_path / "r")
    opened = open_source(source, root)
    index = from_records(opened, SALT)
    build(plan_shards(opened, SALT), tmp_path / "shards")
    sharded = load_index(tmp_path / "shards")
    for name in ("source", "task", "label_names", "label_kind", "views", "salt_fingerprint", "licence"):
        assert getattr(index, name) == getattr(sharded, name)
    assert index.image.channels == sharded.image.channels
    label = "labels" if source == "chexpert" else "label"
    for split in sharded.splits:
        ours, theirs = index.table(split), sharded.table(split)
        assert index.splits[split].totals == sharded.splits[split].totals
        assert index.splits[split].patients == sharded.splits[split].patients
        order = {key: row for row, key in enumerate(ours["key"].tolist())}
        for row in theirs:
            own = ours[order[int(row["key"])]]
            assert np.array_equal(own[label], row[label]) and own["patient"] == row["patient"]
            assert own["view"] == row["view"] and own["size"] == row["size"] and own["offset"] == 0
            path = index.path(split, int(own["shard"]))
            assert path.stat().st_size == own["size"] and path.is_relative_to(root)
    copy = pickle.loads(pickle.dumps(index))  # noqa: S301 (made here)
    assert copy.digest == index.digest and np.array_equal(copy.table("train"), index.table("train"))
    assert from_records(opened, b"another salt of enough bytes").digest != index.digest


def test_from_records_names_missing_images(tmp_path):
    root = make_chexpert(tmp_path / "r")
    source = open_source("chexpert", root)
    first = next(iter(source)).image
    (root / first).unlink()
    with pytest.raises(ValueError, match=rf"{first}.*is missing or empty, and with it 1 of 28"):
        from_records(source, SALT)


def test_from_records_refuses_names_that_leave_the_root(tmp_path):
    class Escaping(Source):
        name, task, licence, public, label_names = "x", "multiclass", "", True, ("a",)

        def __iter__(self):
            yield Record(source_id="1", split="train", patient="", image="../secret.png", labels=0, view="")

    with pytest.raises(ValueError, match=r"'\.\./secret\.png' leaves the folder"):
        from_records(Escaping(tmp_path), SALT)
