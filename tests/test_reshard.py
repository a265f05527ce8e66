"""reshard: the same samples in other shards of any size; images keep their bytes, or are scaled as make_shards does."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids
from helpers_data import SALT, make_chexpert, make_image_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_shards import hashes, members

from scaletransfer import sources
from scaletransfer.cli import run_command
from scaletransfer.index import INDEX_NAME, load_index
from scaletransfer.reshard import reshard
from scaletransfer.shards import Encoding, build, plan_shards, shards_main, verify
from scaletransfer.sources import Record, open_source

REPOSITORY = Path(__file__).parents[1]


class Tokens(sources.Source):
    """A source that lists findings by name, in an order that says nothing of their columns."""

    name, task, label_kind, licence, public = "other", "multilabel", "tokens", "none", True
    label_names = ("edema", "mass", "nodule")

    def __iter__(self):
        lists = ((), ("nodule", "edema"), ("edema", "nodule"), ("mass",))
        for number in range(9):
            image, tokens = f"{number}.jpg", lists[number % 4]
            yield Record(source_id=str(number), split="train", patient="", image=image, labels=tokens, view="")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("reshard") / "CheXpert-v1.0", rows=30, valid=9)


@pytest.fixture(scope="module")
def made(root) -> Path:
    """With two images in quarantine, so that a shard is short."""
    damaged = Path(shutil.copytree(root, root.parent / "damaged" / "CheXpert-v1.0"))
    records = [r for r in open_source("chexpert", damaged) if r.split == "train"]
    for record in records[3:5]:
        (damaged / record.image).write_bytes(b"")
    build(plan_shards(open_source("chexpert", damaged), SALT, shard_size=7, seed=2), root.parent / "made")
    return root.parent / "made"


def samples(folder: Path) -> dict[str, list[tuple[str, bytes, bytes]]]:
    """Of each split, (key, image, label member) in order."""
    index = load_index(folder)
    found: dict[str, list[tuple[str, bytes, bytes]]] = {}
    for split, info in index.splits.items():
        pairs = [pair for shard in info.shards for pair in members(folder / shard.file)]
        images, texts = pairs[::2], pairs[1::2]
        found[split] = [(m.name.split(".")[0], data, text) for (m, data), (_, text) in zip(images, texts, strict=True)]
    return found


def described(folder: Path) -> dict:
    """What stays of an index."""
    content = json.loads((folder / INDEX_NAME).read_text())
    for name in ("options", "plan_sha256"):
        del content[name]
    for split in content["splits"].values():
        for name in ("shards", "table_sha256"):
            del split[name]
    return content


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, 30), second=st.integers(1, 30), seed=st.none() | st.integers(0, 5))
def test_any_shard_size_keeps_every_sample(made, tmp_path, first, second, seed):
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    index = reshard(made, tmp_path / "one", shard_size=first, seed=seed).index
    assert verify(tmp_path / "one") == []
    before, after = samples(made), samples(tmp_path / "one")
    assert {s: sorted(found) for s, found in after.items()} == {s: sorted(found) for s, found in before.items()}
    assert (after == before) or seed not in (None, 2)
    assert described(tmp_path / "one") == described(made)
    assert all(shard.samples == first for info in index.splits.values() for shard in info.shards[:-1])
    # again: the size in between does not matter
    reshard(tmp_path / "one", tmp_path / "two", shard_size=second)
    assert samples(tmp_path / "two") == after and verify(tmp_path / "two") == []
    for split, info in index.splits.items():
        rows = index.table(split)
        keys = dict(zip(rows["key"].tolist(), rows["patient"].tolist(), strict=True))
        old = load_index(made).table(split)
        assert keys == dict(zip(old["key"].tolist(), old["patient"].tolist(), strict=True))
        assert info.quarantine == load_index(made).splits[split].quarantine


def test_the_shard_size_of_make_shards_gives_its_bytes(root, tmp_path):
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=7, seed=2), tmp_path / "made")
    reshard(tmp_path / "made", tmp_path / "cut", shard_size=4)
    reshard(tmp_path / "cut", tmp_path / "again", shard_size=7, seed=2)
    expected, found = hashes(tmp_path / "made"), hashes(tmp_path / "again")
    assert expected.pop(INDEX_NAME) != found.pop(INDEX_NAME) and found == expected


def test_the_index_says_what_it_was_made_from(made, tmp_path):
    index = reshard(made, tmp_path / "out", shard_size=4).index
    origin = load_index(made)
    assert index.options == {
        "seed": 2,
        "shard_size": {"train": 4, "valid": 4},
        "resharded": {"index": origin.digest, "order": "kept", "encode": "", "splits": ["train", "valid"]},
    }
    assert index.encoder == origin.encoder and index.salt_fingerprint == origin.salt_fingerprint


@pytest.mark.parametrize("options", [{"shard_size": 4, "seed": 5}, {"size": 42, "quality": 80}])
def test_the_same_bytes_for_any_number_of_workers(made, tmp_path, options):
    reshard(made, tmp_path / "one", **options)
    reshard(made, tmp_path / "two", **options, workers=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert reshard(made, tmp_path / "two", **options).images == 0  # finished already


def test_scaled_images_are_those_of_make_shards(root, made, tmp_path):
    index = reshard(made, tmp_path / "small", size=44).index
    assert index.image.size == 44 and index.encoder["before"] == load_index(made).encoder
    assert verify(tmp_path / "small") == []
    encoding = Encoding(size=44)
    build(plan_shards(open_source("chexpert", root), SALT, encoding=encoding), tmp_path / "direct")
    direct = {key: data for key, data, _ in samples(tmp_path / "direct")["train"]}
    scaled = 0
    for (key, data, text), (other, original, label) in zip(
        samples(tmp_path / "small")["train"], samples(made)["train"], strict=True
    ):
        assert (key, text) == (other, label) and data == direct[key]
        scaled += data != original
        assert min(Image.open(io.BytesIO(data)).size) <= 44
    assert scaled > 3
    # smaller again
    assert reshard(tmp_path / "small", tmp_path / "smaller", size=20).index.image.size == 20
    assert verify(tmp_path / "smaller") == []


def test_encoded_as_png(made, tmp_path):
    index = reshard(made, tmp_path / "png", encode="png", splits=["valid"]).index
    assert list(index.splits) == ["valid"] and index.image.extension == "png" and verify(tmp_path / "png") == []
    for (_, data, _), (_, original, _) in zip(samples(tmp_path / "png")["valid"], samples(made)["valid"], strict=True):
        picture = Image.open(io.BytesIO(data))
        assert picture.format == "PNG" and np.array_equal(picture, Image.open(io.BytesIO(original)))


def test_classes_and_sixteen_bits(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".png", mode="I;16")
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=5), tmp_path / "made")
    index = reshard(tmp_path / "made", tmp_path / "out", shard_size=3).index
    assert samples(tmp_path / "out") == samples(tmp_path / "made") and verify(tmp_path / "out") == []
    assert index.image == load_index(tmp_path / "made").image and index.image.bit_depth == 16
    small = reshard(tmp_path / "made", tmp_path / "small", size=20).index
    assert small.image.bit_depth == 16 and verify(tmp_path / "small") == []
    with pytest.raises(ValueError, match="have 16 bits a pixel and JPEG holds 8"):
        reshard(tmp_path / "made", tmp_path / "jpg", encode="jpg")


def test_tokens_keep_their_order(tmp_path):
    for number in range(9):
        Image.new("L", (20, 20), number * 20).save(tmp_path / f"{number}.jpg")
    build(plan_shards(Tokens(tmp_path), SALT, shard_size=4), tmp_path / "made")
    reshard(tmp_path / "made", tmp_path / "out", shard_size=2)
    assert samples(tmp_path / "out") == samples(tmp_path / "made") and verify(tmp_path / "out") == []
    texts = {json.loads(text)["tokens"] for _, _, text in samples(tmp_path / "out")["train"]}
    assert texts == {"", "nodule|edema", "edema|nodule", "mass"}


def test_other_readers_read_it(made, tmp_path):
    index = reshard(made, tmp_path / "out", shard_size=5).index
    expected = [key for key, _, _ in samples(tmp_path / "out")["train"]]
    urls = [str(tmp_path / "out" / shard.file) for shard in index.splits["train"].shards]
    read = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == expected
    dataset = wids.ShardListDataset(str(tmp_path / "out" / "wids-train.json"), keep=True)
    assert [dataset[row]["__key__"] for row in range(len(dataset))] == expected


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing is to change"),
        ({"shard_size": -1}, "--shard-size is -1"),
        ({"size": -1}, "--size is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"size": 20, "quality": 0}, "--quality is 0"),
        ({"shard_size": 3, "quality": 80}, "give --size or --encode with it"),
        ({"splits": ["trian"]}, "--splits names 'trian'.*has train, valid"),
        ({"shard_size": 3, "workers": 0}, "--workers is 0"),
    ],
)
def test_options_that_mean_nothing(made, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reshard(made, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_images_are_not_enlarged(made, tmp_path):
    reshard(made, tmp_path / "small", size=30)
    with pytest.raises(ValueError, match=r"--size 40 would enlarge .*at most 30"):
        reshard(tmp_path / "small", tmp_path / "out", size=40)
    reshard(tmp_path / "small", tmp_path / "same", size=30, shard_size=3)
    assert samples(tmp_path / "same") == samples(tmp_path / "small")


def test_other_folders_are_left_alone(made, tmp_path):
    with pytest.raises(ValueError, match="is the folder itself"):
        reshard(made, made.parent / "." / made.name, shard_size=3)
    reshard(made, tmp_path / "out", shard_size=3)
    before = hashes(tmp_path / "out")
    with pytest.raises(ValueError, match="holds finished shards made from other data or with other options"):
        reshard(made, tmp_path / "out", shard_size=4)
    assert hashes(tmp_path / "out") == before
    reshard(made, tmp_path / "out", shard_size=4, overwrite=True)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_folder_is_refused(made, tmp_path, workers):
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "train-000001.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000001\.tar: sha256 differs from index\.json.*--repair"):
        reshard(folder, tmp_path / "out", shard_size=3, workers=workers)
    assert not (tmp_path / "out").exists()


@pytest.mark.engine
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_it_continues_to_the_same_bytes(tmp_path, workers):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=300, valid=10, laterals=False)
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=50), tmp_path / "made")
    reshard(tmp_path / "made", tmp_path / "whole", shard_size=4, size=36)
    command = [sys.executable, "-m", "scaletransfer.cli", "shards", "reshard", tmp_path / "made", "--out"]
    command += [tmp_path / "out", "--shard-size", "4", "--size", "36", "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([str(c) for c in command], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not (tmp_path / "out" / INDEX_NAME).exists(), "it ended before it could be killed: make it longer"
    time.sleep(0.5 if workers > 1 else 0)  # workers notice that their parent is gone
    report = reshard(tmp_path / "made", tmp_path / "out", shard_size=4, size=36)
    assert report.kept_shards >= 2 and hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_command(made, tmp_path, capsys):
    command = ["reshard", str(made), "--out", str(tmp_path / "out"), "--shard-size", "20", "--splits", "train"]
    assert run_command(shards_main, command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: train 24 samples in 2 shards\n"
