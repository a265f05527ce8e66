from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from PIL import Image

from scaletransfer import synthetic, synthetic_chexpert
from scaletransfer.cli import run_command


def test_refusals_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    def command(*argv: str) -> str:
        out = str(tmp_path / "new")
        assert run_command(synthetic.main, ["chexpert", "--rows", "40", "--out", out, "--size", "64", *argv]) == 2
        error = capsys.readouterr().err
        return error

    assert "full isn't empty" in command("--out", str(tmp_path / "full"))
    assert "--rows is 19; it must be at least 20" in command("--rows", "19")
    assert "--size is 63" in command("--size", "63")
    assert "--seed is -1" in command("--seed", "-1")
    assert "--workers is 0" in command("--workers", "0")
    monkeypatch.setattr(synthetic_chexpert, "real_table", lambda: None)
    assert "needs the package torchxrayvision" in command("--table", "real")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert "No space left" in command("--table", "drawn", "--workers", "1")
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["mine.txt"]


def test_the_command_says_where_rows_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "CheXpert-v1.0-small"
    out.mkdir()  # an empty folder may be there
    argv = ["chexpert", "--rows", "30", "--out", str(out), "--seed", "1", "--size", "64", "--table", "drawn"]
    assert synthetic.main([*argv, "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "27 training images" in text and "3 validation images" in text and "drawn rows" in text
    with open(out / "valid.csv", newline="") as stream:
        assert next(csv.DictReader(stream))["Path"].startswith("CheXpert-v1.0-small/valid/patient")


def test_the_second_task_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["xray_folder", "--images-per-class", "2", "--valid-per-class", "1", "--out", str(tmp_path / "x")]
    assert synthetic.main([*argv, "--size", "64", "--workers", "1"]) == 0
    assert "10 training and 5 validation images" in capsys.readouterr().out
    assert len(list(tmp_path.glob("x/train/*/*.jpg"))) == 10 and len(list(tmp_path.glob("x/valid/*/*.jpg"))) == 5


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["xray_folder", "--rows", "40"], "--rows belongs to the source chexpert; xray_folder has --images-per-class"),
        (["xray_folder", "--images-per-class", "2", "--table", "real"], "--table belongs to the source chexpert"),
        (["chexpert", "--images-per-class", "0"], "--images-per-class belongs to the source xray_folder"),
        (["chexpert", "--rows", "40", "--valid-per-class", "1"], "--valid-per-class belongs to the source xray_folder"),
        (["chexpert"], "the source chexpert needs --rows"),
        (["xray_folder", "--valid-per-class", "2"], "the source xray_folder needs --images-per-class"),
        (["xray_folder", "--images-per-class", "0"], "--images-per-class is 0; it must be at least 1"),
        (["xray_folder", "--images-per-class", "1", "--valid-per-class", "0"], "--valid-per-class is 0"),
        (["xray_folders"], "there is no 'xray_folders', did you mean xray_folder?"),
    ],
)
def test_options_that_do_not_fit_the_source(
    argv: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(synthetic.main, [*argv, "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
