"""Every image is looked at once before a run: what cannot be read is named, and sizes come from headers."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, draw_image, make_image_folder
from helpers_loader import source
from PIL import Image, ImageOps

from scaletransfer import image_check
from scaletransfer.image_check import check_images, probe_areas
from scaletransfer.index import from_records, load_index
from scaletransfer.loader import Source
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source


def _folder(tmp_path: Path, **options) -> Path:
    return make_image_folder(tmp_path / "images", **options)


def _sources(root: Path) -> list[Source]:
    index = from_records(open_source("image_folder", root), SALT)
    return [source(index), source(index, "valid")]


def _all_rows(sources: list[Source]) -> list[np.ndarray]:
    return [np.arange(len(one.index.table(one.split))) for one in sources]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_given_image_is_decoded_once(tmp_path, monkeypatch, workers):
    sources = _sources(_folder(tmp_path))
    log = tmp_path / "decoded"
    original = image_check.decode

    def count(data: bytes, channels: int, depth: int, *white: int):
        with log.open("ab") as file:
            file.write(b"%d %d\n" % (channels, depth))
        return original(data, channels, depth, *white)

    monkeypatch.setattr(image_check, "decode", count)
    check_images(sources, [np.array([3, 0, 3, 5]), np.array([1])], channels=3, depth=8, workers=workers)
    assert log.read_bytes().splitlines() == [b"3 8"] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_counted(tmp_path, workers):
    root = _folder(tmp_path, per_class=6)
    broken = sorted((root / "train" / "dog").iterdir()) + sorted((root / "val" / "cat").iterdir())[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sources = _sources(root)
    (root / "train" / "cat" / "img_1.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"^10 of 36 images cannot be read: ") as caught:
        check_images(sources, _all_rows(sources), channels=3, depth=8, workers=workers)
    text = str(caught.value)
    assert "\n" not in text and " and 5 more: replace or remove them, or make shards" in text
    named = [root / "train" / "cat" / "img_1.jpg", *broken[:4]]
    assert [str(path) in text for path in named] == [True] * 5 and str(broken[4]) not in text
    assert text.count("(it is truncated)") == 4 and text.count("changed after it was listed") == 1
    some = np.array([0, 2, 7, 17])
    with pytest.raises(ValueError, match=r"^1 of 4 images cannot be read") as caught:
        check_images(sources, [some, some[:0]], channels=1, depth=8, workers=workers)
    assert str(broken[1]) in str(caught.value) and " more" not in str(caught.value)
    check_images(sources, [np.setdiff1d(some, [7]), np.array([3, 17])], channels=1, depth=8, workers=workers)


def test_shards_are_checked_too(tmp_path):
    root = _folder(tmp_path)
    build(plan_shards(open_source("image_folder", root), SALT), tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    check_images([source(index)], [np.arange(12)], channels=3, depth=8, workers=0)
    entry = index.table("train")[4]
    with index.path("train", int(entry["shard"])).open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(b"\0" * int(entry["size"]))
    with pytest.raises(ValueError, match=r"^1 of 12 images cannot be read: image .*the shards are damaged") as caught:
        check_images([source(index)], [np.arange(12)], channels=3, depth=8, workers=0)
    assert index.keys("train", [4])[0] in str(caught.value)


def test_a_process_that_dies_is_one_sentence(tmp_path, monkeypatch):
    parent = os.getpid()

    def die(*_) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), 9)

    monkeypatch.setattr(image_check, "decode", die)
    with pytest.raises(ValueError, match="has died"):
        check_images(_sources(_folder(tmp_path))[:1], [np.arange(12)], channels=3, depth=8, workers=1)


def _sizes(root: Path, index, rows) -> list[list[int]]:
    table = index.table("train")
    pictures = [ImageOps.exif_transpose(Image.open(index.path("train", int(table["shard"][row])))) for row in rows]
    return [[picture.height, picture.width] for picture in pictures]


def test_sizes_are_those_of_pillow(tmp_path):
    root = tmp_path / "images"
    for number, suffix in enumerate((".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm")):
        draw_image(root / "one" / f"{number}{suffix}", number, width=40 + number, height=90 - number, mode="RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    picture = Image.open(root / "one" / "0.jpg")
    picture.save(root / "one" / "turned.jpg", exif=exif)
    large = Image.Exif()
    large[0x10F] = "x" * 60_000
    large[0x112] = 8
    # Two segments before the frame header, so that it lies beyond the first 64 KiB.
    picture.save(root / "one" / "long.jpg", exif=large, comment=b"y" * 50_000)
    assert (root / "one" / "long.jpg").read_bytes().index(b"\xff\xc0") > 65536
    index = from_records(open_source("image_folder", root), SALT)
    rows = np.array([8, 0, 3, 3, 7, 1, 2, 4, 5, 6])
    sizes = probe_areas(index, "train", rows)
    assert sizes.dtype == np.int64 and sizes.tolist() == _sizes(root, index, rows)
    assert probe_areas(index, "train", np.array([], dtype=np.int64)).shape == (0, 2)


def test_sizes_in_shards_come_from_headers(tmp_path, monkeypatch):
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(6):
        path = root / "one" / f"{number}.png"
        draw_image(path, number)
        Image.fromarray(rng.integers(0, 256, (200 + number, 150, 3), dtype=np.uint8)).save(path)
    build(plan_shards(open_source("image_folder", root), SALT), tmp_path / "shards")
    index = load_index(tmp_path / "shards")
    seen = []
    original = image_check.image_size
    monkeypatch.setattr(image_check, "image_size", lambda data: seen.append(len(data)) or original(data))
    sizes = probe_areas(index, "train", np.arange(6))
    table = index.table("train")
    for row in range(6):
        with index.path("train", int(table["shard"][row])).open("rb") as file:
            file.seek(int(table["offset"][row]))
            picture = Image.open(io.BytesIO(file.read(int(table["size"][row]))))
        assert sizes[row].tolist() == [picture.height, picture.width]
    assert seen == [65536] * 6 and sorted(sizes[:, 0]) == list(range(200, 206))


def test_a_file_without_a_header_is_named(tmp_path):
    root = _folder(tmp_path)
    sources = _sources(root)
    path = root / "train" / "emu" / "img_2.jpg"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is not an image of a known format") as caught:
        probe_areas(sources[0].index, "train", np.arange(12))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=r"img_2\.jpg cannot be read \(No such file"):
        probe_areas(sources[0].index, "train", np.arange(12))
