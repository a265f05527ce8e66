"""The commands make_shards and shards: what they print, write and refuse."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder

from scaletransfer import keys
from scaletransfer.cli import run_command
from scaletransfer.index import load_index
from scaletransfer.make_shards import main
from scaletransfer.shards import shards_main
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def salt(tmp_path) -> str:
    path = tmp_path / "salt"
    path.write_bytes(SALT)
    return str(path)


@pytest.fixture
def root(tmp_path) -> Path:
    return make_chexpert(tmp_path / "CheXpert-v1.0", rows=20, valid=8)


def arguments(root: Path, salt: str, *more: object) -> list[str]:
    return ["chexpert", "--root", str(root), "--salt-file", salt, *map(str, more)]


def refused(capsys, argv: list[str]) -> str:
    """Run the command, which must end with status 2 and one line on stderr; that line."""
    assert run_command(main, argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in captured.err
    return lines[0]


def test_summary_says_what_was_made(root, salt, tmp_path, capsys):
    records = list(open_source("chexpert", root))
    (root / records[0].image).write_bytes(b"")
    out = tmp_path / "out"
    assert run_command(main, arguments(root, salt, "--out", out, "--shard-size", 6)) == 0
    text = capsys.readouterr().out
    index = load_index(out)
    train = index.splits["train"]
    assert f"train  17 samples, {train.patients} patients, 3 shards" in text and "1 quarantined" in text
    key = keys.key("chexpert", records[0].source_id, SALT)
    assert f"{key}: the file is empty" in text
    assert "valid  7 samples" in text and "images/s" in text and "Research Use Agreement" in text
    assert run_command(main, arguments(root, salt, "--out", out, "--shard-size", 6)) == 0
    assert "finished already by the same command" in capsys.readouterr().out
    assert "other options" in refused(capsys, arguments(root, salt, "--out", out, "--shard-size", 5))
    assert run_command(main, arguments(root, salt, "--out", out, "--shard-size", 5, "--overwrite")) == 0


def test_default_folder_and_recorded_options(root, salt, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, arguments(root, salt, "--views", "all", "--seed", 7, "--limit", 5)) == 0
    index = load_index(tmp_path / "shards" / "chexpert")
    assert index.splits["train"].samples == index.splits["valid"].samples == 5
    sizes = {"train": 5, "valid": 5}
    assert index.options == {"seed": 7, "limit": 5, "views": ["all"], "shard_size": sizes}


@pytest.mark.parametrize(("views", "samples"), [(None, 18), ("PA,AP", 18), ("all", 20), ("L", 2)])
def test_views(root, salt, tmp_path, views, samples):
    more = ["--views", views] if views else []
    assert main(arguments(root, salt, "--out", tmp_path / "out", *more)) == 0
    index = load_index(tmp_path / "out")
    assert index.splits["train"].samples == samples
    assert index.options["views"] == (sorted(views.split(",")) if views else ["AP", "PA"])


def test_list_is_what_will_be_sharded(root, salt, tmp_path, capsys):
    listing, out = tmp_path / "rows.csv", tmp_path / "out"
    assert main(arguments(root, salt, "--list", listing, "--labels", "raw")) == 0
    assert not out.exists() and "25 rows" in capsys.readouterr().out
    assert main(arguments(root, salt, "--out", out)) == 0
    index = load_index(out)
    with open(listing, newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    cells = {1: "1", 0: "0", -1: "-1", -2: ""}
    seen = 0
    for split in index.splits:
        table = index.table(split)
        for key, entry in zip(index.keys(split, slice(None)), table, strict=True):
            row = rows[key]
            seen += 1
            assert row["split"] == split and row["view"] == index.views[entry["view"]]
            assert [row[name] for name in index.label_names] == [cells[int(v)] for v in entry["labels"]]
    assert seen == len(rows) == 25


def test_list_needs_no_images_unless_asked(salt, tmp_path, capsys):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=9, valid=0, images=False)
    listing = tmp_path / "rows.csv"
    assert main(arguments(root, salt, "--list", listing)) == 0
    listing.unlink()
    message = refused(capsys, arguments(root, salt, "--list", listing, "--check-images"))
    assert "8 of 8 images are missing; the first is row 1" in message and not listing.exists()


def test_image_folder_and_its_options(tmp_path, salt, capsys):
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=12)
    argv = ["image_folder", "--root", str(root), "--salt-file", salt, "--out", str(tmp_path / "out")]
    assert main([*argv, "--option", "valid_share=0.3"]) == 0
    index = load_index(tmp_path / "out")
    assert list(index.splits) == ["train", "valid"] and index.options["valid_share"] == 0.3
    assert "no option 'valid_shares' (did you mean 'valid_share'?)" in refused(
        capsys, [*argv, "--option", "valid_shares=0.3"]
    )
    assert "no option 'views'" in refused(capsys, [*argv, "--views", "PA"])
    assert "give NAME=VALUE" in refused(capsys, [*argv, "--option", "valid_share"])
    for entry, own in (("protocol=paper", "--protocol paper"), ("views=PA", "--views PA")):
        assert f"an option of its own: {own}" in refused(capsys, [*argv, "--option", entry])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "PA,FRONTAL"], "no view 'FRONTAL'"),
        (["--labels", "raw"], "--labels chooses the label columns of --list"),
        (["--list", "rows.csv", "--labels", "correct"], "did you mean 'corrected'"),
        (["--workers", "0"], "--workers is 0"),
        (["--shard-size", "-1"], "--shard-size is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--size", "-3"], "--size is -3"),
        (["--quality", "0"], "--quality is 0"),
    ],
)
def test_wrong_options_write_nothing(root, salt, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, arguments(root, salt, "--out", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists() and not (tmp_path / "rows.csv").exists()


def test_unknown_source_root_and_out(root, salt, tmp_path, capsys):
    argv = ["--root", str(root), "--salt-file", salt]
    assert "did you mean 'chexpert'?" in refused(capsys, ["chexpet", *argv])
    assert "is not a folder" in refused(capsys, arguments(tmp_path / "nowhere", salt))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, arguments(root, salt, "--out", tmp_path / "file"))


def test_missing_and_mixed_images(root, salt, tmp_path, capsys):
    record = next(iter(open_source("chexpert", root)))
    (root / record.image).unlink()
    out = tmp_path / "out"
    assert record.image in refused(capsys, arguments(root, salt, "--out", out)) and not out.exists()
    assert main(arguments(root, salt, "--out", out, "--allow-missing")) == 0
    images = make_image_folder(tmp_path / "images")
    draw_image(images / "train" / "cat" / "x.png", 1, mode="RGB")
    argv = ["image_folder", "--root", str(images), "--salt-file", salt, "--out", str(tmp_path / "mixed")]
    assert "--encode jpg or --encode png" in refused(capsys, argv)
    assert main([*argv, "--encode", "png", "--size", "16"]) == 0


def test_unwritable_output_is_one_sentence(root, salt, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "error: " in refused(capsys, arguments(root, salt, "--out", tmp_path / "file" / "out"))


def test_shim_and_console_command_are_the_same(root, salt, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    shim = [sys.executable, str(REPOSITORY / "tools" / "make_shards.py")]
    code = "import sys; from scaletransfer.cli import main; sys.exit(main())"
    console = [sys.executable, "-c", code, "make-shards"]
    for name, command in (("a", shim), ("b", console)):
        argv = arguments(root, salt, "--out", tmp_path / name, "--workers", 2, "--shard-size", 4)
        done = subprocess.run(
            [*command, *argv], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert load_index(tmp_path / "a").digest == load_index(tmp_path / "b").digest
    done = subprocess.run(
        [*shim, "chexpet", "--root", "."], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean" in done.stderr


def test_shards_verify_and_info(root, salt, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(root, salt, "--out", out, "--shard-size", 6)) == 0
    capsys.readouterr()
    assert run_command(shards_main, ["verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: ok\n"
    assert run_command(shards_main, ["info", str(out)]) == 0
    assert "train  18 samples" in capsys.readouterr().out
    with open(out / "train-000001.tar", "r+b") as file:
        file.truncate(1024)
    assert run_command(shards_main, ["verify", str(out)]) == 1
    text = capsys.readouterr().out
    assert "train-000001.tar is truncated: 1024 bytes" in text and "1 problem" in text
    assert run_command(shards_main, ["info", str(out)]) == 2
    assert "truncated" in capsys.readouterr().err
