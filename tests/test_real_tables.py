"""The real tables of CheXpert and NIH, which torchxrayvision ships, read by us and by torchxrayvision itself.

Its classes are an independent reading of the same tables. PadChest has a test of its own.
"""

from __future__ import annotations

import csv
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaletransfer import make_shards
from scaletransfer.labels import CHEXPERT_FINDINGS, NO_FINDING, targets
from scaletransfer.sample_table import label_rows
from scaletransfer.sources import Source, open_source

MERGE_VIEWS = ("PA", "AP", "AP Supine", "L", "COSTAL")


def real(folder: Path, shipped: str, official: str) -> Path:
    """A root with one of torchxrayvision's tables under its official name."""
    spec = importlib.util.find_spec("torchxrayvision")
    assert spec is not None and spec.submodule_search_locations, "torchxrayvision is one of the extra dev"
    (folder / official).symlink_to(Path(spec.submodule_search_locations[0]) / "data" / shipped)
    return folder


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real(tmp_path_factory.mktemp("chexpert"), "chexpert_train.csv.gz", "train.csv.gz")


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without lists: the package ships none."""
    name = "Data_Entry_2017_v2020.csv.gz"
    return real(tmp_path_factory.mktemp("nih"), name, name)


@pytest.fixture(scope="module")
def their_nih(nih: Path) -> Any:
    theirs = pytest.importorskip("torchxrayvision").datasets.NIH_Dataset(
        imgpath=str(nih), csvpath=str(nih / "Data_Entry_2017_v2020.csv.gz"), views=["PA", "AP"], unique_patients=False
    )
    return theirs


def read(source: Source) -> tuple[list[Any], np.ndarray[Any, Any]]:
    """Records and their raw labels, one row a record."""
    records = list(source)
    return records, label_rows([r.labels for r in records], source.label_kind, source.label_names)


def test_rows_of_chexpert_by_view(chexpert: Path) -> None:
    start = time.process_time()
    views = [r.view for r in open_source("chexpert", chexpert, views="all")]
    assert time.process_time() - start < 30  # 2 s on one core
    assert len(views) == 223_414
    assert sum(view in ("PA", "AP") for view in views) == 191_010
    assert sum(view in MERGE_VIEWS for view in views) == 223_397


def test_chexpert_against_torchxrayvision(chexpert: Path) -> None:
    """`corrected` agrees in every cell. `paper` does but for Support Devices of images with No Finding = 1: the
    published code makes those 0, while torchxrayvision has mended this since and leaves them as the table says."""
    theirs = pytest.importorskip("torchxrayvision").datasets.CheX_Dataset(
        imgpath="", csvpath=str(chexpert / "train.csv.gz"), views=["PA", "AP", "L"], unique_patients=False
    )
    source = open_source("chexpert", chexpert, views="PA,AP,L")
    records, raw = read(source)
    assert [r.source_id for r in records] == theirs.csv["Path"].tolist()
    assert [r.view for r in records] == theirs.csv["view"].tolist()
    assert [r.patient.removeprefix("patient") for r in records] == theirs.csv["patientid"].tolist()
    assert list(theirs.pathologies) == list(CHEXPERT_FINDINGS)
    corrected, paper = (targets(raw, source.label_names, "chexpert", policy) for policy in ("corrected", "paper"))
    np.testing.assert_array_equal(corrected, theirs.labels)
    np.testing.assert_array_equal(paper[:, :-1], theirs.labels[:, :-1])
    assert CHEXPERT_FINDINGS[-1] == "Support Devices"
    healthy = raw[:, source.label_names.index(NO_FINDING)] == 1
    np.testing.assert_array_equal(paper[~healthy, -1], theirs.labels[~healthy, -1])
    assert (paper[healthy, -1] == 0).all()
    frontal = np.array([r.view != "L" for r in records])
    assert np.count_nonzero(theirs.labels[healthy & frontal, -1] == 1) == 7_420


def test_nih_against_torchxrayvision(nih: Path, their_nih: Any) -> None:
    """Every cell of every policy agrees: no finding's name is part of another's, so that their search for substrings
    finds what the tokens say."""
    source = open_source("nih", nih)
    records, raw = read(source)
    assert len(records) == 112_120 and [r.source_id for r in records] == their_nih.csv["Image Index"].tolist()
    assert [r.view for r in records] == their_nih.csv["view"].tolist()
    assert [r.patient for r in records] == their_nih.csv["patientid"].tolist()
    findings = [name for name in source.label_names if name != NO_FINDING]
    assert findings == list(their_nih.pathologies) == sorted(findings)
    for policy in ("paper", "corrected"):
        np.testing.assert_array_equal(targets(raw, source.label_names, "nih", policy), their_nih.labels)
    columns = [source.label_names.index(name) for name in findings]
    np.testing.assert_array_equal(raw[:, columns], their_nih.labels)
    assert (raw[:, source.label_names.index(NO_FINDING)] == (their_nih.labels.sum(1) == 0)).all()
    frontal = [r.source_id for r in open_source("nih", nih, views="PA")]
    assert frontal == [r.source_id for r in records if r.view == "PA"] and len(frontal) == 67_310


@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_listing_of_nih_with_lists(nih: Path, their_nih: Any, tmp_path: Path, protocol: str) -> None:
    """From the command to the file, with lists made up by patient: the package ships no official ones."""
    name = "Data_Entry_2017_v2020.csv.gz"
    (tmp_path / name).symlink_to(nih / name)
    images, patients = (their_nih.csv[column].astype(str).to_numpy() for column in ("Image Index", "Patient ID"))
    everybody = np.unique(patients)
    tested = np.isin(patients, np.random.default_rng(0).choice(everybody, 2_797, replace=False))
    (tmp_path / "test_list.txt").write_text("\n".join(images[tested]))
    (tmp_path / "train_val_list.txt").write_text("\n".join(images[~tested]))
    (tmp_path / "salt").write_bytes(b"a salt for tests only, 32 bytes.")
    out, start = tmp_path / "list.csv", time.process_time()
    words = ["nih", "--root", str(tmp_path), "--list", str(out), "--salt-file", str(tmp_path / "salt")]
    assert make_shards.main([*words, "--labels", protocol, "--protocol", protocol]) == 0
    assert time.process_time() - start < 30  # 1 s on one core
    with open(out, newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["key", "split", "patient", "view", "image", "source_id", *their_nih.pathologies]
    key, split, patient, view, image, source_id = (np.array(column) for column in list(zip(*rows, strict=True))[:6])
    assert len(set(key)) == len(rows) == 112_120
    assert (source_id == images).all() and (patient == patients).all()
    assert (view == their_nih.csv["view"].to_numpy()).all()
    assert (image == np.char.add("images/", images.astype(str))).all()
    cells = np.frombuffer("".join("".join(row[6:]) for row in rows).encode(), np.uint8).reshape(-1, 14)  # none is empty
    np.testing.assert_array_equal(cells, np.where(their_nih.labels == 1, ord("1"), ord("0")))
    if protocol == "paper":
        assert (split == np.where(tested, "valid", "train")).all()
        return
    assert ((split == "test") == tested).all()
    sets = [set(patient[split == name]) for name in ("train", "valid", "test")]
    assert sum(map(len, sets)) == len(everybody) and len(sets[2]) == 2_797
    # 28,008 draws of 0.1: the standard deviation of the share is 0.0018
    assert abs(len(sets[1]) / (len(everybody) - 2_797) - 0.1) < 0.01
