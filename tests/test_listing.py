from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from scaletransfer.keys import key
from scaletransfer.labels import CHEXPERT_COLUMNS, CHEXPERT_FINDINGS, CHEXPERT_RAW
from scaletransfer.listing import COLUMNS, write_listing
from scaletransfer.sources import open_source

SALT = b"sixteen bytes ok"
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_COLUMNS]


def chexpert(root: Path, *labels: dict[str, str]) -> Path:
    with open(root / "train.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEADER)
        for number, cells in enumerate(labels, 1):
            path = f"CheXpert-v1.0/train/patient{number:05d}/study1/view1_frontal.jpg"
            writer.writerow([path, "Male", 50, "Frontal", "AP", *(cells.get(c, "") for c in CHEXPERT_COLUMNS)])
    return root


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


LABELS = (
    {"No Finding": "1.0", "Support Devices": "1.0", "Edema": "-1.0"},
    {"Pleural Effusion": "1.0", "Edema": "-1.0", "Fracture": "0.0"},
)


@pytest.mark.parametrize(
    "mode, names, devices, edema",
    [
        ("raw", CHEXPERT_RAW, "1", ["-1", "-1"]),
        ("paper", CHEXPERT_FINDINGS, "0", ["0", ""]),
        ("corrected", CHEXPERT_FINDINGS, "1", ["0", ""]),
    ],
)
def test_the_table(tmp_path: Path, mode: str, names: tuple[str, ...], devices: str, edema: list[str]) -> None:
    source = open_source("chexpert", chexpert(tmp_path, *LABELS))
    summary = write_listing(source, tmp_path / "list.csv", mode, SALT)
    first, second = read(tmp_path / "list.csv")
    assert tuple(first) == (*COLUMNS, *names)
    assert first["source_id"] == "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
    assert first["image"] == "train/patient00001/study1/view1_frontal.jpg"
    assert first["key"] == key("chexpert", first["source_id"], SALT)
    assert (first["split"], first["patient"], first["view"]) == ("train", "patient00001", "AP")
    assert first["Support Devices"] == devices and [first["Edema"], second["Edema"]] == edema
    assert second["Effusion"] == "1" and second["Fracture"] == "0" and second["Pneumonia"] == ""
    assert summary["rows"] == 2 and summary["splits"] == {"train": 2} and summary["patients"] == {"train": 2}
    counts = summary["labels"]["Edema"]  # type: ignore[index]
    assert counts == {
        "positive": 0,
        "negative": edema.count("0"),
        "uncertain": edema.count("-1"),
        "unknown": edema.count(""),
    }


def test_a_multi_class_source(tmp_path: Path) -> None:
    for name in ("train/b/x.png", "train/a/y.png", "val/b/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    summary = write_listing(open_source("image_folder", tmp_path), tmp_path / "list.csv", "corrected", SALT)
    rows = read(tmp_path / "list.csv")
    assert tuple(rows[0]) == (*COLUMNS, "label")
    assert [(r["split"], r["source_id"], r["label"]) for r in rows] == [
        ("train", "train/a/y.png", "0"),
        ("train", "train/b/x.png", "1"),
        ("valid", "val/b/z.png", "1"),
    ]
    assert summary["labels"] == {"a": 1, "b": 2} and summary["patients"] == {"train": 0, "valid": 0}


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    out = tmp_path / "out" / "list.csv"
    out.parent.mkdir()
    out.write_text("old")
    source = open_source("chexpert", chexpert(tmp_path, LABELS[0], {"Edema": "?"}))
    with pytest.raises(ValueError, match="Edema"):
        write_listing(source, out, "raw", SALT)
    assert out.read_text() == "old" and os.listdir(out.parent) == ["list.csv"]


def test_wrong_arguments(tmp_path: Path) -> None:
    source = open_source("chexpert", chexpert(tmp_path, *LABELS))
    with pytest.raises(ValueError, match="did you mean 'corrected'"):
        write_listing(source, tmp_path / "list.csv", "corected", SALT)
    with pytest.raises(ValueError, match="existing folder"):
        write_listing(source, tmp_path / "nowhere" / "list.csv", "raw", SALT)
    with pytest.raises(ValueError, match="is a folder"):
        write_listing(source, tmp_path, "raw", SALT)
    assert sorted(os.listdir(tmp_path)) == ["train.csv"]


def test_the_file_has_usual_permissions_and_bytes(tmp_path: Path) -> None:
    source = open_source("chexpert", chexpert(tmp_path, *LABELS))
    (tmp_path / "other").touch()
    for name in ("a.csv", "b.csv"):
        write_listing(source, tmp_path / name, "paper", SALT)
    assert (tmp_path / "a.csv").stat().st_mode == (tmp_path / "other").stat().st_mode
    data = (tmp_path / "a.csv").read_bytes()
    assert data == (tmp_path / "b.csv").read_bytes() and b"\r" not in data and data.endswith(b"\n")
