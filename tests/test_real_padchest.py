"""The real table of PadChest, as torchxrayvision ships it (160,861 rows; no images)."""

from __future__ import annotations

import csv
import time
from ast import literal_eval
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaletransfer import make_shards
from scaletransfer.labels import targets, vocabulary
from scaletransfer.padchest_labels import EXCLUDED_IMAGE_IDS, FINDINGS, findings_of, reviewed
from scaletransfer.sample_table import label_rows
from scaletransfer.sources import Record, open_source

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
FIVE = ["PA", "AP", "AP Supine", "L", "COSTAL"]
TOKENS = tuple(reviewed())


@pytest.fixture(scope="module")
def root() -> Path:
    spec = find_spec("torchxrayvision")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


@pytest.fixture(scope="module")
def table(root: Path) -> pd.DataFrame:
    columns = ["ImageID", "PatientID", "Projection", "Labels", "PatientBirth"]
    frame = pd.read_csv(root / TABLE, usecols=columns, dtype={"PatientID": str}, low_memory=False)
    frame["view"] = frame["Projection"].replace("AP_horizontal", "AP Supine")
    return frame


@pytest.fixture(scope="module")
def paper(root: Path) -> list[Record]:
    """In the published order."""
    return list(open_source("padchest", root, protocol="paper"))


@pytest.fixture(scope="module")
def listed(table: pd.DataFrame, paper: list[Record]) -> list[Record]:
    """The same records in the order of the table."""
    by_id = {record.source_id: record for record in paper}
    return [by_id[name] for name in filtered(table, FIVE)["ImageID"]]


def filtered(table: pd.DataFrame, views: list[str]) -> pd.DataFrame:
    """The published filters, in their order."""
    chosen = table[table["view"].isin(views)]
    chosen = chosen[chosen["Labels"].notnull()]
    return chosen[~chosen["ImageID"].isin(EXCLUDED_IMAGE_IDS)]


def targets_of(records: list[Record], policy: str) -> np.ndarray:
    return targets(label_rows([r.labels for r in records], "tokens", TOKENS), TOKENS, "padchest", policy)


def substrings(table: pd.DataFrame) -> np.ndarray:
    """The published labels of every row, [n, 27]: written out again from the published code's own terms."""
    terms = {name: [name.lower()] for name in FINDINGS}
    terms["Infiltration"] += ["infiltrates", "interstitial pattern", "ground glass pattern", "alveolar pattern"]
    terms["Infiltration"] += ["reticular interstitial pattern", "reticulonodular interstitial pattern"]
    terms["Infiltration"] += ["consolidation", "air bronchogram"]
    terms["Pleural_Thickening"] += ["pleural thickening"]
    terms["Consolidation"] += ["air bronchogram"]
    terms["Hilar Enlargement"] += ["adenopathy", "pulmonary artery enlargement"]
    terms["Support Devices"] += ["device", "pacemaker"]
    # Every different text once; a text repeats about six times.
    codes, texts = pd.factorize(table["Labels"])
    found = pd.Series(texts)
    columns = [
        np.logical_or.reduce([found.str.contains(term, regex=False) for term in terms[name]]) for name in FINDINGS
    ]
    return np.stack(columns, axis=1)[codes]


def test_the_reviewed_table_is_that_of_the_data(table: pd.DataFrame) -> None:
    texts = table["Labels"].dropna().unique()
    assert {token.strip() for text in texts for token in literal_eval(text)} == {*TOKENS, ""}


def test_published_counts_order_and_split(table: pd.DataFrame, paper: list[Record]) -> None:
    rows = filtered(table, FIVE)
    order = np.arange(len(rows))
    np.random.RandomState(42).shuffle(order)
    assert [r.split for r in paper] == ["train"] * 144_638 + ["valid"] * 16_071
    expected = rows[["ImageID", "PatientID", "view"]].to_numpy()[order].tolist()
    assert [[r.source_id, r.patient, r.view] for r in paper] == expected


def test_published_labels_cell_by_cell(table: pd.DataFrame, listed: list[Record]) -> None:
    assert vocabulary("padchest", "paper") == FINDINGS
    np.testing.assert_array_equal(targets_of(listed, "paper"), substrings(filtered(table, FIVE)))


def test_corrected_rows_and_patients(table: pd.DataFrame, root: Path) -> None:
    source = open_source("padchest", root)
    records = list(source)
    # 776 of PROTOCOL's 777 empty lists are left when the 30 files are dropped, which `corrected` does not do.
    assert source.left_out == {
        "nothing but unchanged": 3_705,
        "marked exclude": 1_312,
        "suboptimal study without a finding": 790,
        "labels that are an empty list": 777,
        "no labels (null)": 103,
    }
    empty = table[table["Labels"] == "['']"]
    assert len(empty) == 777 and len(filtered(empty, FIVE)) == 776
    assert len(records) == table["view"].isin(FIVE).sum() - source.left_out.total() == 154_155
    patients = {split: {r.patient for r in records if r.split == split} for split in ("train", "valid")}
    assert not patients["train"] & patients["valid"]
    counts = Counter(r.split for r in records)
    assert 0.09 < counts["valid"] / len(records) < 0.11
    # Suboptimal studies: those that the published labels count as healthy.
    rows = table[table["Labels"].str.contains("suboptimal study", regex=False, na=False)]
    assert (~substrings(rows).any(axis=1)).sum() == 790
    gone = set(table[table["view"].isin(FIVE)]["ImageID"]) - {r.source_id for r in records}
    assert set(rows["ImageID"][~substrings(rows).any(axis=1)]) < gone


def test_what_corrected_changes(listed: list[Record]) -> None:
    """Every difference is that of a token whose two rules differ; sizes are those of the known defects."""
    old, new = (pd.DataFrame(targets_of(listed, policy) > 0, columns=FINDINGS) for policy in ("paper", "corrected"))
    gone, added = (old & ~new).sum(), (new & ~old).sum()
    assert old["Nodule"].sum() == 6_231 and gone["Nodule"] == 2_163
    assert old["Tuberculosis"].sum() == 1_312 and gone["Tuberculosis"] == 1_005
    assert set(gone[gone > 0].index) == {
        *("Aortic Elongation", "Effusion", "Emphysema", "Hilar Enlargement", "Mass", "Nodule", "Tuberculosis")
    }
    assert set(added[added > 0].index) == {"Effusion", "Infiltration", "Pleural_Thickening", "Support Devices"}
    differ = {token for token in TOKENS if findings_of(token, "paper") != findings_of(token, "corrected")}
    changed = (old != new).any(axis=1).to_numpy()
    assert all(differ.intersection(listed[at].labels) for at in np.flatnonzero(changed))


@pytest.mark.slow
def test_pa_and_ap(table: pd.DataFrame, root: Path) -> None:
    rows = filtered(table, ["PA", "AP"])
    listed = list(open_source("padchest", root, protocol="paper", views="PA,AP").listed())
    assert [r.source_id for r in listed] == rows["ImageID"].tolist() and len(listed) == 96_198
    np.testing.assert_array_equal(targets_of(listed, "paper"), substrings(rows))


def test_single_label_subset(table: pd.DataFrame, root: Path, paper: list[Record], listed: list[Record]) -> None:
    source = open_source("padchest", root, protocol="paper", single_label=True)
    records = list(source)
    assert Counter(r.split for r in records) == {"train": 37_387, "valid": 4_153}
    labels = dict(zip((r.source_id for r in listed), substrings(filtered(table, FIVE)), strict=True))
    one = [r for r in paper if labels[r.source_id].sum() == 1]  # split first, then chosen
    assert [(r.source_id, r.split) for r in records] == [(r.source_id, r.split) for r in one]
    assert all(labels[r.source_id][r.labels] for r in records)


@pytest.mark.parametrize("protocol", ["paper", pytest.param("corrected", marks=pytest.mark.slow)])
def test_the_listing_is_quick_and_in_the_order_of_the_table(
    root: Path, tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str], table: pd.DataFrame
) -> None:
    out = tmp_path / "list.csv"
    start = time.perf_counter()
    command = ["padchest", "--root", str(root), "--list", str(out), "--protocol", protocol, "--labels", protocol]
    assert make_shards.main(command) == 0
    assert time.perf_counter() - start < 90  # 5 s on one idle core
    said = capsys.readouterr().err
    assert ("80.3% of the 16,071 validation images" in said) == (protocol == "paper")
    with open(out) as stream:
        header, *rows = csv.reader(stream)
    assert tuple(header[6:]) == FINDINGS
    ids = [cells[5] for cells in rows]
    if protocol == "paper":
        official = filtered(table, FIVE)
        split = np.full(len(official), "valid", object)
        order = np.arange(len(official))
        np.random.RandomState(42).shuffle(order)
        split[order[: int(len(official) * 0.9)]] = "train"
        assert ids == official["ImageID"].tolist() and [cells[1] for cells in rows] == split.tolist()
        np.testing.assert_array_equal(np.array([cells[6:] for cells in rows], np.int8), substrings(official))
    else:
        kept = set(ids)
        assert len(rows) == 154_155 and ids == [name for name in table["ImageID"] if name in kept]
        assert "777 rows, labels that are an empty list" in said


def test_torchxrayvision_agrees(tmp_path: Path, table: pd.DataFrame, listed: list[Record]) -> None:
    """The class of torchxrayvision reads the same table: rows and labels that both have are the same.

    Its rows differ: it keeps patients for whom 2019 - PatientBirth > 10, which a row without a year of birth is not,
    and drops 21 of the 30 files by name.  Its labels follow the same rule; it has one more, "Tube" (texts with
    "stent'").
    """
    xrv = pytest.importorskip("torchxrayvision")
    theirs = xrv.datasets.PC_Dataset(imgpath=str(tmp_path), views=FIVE, unique_patients=False)
    ours = {record.source_id: at for at, record in enumerate(listed)}
    ids = theirs.csv["ImageID"].tolist()
    common = [at for at, name in enumerate(ids) if name in ours]
    # Rows: what only one of the two has is explained, every row of it.
    extra = set(ids) - set(ours)
    assert extra < EXCLUDED_IMAGE_IDS and len(extra) == 9
    lacking = list(set(ours) - set(ids))
    assert lacking and not (2019 - table.set_index("ImageID")["PatientBirth"][lacking] > 10).any()
    assert len(common) + len(lacking) == len(ours)
    # Labels.
    assert set(theirs.pathologies) == {*FINDINGS, "Tube"}
    values = targets_of([listed[ours[ids[at]]] for at in common], "paper")
    columns = [theirs.pathologies.index(name) for name in FINDINGS]
    np.testing.assert_array_equal(theirs.labels[np.ix_(common, columns)], values)
