from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaletransfer import synthetic_rows
from scaletransfer.labels import CHEXPERT_COLUMNS
from scaletransfer.sources import open_source
from scaletransfer.synthetic_chexpert import synthetic_chexpert
from scaletransfer.synthetic_rows import HEADER, choose, draw_rows, truth


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(folder: Path, split: str) -> list[dict[str, str]]:
    with open(folder / f"{split}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "CheXpert-v1.0"
    synthetic_chexpert(out, rows=200, seed=3, size=64, table="drawn")
    return out


def test_the_layout_is_the_official_one(small: Path) -> None:
    train, valid = table(small, "train"), table(small, "valid")
    assert len(train) + len(valid) == 200 and len(valid) == 20
    assert tuple(train[0]) == tuple(valid[0]) == HEADER
    listed = {row["Path"].removeprefix("CheXpert-v1.0/") for row in train + valid}
    assert all(row["Path"].startswith("CheXpert-v1.0/train/patient") for row in train)
    assert listed == {str(p.relative_to(small)) for p in small.rglob("*.jpg")}
    records = list(open_source("chexpert", small, views="all"))  # refuses patients in both splits
    assert len(records) == 200
    sizes = set()
    for record in records:
        with Image.open(small / record.image) as image:
            assert image.mode == "L" and image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 50 and min(min(size) for size in sizes) >= 56


def test_rows_hold_what_trying_needs(small: Path) -> None:
    train, valid = table(small, "train"), table(small, "valid")
    frontal = [row for row in train if row["AP/PA"] in ("PA", "AP")]
    for column in CHEXPERT_COLUMNS[1:]:
        assert {"1.0", "0.0", ""} <= {row[column] for row in train}, column
        assert {"1.0", "0.0"} <= {row[column] for row in frontal}, column
    assert any(row["Frontal/Lateral"] == "Lateral" for row in train)
    assert any("-1.0" in row.values() for row in frontal)
    assert any(row["No Finding"] == "1.0" for row in frontal)
    assert {row[column] for row in valid for column in CHEXPERT_COLUMNS} == {"1.0", "0.0"}
    both = [column for column in CHEXPERT_COLUMNS if len({row[column] for row in valid}) == 2]
    assert len(both) >= 8
    for row in valid:
        sick = any(row[column] == "1.0" for column in CHEXPERT_COLUMNS[1:-1])
        assert (row["No Finding"] == "1.0") != sick


def test_equal_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        synthetic_chexpert(tmp_path / name, rows=40, seed=0, size=64, workers=workers, table="drawn")
    synthetic_chexpert(tmp_path / "c", rows=40, seed=1, size=64, table="drawn")
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_whole_patients_of_the_real_table() -> None:
    path = synthetic_rows.real_table()
    if path is None:
        pytest.skip("torchxrayvision isn't installed")
    rows = synthetic_rows.read_rows(path)
    assert len(rows) == 223_414
    train, valid = choose(rows, 500, np.random.default_rng(0))
    assert len(train) == 450 and len(valid) == 50
    whole = Counter(row.patient for row in rows)
    chosen = Counter(row.patient for row in train + valid)
    assert all(whole[patient] == count for patient, count in chosen.items())
    assert not {row.patient for row in train} & {row.patient for row in valid}
    known = set(rows)
    assert set(train) | set(valid) <= known
    assert [row.patient for row in train] == sorted(row.patient for row in train)
    again = choose(rows, 500, np.random.default_rng(1))[0]
    assert again != train


def test_drawn_rows_have_about_the_real_shares() -> None:
    rows = draw_rows(np.random.default_rng(0), 20_000)
    states = np.array([row.states for row in rows])
    column = CHEXPERT_COLUMNS.index("Pleural Effusion")
    assert (states[:, column] == 1).mean() == pytest.approx(0.386 * 0.9, abs=0.03)
    assert (states[:, 0] == 1).mean() == pytest.approx(0.10, abs=0.02)
    assert 0.10 < np.mean([row.side == "Lateral" for row in rows]) < 0.20


def test_truth_follows_the_labels_and_is_one_for_a_study() -> None:
    rows = draw_rows(np.random.default_rng(0), 6_000)
    seen: dict[int, list[bool]] = {1: [], 0: [], -1: [], -2: []}
    for row in rows:
        present = truth(row, 5)
        healthy = row.states[0] == 1
        for name, state in zip(CHEXPERT_COLUMNS[1:], row.states[1:], strict=True):
            if not healthy:
                seen[state].append(name in present)
            elif name != "Support Devices":
                assert name not in present
        assert all(0.65 <= strength <= 1 for strength in present.values())
    assert all(seen[1]) and not any(seen[0])
    assert np.mean(seen[-1]) == pytest.approx(0.5, abs=0.05) and 0 < np.mean(seen[-2]) < 0.06
    pairs = [(a, b) for a, b in pairwise(rows) if (a.patient, a.study) == (b.patient, b.study)]
    assert pairs and all(truth(a, 5) == truth(b, 5) for a, b in pairs)
