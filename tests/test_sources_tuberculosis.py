from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.tuberculosis import write_tuberculosis

from scaletransfer.index import from_records
from scaletransfer.sources import Record, open_source, source_options

SALT = b"a salt for tests only, 32 bytes."
CHINA, MONTGOMERY = "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png", "Montgomery/MontgomerySet/CXR_png"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_tuberculosis(tmp_path_factory.mktemp("tb") / "Tuberculosis_dataset")


def test_records_in_the_order_of_names(official: Path) -> None:
    source = open_source("tuberculosis", official)
    records = list(source)
    assert records == list(source) == list(source.listed())
    assert source.task == "multiclass" and not source.public and source.label_names == ("normal", "tuberculosis")
    assert source_options("tuberculosis") == () and not source.skipped and not source.notes
    assert [r.image for r in records] == [
        *sorted(f"{CHINA}/{path.name}" for path in (official / CHINA).glob("*.png")),
        *sorted(f"{MONTGOMERY}/{path.name}" for path in (official / MONTGOMERY).glob("*.png")),
    ]
    assert records[0] == Record(
        source_id="CHNCXR_0001_0.png",
        split=records[0].split,
        patient="CHNCXR_0001",
        image=f"{CHINA}/CHNCXR_0001_0.png",
        labels=0,
        view="",
    )
    assert all(r.labels == int(r.image[-5]) for r in records)
    assert len({r.patient for r in records}) == len(records) == 34


def test_the_published_counts(tmp_path: Path) -> None:
    """662 and 138 images give 679 and 121, as in arXiv 2106.00116."""
    root = write_tuberculosis(tmp_path / "tb", china=662, montgomery=138, side=0)
    records = list(open_source("tuberculosis", root))
    assert Counter(r.split for r in records) == {"train": 679, "test": 121}
    assert Counter(r.split for r in records if r.image.startswith(CHINA)) == {"train": 562, "test": 100}
    assert Counter(r.split for r in records if r.image.startswith(MONTGOMERY)) == {"train": 117, "test": 21}


def test_the_shuffle_is_that_of_random_state_42(tmp_path: Path) -> None:
    """numpy.random.RandomState(42).permutation(10) is 8 1 5 0 7 2 9 4 3 6: the last two are test."""
    root = write_tuberculosis(tmp_path / "tb", china=10, montgomery=10, side=0)
    test = [r.patient for r in open_source("tuberculosis", root) if r.split == "test"]
    assert test == ["CHNCXR_0004", "CHNCXR_0007", "MCUCXR_0004", "MCUCXR_0007"]


@settings(max_examples=15, deadline=None)
@given(china=st.integers(2, 60), montgomery=st.integers(2, 60))
def test_any_number_of_images(tmp_path_factory: pytest.TempPathFactory, china: int, montgomery: int) -> None:
    """Against shuffled row numbers: a fresh generator for each set."""
    root = write_tuberculosis(tmp_path_factory.mktemp("tb") / "tb", china=china, montgomery=montgomery, side=0)
    records = list(open_source("tuberculosis", root))
    for folder, count in ((CHINA, china), (MONTGOMERY, montgomery)):
        own = [r for r in records if r.image.startswith(folder)]
        rows = np.arange(count)
        np.random.RandomState(42).shuffle(rows)
        train = set(rows[: int(0.85 * count)].tolist())
        assert [r.split for r in own] == ["train" if row in train else "test" for row in range(count)]


@pytest.mark.parametrize(
    ("china", "montgomery"),
    [
        ("ChinaSet_AllFiles/CXR_png", "MontgomerySet/CXR_png"),
        ("China/CXR_png", "Montgomery/CXR_png"),
        ("ChinaSet/CXR_png", "MontgomerySet/MontgomerySet/CXR_png"),
    ],
)
def test_other_layouts_give_the_same(official: Path, tmp_path: Path, china: str, montgomery: str) -> None:
    for old, new in ((CHINA, china), (MONTGOMERY, montgomery)):
        shutil.copytree(official / old, tmp_path / new)

    def facts(root: Path) -> list[tuple[str, str, object]]:
        return [(r.source_id, r.split, r.labels) for r in open_source("tuberculosis", root)]

    assert facts(tmp_path) == facts(official) == facts(official.parent)


def test_dicom_beside_png_changes_no_split(tmp_path: Path) -> None:
    root = write_tuberculosis(tmp_path / "tb", side=0)
    before = [(r.source_id, r.split) for r in open_source("tuberculosis", root)]
    (root / CHINA / "CHNCXR_0001_0.png").rename(root / CHINA / "CHNCXR_0001_0.dcm")
    (root / CHINA / "CHNCXR_0002_0.dcm").touch()
    after = list(open_source("tuberculosis", root))
    assert [(r.source_id, r.split) for r in after] == before
    assert [r.image[-4:] for r in after[:2]] == [".dcm", ".png"]


def test_what_is_passed_over(tmp_path: Path) -> None:
    root = write_tuberculosis(tmp_path / "tb", side=0)
    (root / CHINA / "notes.txt").touch()
    (root / CHINA / "._CHNCXR_0001_0.png").touch()
    source = open_source("tuberculosis", root)
    assert len(list(source)) == 34
    assert source.skipped == [f"{CHINA}/notes.txt: no image by its name"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CHNCXR_0001_2.png", r"CHNCXR_0001_2.png: a name ends in _0.png \(normal\) or _1.png"),
        ("CHNCXR_0001.png", "CHNCXR_0001.png: a name ends in"),
        ("CHNCXR_0001_1.png", "CHNCXR_0001_1.png: the patient CHNCXR_0001 has another image, .*CHNCXR_0001_0.png"),
    ],
)
def test_wrong_names(tmp_path: Path, name: str, message: str) -> None:
    root = write_tuberculosis(tmp_path / "tb", side=0)
    (root / CHINA / name).touch()
    with pytest.raises(ValueError, match=message) as caught:
        list(open_source("tuberculosis", root))
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CXR_png is missing; --root must be .* both sets, .* \(China has none of"):
        open_source("tuberculosis", tmp_path)
    root = write_tuberculosis(tmp_path / "tb", side=0)
    with pytest.raises(ValueError, match=r"\(split \w+, row .*\) is missing or empty, and with it 34 of 34 images"):
        from_records(open_source("tuberculosis", root), SALT)
    shutil.copytree(root / MONTGOMERY, root / "MontgomerySet/CXR_png")
    with pytest.raises(
        ValueError, match="holds the images of Montgomery twice, in Montgomery/MontgomerySet/CXR_png and"
    ):
        open_source("tuberculosis", root)
    shutil.rmtree(root / "MontgomerySet")
    shutil.rmtree(root / "Montgomery")
    with pytest.raises(ValueError, match=r"Montgomery/MontgomerySet/CXR_png is missing; .*\(Montgomery has none of"):
        open_source("tuberculosis", root)
    (root / MONTGOMERY).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no image; names look like"):
        list(open_source("tuberculosis", root))
