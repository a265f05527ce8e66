"""Shards that are damaged while a run reads them: one sentence, also out of a loader process; nothing is executed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, make_image_folder
from helpers_loader import dataset, small_chexpert, small_shards, source

from scaletransfer.index import ShardIndex, from_records, load_index
from scaletransfer.loader import StepSampler
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.streams import batches, dead_workers_named, make_loader

WORKERS = [(0, "auto"), (2, "threads"), (1, "processes")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return small_chexpert(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def shards(root) -> Path:
    return small_shards(root)


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("pictures")
    root = make_image_folder(base / "images", per_class=5)
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=4), base / "shards")
    return base


def read_all(index: ShardIndex, workers: int, kind="auto") -> None:
    data = dataset([source(index)])
    for _ in batches(make_loader(data, StepSampler(0, 48, 0, 1, 4, 12), workers, kind)):
        pass


def without_sums(folder: Path) -> None:
    """Let the sample tables say that no CRC-32 is known."""
    content = json.loads((folder / "index.json").read_text())
    for split in content["splits"].values():
        table = np.load(folder / split["table"], allow_pickle=False)
        table["crc"] = 0
        np.save(folder / split["table"], table, allow_pickle=False)
        split["table_sha256"] = hashlib.sha256((folder / split["table"]).read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))


def sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 500
    return text


@pytest.mark.parametrize(("workers", "kind"), WORKERS)
def test_a_shard_that_ends_too_early(folder, workers, kind):
    index = load_index(folder)  # whole when it was opened, cut while the run reads
    path = folder / "train-000001.tar"
    os.truncate(path, 3000)
    with pytest.raises(ValueError, match="it is truncated, make the shards again") as caught:
        read_all(index, workers, kind)
    assert str(path) in sentence(caught)
    with pytest.raises(ValueError, match=r"train-000001\.tar") as caught:
        load_index(folder)
    sentence(caught)


@pytest.mark.parametrize(("workers", "kind"), WORKERS)
@pytest.mark.parametrize("damage", [b"\x80\x04 this is no picture", b""])
def test_an_image_that_cannot_be_decoded(folder, workers, kind, damage):
    without_sums(folder)
    index = load_index(folder)
    row = index.table("train")[17]
    path = index.path("train", int(row["shard"]))
    with path.open("r+b") as handle:
        handle.seek(int(row["offset"]))
        handle.write(damage.ljust(int(row["size"]), b"\0"))
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        read_all(index, workers, kind)
    assert index.keys("train", [17])[0] in sentence(caught) and str(path) in str(caught.value)


@pytest.mark.parametrize(("workers", "kind"), WORKERS)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_of_an_image(folder, workers, kind, place):
    """Anywhere in it: decoders accept most of them, and the picture is another one."""
    index = load_index(folder)
    row = index.table("train")[17]
    path = index.path("train", int(row["shard"]))
    with path.open("r+b") as handle:
        handle.seek(int(row["offset"]) + int(place * (int(row["size"]) - 1)))
        byte = handle.read(1)[0]
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="is damaged") as caught:
        read_all(index, workers, kind)
    text = sentence(caught)
    assert index.keys("train", [17])[0] in text and str(path) in text and f"offset {int(row['offset'])}" in text


@pytest.mark.parametrize(
    ("at", "to"),
    [(156, b"2"), (156, b"3"), (156, b"1"), (124, b"70000000000"), (0, b"../x.jpg\0"), (0, b"/tmp/x.jpg\0")],
)
def test_a_header_that_names_no_image_of_that_size_inside_the_folder(folder, at, to):
    """A link, a device, a size of 7 GB, a name that leaves the folder: refused though the image's bytes are right."""
    index = load_index(folder)
    row = index.table("train")[0]
    path = folder / index.splits["train"].shards[int(row["shard"])].file
    with path.open("r+b") as file:
        file.seek(int(row["offset"]) - 512 + at)
        file.write(to)
    with pytest.raises(ValueError, match="does not hold") as caught:
        read_all(index, 0)
    assert f"{path} does not hold" in sentence(caught) and f"at offset {int(row['offset'])}" in str(caught.value)


@pytest.mark.parametrize(("workers", "kind"), WORKERS)
def test_a_shard_file_that_is_gone(folder, workers, kind):
    index = load_index(folder)
    (folder / "train-000002.tar").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="No such file") as caught:
        read_all(index, workers, kind)
    assert "train-000002.tar" in sentence(caught)
    with pytest.raises(ValueError, match=r"train-000002\.tar"):
        load_index(folder)


@pytest.mark.parametrize(("workers", "kind"), WORKERS)
def test_loose_files_are_named_with_the_mend_that_fits_them(tmp_path, workers, kind):
    root = make_image_folder(tmp_path / "images", classes=("one",), per_class=48, splits=("train",), suffix=".png")
    path = root / "train" / "one" / "img_7.png"
    whole = path.read_bytes()
    for damaged, reason in (
        (whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], "cannot be decoded (it is broken: "),
        (whole[: len(whole) // 2], "cannot be decoded (it is truncated)"),
    ):
        path.write_bytes(damaged)
        index = from_records(open_source("image_folder", root), SALT)
        with pytest.raises(ValueError, match="replace or remove it, or make shards, which leave such") as caught:
            read_all(index, workers, kind)
        assert f"{path} {reason}" in sentence(caught) and "offset" not in str(caught.value)
    path.write_bytes(whole)
    index = from_records(open_source("image_folder", root), SALT)
    path.write_bytes(whole[:200])
    with pytest.raises(
        ValueError, match=r"img_7\.png ends inside an image .*: it was changed after it was listed"
    ) as caught:
        read_all(index, workers, kind)
    sentence(caught)


def test_a_damaged_png_in_a_shard_does_not_end_the_process(tmp_path):
    root = make_image_folder(tmp_path / "images", classes=("one",), per_class=48, splits=("train",), suffix=".png")
    build(plan_shards(open_source("image_folder", root), SALT), tmp_path / "shards")
    without_sums(tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    row = index.table("train")[5]
    with index.path("train", int(row["shard"])).open("r+b") as handle:
        handle.seek(int(row["offset"]) + 200)
        handle.write(b"\x55\xaa")
    with pytest.raises(ValueError, match=r"cannot be decoded \(it is broken.*shards verify") as caught:
        read_all(index, 0)
    assert index.keys("train", [5])[0] in sentence(caught)


def test_a_pickle_in_place_of_an_image_is_not_executed(folder, tmp_path):
    """The bytes of a pickle that makes a file, where an image should be: refused, and no file is made."""
    planted = tmp_path / "executed"
    payload = f"cos\nsystem\n(S'touch {planted}'\ntR.".encode()
    without_sums(folder)
    index = load_index(folder)
    where = dataset([source(index)]).order.locate([0])[1]
    row = index.table("train")[int(where[0])]
    assert len(payload) < row["size"]
    with index.path("train", int(row["shard"])).open("r+b") as handle:
        handle.seek(int(row["offset"]))
        handle.write(payload)
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_all(index, 0)
    assert not planted.exists()


def test_an_index_of_another_data_set(folder, pictures):
    """index.json of one folder beside the shards of another is noticed before an image is read."""
    content = json.loads((pictures / "shards" / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train-000000\.tar") as caught:
        load_index(folder)
    sentence(caught)


def test_a_loader_process_that_is_killed_is_one_sentence(folder, monkeypatch):
    data = dataset([source(load_index(folder))])
    parent = os.getpid()
    read = data.reader.view

    def die(path: str, offset: int, size: int) -> memoryview:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, offset, size)

    monkeypatch.setattr(data.reader, "view", die)
    with pytest.raises(ValueError, match="has died") as caught, dead_workers_named():
        next(batches(make_loader(data, StepSampler(0, 48, 0, 1, 4, 12), 1, "processes")))
    assert "data.workers" in sentence(caught)


def test_other_runtime_errors_pass_through():
    with pytest.raises(RuntimeError, match=r"^something else$"), dead_workers_named():
        raise RuntimeError("something else")
