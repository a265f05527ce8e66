"""What `shards info` says of a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image, make_image_folder

from scaletransfer.cli import run_command
from scaletransfer.index import load_index
from scaletransfer.shard_info import describe, details, summary
from scaletransfer.shards import build, plan_shards, shards_main
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = make_image_folder(tmp_path_factory.mktemp("info") / "images", splits=("train",))
    draw_image(root / "train" / "dog" / "wide.jpg", 99, width=90, height=30, mode="RGB")
    (root / "train" / "cat" / "img_0.jpg").write_bytes(b"")
    build(plan_shards(open_source("image_folder", root), SALT, shard_size=5), root.parent / "out")
    return root.parent / "out"


def test_the_numbers_are_those_of_the_folder(folder):
    found = summary(load_index(folder))
    train = found["splits"]["train"]
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]
    assert train["shard_bytes"] == {"min": min(sizes), "median": sorted(sizes)[1], "max": max(sizes)}
    held = sorted(shard.samples for shard in load_index(folder).splits["train"].shards)
    assert train["shard_samples"] == {"min": held[0], "median": held[1], "max": held[2]} and sum(held) == 12
    assert train["bytes"] == sum(sizes) and train["samples"] == 12 and train["quarantined"] == 1
    assert train["image_bytes"] == load_index(folder).table("train")["size"].mean()
    assert train["sides"]["images"] == 12
    assert train["sides"]["short"] == {"min": 30, "median": 40, "max": 40}
    assert train["sides"]["long"] == {"min": 48, "median": 48, "max": 90}
    assert train["totals"] == {"cat": 3, "dog": 5, "emu": 4}
    assert list(train["most_frequent"].items()) == [("dog", 5), ("emu", 4), ("cat", 3)]


def test_details_begin_with_the_description(folder):
    index = load_index(folder)
    assert set(describe(index).splitlines()) <= set(details(index).splitlines())
    assert "most frequent: dog 5, emu 4, cat 3" in details(index)
    assert "long side 48 / 48 / 90 pixels (of 12)" in details(index)


def test_the_command(folder, capsys):
    sample = REPOSITORY / "shards" / "sample"
    assert run_command(shards_main, ["info", str(folder), str(sample)]) == 0
    assert "most frequent: Cardiomegaly 5" in capsys.readouterr().out
    assert run_command(shards_main, ["info", "--json", str(folder), str(sample)]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == json.loads(json.dumps(summary(load_index(folder)))) and second["source"] == "chexpert"


def test_a_damaged_folder_is_one_sentence(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    next(copy.glob("*.tar")).unlink()
    assert run_command(shards_main, ["info", str(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
