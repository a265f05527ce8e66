"""A data set behind a URL: what lies in its mirror, what stays behind the URL, and what is said when it changes."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_refusal import listing
from helpers_s3 import BUCKET, s3, s3_server  # noqa: F401 - fixtures

from scaletransfer import image_files, mirrors, storage
from scaletransfer.cli import run_command
from scaletransfer.image_files import read_image, read_images
from scaletransfer.make_shards import main
from scaletransfer.mirrors import MARK, mirrored_url, open_mirror
from scaletransfer.records import probe_images
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("mirrors") / "CheXpert-v1.0", rows=40, valid=12)


def test_a_mirror_takes_no_room_and_follows_its_url(root, s3, tmp_path):  # noqa: F811
    source = s3.put_tree(root, "mirrored/set")
    first = open_mirror(source)
    assert (first.images, first.files) == (52, 2) and first.copied > 0
    assert first.folder.stat().st_mode & 0o77 == 0
    theirs = {name for name in listing(root) if (root / name).is_file()}
    mine = {name for name in listing(first.folder) if (first.folder / name).is_file()}
    assert mine - {MARK} == theirs
    for name in theirs:
        path = first.folder / name
        assert path.stat().st_size == (root / name).stat().st_size
        if name.endswith(".jpg"):
            assert path.stat().st_blocks == 0, "a file without content"
        else:
            assert path.read_bytes() == (root / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    assert open_mirror(source).copied == 0
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before

    table, image, gone = root / "train.csv", "train/patient00001/study1/view1_frontal.jpg", "valid/new/a.png"
    changed = table.read_bytes().replace(b"Female", b"Malexx")
    s3.put_bytes(changed, "mirrored/set/train.csv")
    s3.put_bytes(b"other bytes", f"mirrored/set/{image}")
    s3.put_bytes(b"12345", f"mirrored/set/{gone}")
    assert open_mirror(source).copied == len(changed)
    assert (first.folder / "train.csv").read_bytes() == changed
    assert (first.folder / image).stat().st_size == 11 and (first.folder / gone).stat().st_size == 5
    storage.remove(storage.join(source, gone))
    open_mirror(source)
    assert not (first.folder / gone).exists() and not (first.folder / "valid" / "new").exists()


def test_class_folders_and_archives_behind_a_url(s3, tmp_path):  # noqa: F811
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=3)
    mirror = open_mirror(s3.put_tree(root, "folders")).folder
    for name, folder in (("a", root), ("b", mirror)):
        build(plan_shards(open_source("image_folder", folder), SALT), tmp_path / name)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    shutil.make_archive(str(tmp_path / "packed" / "0"), "zip", root)
    packed = open_mirror(s3.put_tree(tmp_path / "packed", "packed"))
    assert (packed.images, packed.files) == (0, 1)
    assert (packed.folder / "0.zip").read_bytes() == (tmp_path / "packed" / "0.zip").read_bytes()


@pytest.mark.parametrize("name", ["../x.csv", "a//b.csv", "a\\b.csv", "a\nb.csv", MARK])
def test_names_that_are_no_plain_paths(s3, tmp_path, name, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage, "list_files", lambda url: {"train.csv": (1, "x"), name: (1, "x")})
    with pytest.raises(ValueError, match=r"no plain path|leaves the folder"):
        open_mirror(f"s3://{BUCKET}/{tmp_path.name}")


def test_nothing_behind_the_url(s3, capsys, tmp_path):  # noqa: F811
    for source in (f"s3://{BUCKET}/nothing", "s3://no-such-bucket/x"):
        assert run_command(main, ["chexpert", "--root", source, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert source in error and "check the bucket" in error and error.count("\n") == 1
    assert run_command(main, ["chexpert", "--root", f"file://{tmp_path}/nowhere"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_an_image_that_changed_after_the_listing(root, s3, tmp_path):  # noqa: F811
    source = s3.put_tree(root, "changing")
    mirror = open_mirror(source).folder
    plan = plan_shards(open_source("chexpert", mirror), SALT, shard_size=5)
    image = plan.samples["train"][20].image
    s3.put_bytes(b"shorter", f"changing/{image}")
    with pytest.raises(OSError, match=r"bytes when it was listed and now has 7; start again"):
        build(plan, tmp_path / "out")
    kept = list((tmp_path / "out" / WORK_FOLDER).glob("*.tar.json"))
    assert len(kept) == 4, "a build goes on after that"
    storage.remove(storage.join(source, image))
    with pytest.raises(ConnectionError, match="is missing"):
        build(plan, tmp_path / "out")


def test_marks_hold_no_more_than_they_say(root, s3, tmp_path):  # noqa: F811
    mirror = open_mirror(s3.put_tree(root, "marked")).folder
    content = json.loads((mirror / MARK).read_bytes())
    assert content.keys() == {"url", "files"} and content["files"].keys() == {"train.csv", "valid.csv"}


def test_an_ordinary_folder_is_looked_at_once(root, monkeypatch):
    image = next(iter(open_source("chexpert", root))).image
    mirrored_url.cache_clear()
    read_image(root, image)
    monkeypatch.setattr(mirrors, "json", None)  # a second look would fail
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"the file")
    assert read_image(root, image) == b"the file"


def test_a_copied_image_file_is_not_taken_for_one_behind_a_url(s3, tmp_path, monkeypatch):  # noqa: F811
    folder = make_image_folder(tmp_path / "images", splits=("train",), per_class=2)
    shutil.make_archive(str(tmp_path / "set" / "0"), "zip", folder)
    mirror = open_mirror(s3.put_tree(tmp_path / "set", "zips")).folder
    monkeypatch.setattr(storage, "read_bytes", None)
    assert read_image(mirror, "0.zip//train/cat/img_0.jpg") == (folder / "train/cat/img_0.jpg").read_bytes()


def test_headers_of_images_behind_a_url(root, s3):  # noqa: F811
    mirror = open_mirror(s3.put_tree(root, "probed")).folder
    records = list(open_source("chexpert", mirror))
    assert probe_images(mirror, records) == probe_images(root, records)


def test_images_are_fetched_ahead_and_come_in_order(tmp_path, monkeypatch):
    (tmp_path / MARK).write_text(json.dumps({"url": "s3://bucket/set", "files": {}}))
    names = [f"{number:03d}.png" for number in range(100)]
    for name in names:
        (tmp_path / name).write_bytes(b"123")
    at_once, most, lock = 0, 0, threading.Lock()

    def slow(url: str) -> bytes:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        with lock:
            at_once -= 1
        if url.endswith("/050.png"):
            raise storage.StorageError(f"{url} cannot be read")
        return url[-7:-4].encode()

    monkeypatch.setattr(storage, "read_bytes", slow)
    images = read_images(tmp_path, [(name, None) for name in names])
    assert [next(images)() for _ in range(50)] == [name[:3].encode() for name in names[:50]]
    with pytest.raises(ConnectionError, match=r"s3://bucket/set/050\.png cannot be read"):
        next(images)()
    assert next(images)() == b"051"
    images.close()
    assert 1 < most <= image_files._FETCHED_AHEAD and at_once == 0
