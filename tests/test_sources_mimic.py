from __future__ import annotations

import csv
import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from official.mimic import STUDY_DATES, write_mimic, write_table

from scaletransfer import make_shards
from scaletransfer.labels import CHEXPERT_RAW, targets
from scaletransfer.sources import open_source, source_options
from scaletransfer.sources.mimic import NO_IMAGE, NO_LABELS, NO_METADATA, NO_SPLIT

MERGE_VIEWS = "PA,AP,AP Supine,L,COSTAL"
STATES = {"1.0": 1, "0.0": 0, "-1.0": -1, "": -2}


def read(root: Path, what: str) -> list[list[str]]:
    """Header and rows of one of the tables."""
    with gzip.open(root / f"mimic-cxr-2.0.0-{what}.csv.gz", "rt", newline="") as stream:
        return list(csv.reader(stream))


def dicts(root: Path, what: str) -> list[dict[str, str]]:
    header, *rows = read(root, what)
    return [dict(zip(header, row, strict=True)) for row in rows]


def change(root: Path, what: str, row: int, column: str, value: str) -> str:
    """Change a cell of the data row `row` (0 is line 2); gives what stood there."""
    rows = read(root, what)
    at = rows[0].index(column)
    before, rows[row + 1][at] = rows[row + 1][at], value
    write_table(root / f"mimic-cxr-2.0.0-{what}.csv.gz", rows[0], rows[1:])
    return before


def drop(root: Path, what: str, row: int) -> list[str]:
    """Take the data row `row` away and give it."""
    rows = read(root, what)
    gone = rows.pop(row + 1)
    write_table(root / f"mimic-cxr-2.0.0-{what}.csv.gz", rows[0], rows[1:])
    return gone


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_mimic(tmp_path_factory.mktemp("mimic"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Without images; a test may change it."""
    return write_mimic(tmp_path / "mimic", pixels=0)


@pytest.mark.parametrize("labeler", ["chexpert", "negbio"])
def test_records_against_the_tables(official: Path, labeler: str) -> None:
    source = open_source("mimic", official, views="all", labeler=labeler)
    records = list(source)
    assert records == list(source) and not source.left_out and not source.notes
    assert source.label_kind == "states" and source.label_names == CHEXPERT_RAW and not source.public
    metadata = dicts(official, "metadata")
    assert [r.source_id for r in records] == [row["dicom_id"] for row in metadata]
    splits = {row["dicom_id"]: row["split"] for row in dicts(official, "split")}
    labels = {row["study_id"]: row for row in dicts(official, labeler)}
    for record, row in zip(records, metadata, strict=True):
        assert record.split == splits[record.source_id].replace("validate", "valid")
        subject, study = row["subject_id"], row["study_id"]
        assert record.patient == subject
        assert record.image == f"files/p{subject[:2]}/p{subject}/s{study}/{record.source_id}.jpg"
        assert (official / record.image).is_file()
        assert isinstance(record.labels, tuple)
        found = dict(zip(source.label_names, record.labels, strict=True))
        assert found.pop("Effusion") == STATES[labels[study]["Pleural Effusion"]]
        assert found == {name: STATES[labels[study][name]] for name in found}
    assert {r.split for r in records} == {"train", "valid", "test"}
    assert source_options("mimic") == ("views", "labeler", "protocol")


def test_labelers_differ(official: Path) -> None:
    labels = [[r.labels for r in open_source("mimic", official, labeler=name)] for name in ("chexpert", "negbio")]
    assert labels[0] != labels[1]


def test_laterals_are_l_under_corrected_and_lost_under_paper(official: Path) -> None:
    counts = Counter(row["ViewPosition"] for row in dicts(official, "metadata"))
    assert min(counts[view] for view in ("PA", "AP", "LATERAL", "LL", "", "AP AXIAL", "LAO")) > 0
    frontal = {"PA": counts["PA"], "AP": counts["AP"]}
    assert Counter(r.view for r in open_source("mimic", official)) == frontal
    corrected = open_source("mimic", official, views=MERGE_VIEWS)
    assert Counter(r.view for r in corrected) == frontal | {"L": counts["LATERAL"] + counts["LL"]}
    paper = open_source("mimic", official, views=MERGE_VIEWS, protocol="paper")
    assert Counter(r.view for r in paper) == frontal
    every = Counter(r.view for r in open_source("mimic", official, views="all", protocol="paper"))
    assert every == counts
    every = Counter(r.view for r in open_source("mimic", official, views="all"))
    assert every[""] == counts[""] and every["LAO"] == counts["LAO"] and every["LATERAL"] == every["LL"] == 0
    with pytest.raises(ValueError, match="called L under corrected"):
        open_source("mimic", official, views="PA,LL")
    assert Counter(r.view for r in open_source("mimic", official, views="LL", protocol="paper")) == {"LL": counts["LL"]}


def test_a_view_that_mimic_does_not_know_is_a_note(root: Path) -> None:
    source = open_source("mimic", root, views="all")
    before = list(source)
    assert not source.notes
    change(root, "metadata", 3, "ViewPosition", "LATERALE")
    source = open_source("mimic", root, views="all")
    assert [r.source_id for r in source] == [r.source_id for r in before]
    (note,) = source.notes
    assert "mimic-cxr-2.0.0-metadata.csv" in note and "'LATERALE'" in note and "did you mean 'LATERAL'" in note


def test_against_torchxrayvision(official: Path) -> None:
    """Their data set is the published reading of the same tables; the order is that of the labels there."""
    theirs = pytest.importorskip("torchxrayvision").datasets.MIMIC_Dataset(
        imgpath="",
        csvpath=str(official / "mimic-cxr-2.0.0-chexpert.csv.gz"),
        metacsvpath=str(official / "mimic-cxr-2.0.0-metadata.csv.gz"),
        views=["PA", "AP", "LATERAL", "LL"],
        unique_patients=False,
    )
    source = open_source("mimic", official, views="PA,AP,L")
    records = {r.source_id: r for r in source}
    assert sorted(records) == sorted(theirs.csv["dicom_id"])
    raw = np.array([records[image].labels for image in theirs.csv["dicom_id"]], np.int8)
    assert list(theirs.pathologies) == [name for name in CHEXPERT_RAW if name != "No Finding"]
    np.testing.assert_array_equal(targets(raw, source.label_names, "mimic", "paper"), theirs.labels)
    assert [records[image].patient for image in theirs.csv["dicom_id"]] == theirs.csv["patientid"].tolist()


def test_what_one_table_lacks_is_left_out_and_counted(root: Path) -> None:
    before = list(open_source("mimic", root, views="all"))
    first, second, third = (before[at].source_id for at in (0, len(before) // 2, len(before) - 1))
    study = before[len(before) // 2].image.split("/")[3][1:]
    gone = {r.source_id for r in before if f"/s{study}/" in r.image}
    assert first not in gone and third not in gone and second in gone
    rows = {what: read(root, what) for what in ("metadata", "split", "chexpert")}
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", rows["split"][0], rows["split"][2:])
    write_table(
        root / "mimic-cxr-2.0.0-chexpert.csv.gz",
        rows["chexpert"][0],
        [row for row in rows["chexpert"][1:] if row[1] != study] + [["10000033", "59999999", *[""] * 14]],
    )
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", rows["metadata"][0], rows["metadata"][1:-1])
    source = open_source("mimic", root, views="all")
    assert list(source) == [r for r in before if r.source_id not in {first, third, *gone}]
    # The last image may have been the only one of its study.
    alone = sum(r.image.split("/")[3] == before[-1].image.split("/")[3] for r in before) == 1
    expected = {NO_SPLIT: 1, NO_LABELS: len(gone), NO_METADATA: 1, NO_IMAGE: 1 + alone}
    assert source.left_out == expected
    assert list(source) and source.left_out == expected  # a second pass counts afresh
    # An image of a view that nobody asked for is not missed.
    view = before[0].view
    other = open_source("mimic", root, views="AP" if view == "PA" else "PA")
    assert list(other) and NO_SPLIT not in other.left_out


BAD_CELLS = [
    ("chexpert", "Edema", "2.0", r"chexpert\.csv\.gz, line 4, column 'Edema': '2\.0' is no label"),
    ("chexpert", "No Finding", "nan", r"chexpert\.csv\.gz, line 4, column 'No Finding': 'nan'"),
    ("chexpert", "study_id", "s50414267", r"chexpert\.csv\.gz, line 4, column 'study_id': 's50414267' is no number"),
    (
        "chexpert",
        "subject_id",
        "99",
        r"metadata\.csv\.gz, line \d+: study \d+ is of subject \d+, .* line 4, of subject 99",
    ),
    ("split", "split", "val", r"split\.csv\.gz, line 4, column 'split': 'val' is none of train, validate, test"),
    ("split", "study_id", "99", r"metadata\.csv\.gz, line 4: .*split\.csv\.gz, line 4, of subject \d+ and study 99"),
    ("split", "dicom_id", "../x", r"split\.csv\.gz, line 4, column 'dicom_id': '\.\./x' is no identifier"),
    ("metadata", "study_id", "99", r"metadata\.csv\.gz, line 4: .* study 99, but in .*split\.csv\.gz, line 4"),
    ("metadata", "subject_id", "10000033.0", r"metadata\.csv\.gz, line 4, column 'subject_id': '10000033\.0' is no"),
    ("metadata", "dicom_id", "a/b", r"metadata\.csv\.gz, line 4, column 'dicom_id': 'a/b' is no identifier"),
]


@pytest.mark.parametrize("what, column, value, words", BAD_CELLS)
def test_bad_cells_name_file_and_line(root: Path, what: str, column: str, value: str, words: str) -> None:
    change(root, what, 2, column, value)
    with pytest.raises(ValueError, match=words):
        list(open_source("mimic", root))


@pytest.mark.parametrize("what, column", [("metadata", "dicom_id"), ("split", "dicom_id"), ("chexpert", "study_id")])
def test_duplicates_name_both_lines(root: Path, what: str, column: str) -> None:
    first = dicts(root, what)[0][column]
    change(root, what, 3, column, first)
    with pytest.raises(ValueError, match=rf"{what}\.csv\.gz, line 5: the {column} {first} is already in line 2"):
        list(open_source("mimic", root))


def test_patients_in_two_splits_are_counted(root: Path) -> None:
    rows = dicts(root, "split")
    subjects = Counter(row["subject_id"] for row in rows if row["split"] == "train")
    subject, images = subjects.most_common(1)[0]
    assert images > 1
    line = max(number for number, row in enumerate(rows) if row["subject_id"] == subject)
    change(root, "split", line, "split", "test")
    words = rf"1 of 20 patients of .*split\.csv\.gz are in two splits \(the first is {subject}, in train and test\)"
    with pytest.raises(ValueError, match=words):
        list(open_source("mimic", root))


@pytest.mark.parametrize("what", ["metadata", "split", "chexpert", "negbio"])
def test_missing_tables_and_columns_are_named(root: Path, what: str) -> None:
    path = root / f"mimic-cxr-2.0.0-{what}.csv.gz"
    labeler = "negbio" if what == "negbio" else "chexpert"
    for at, column in enumerate(read(root, what)[0]):
        if what != "metadata" or column in ("dicom_id", "subject_id", "study_id", "ViewPosition"):
            header, *rows = (row[:at] + row[at + 1 :] for row in read(root, what))
            kept = path.read_bytes()
            write_table(path, header, rows)
            with pytest.raises(ValueError, match=rf"{what}\.csv\.gz lacks the column '{column}'"):
                open_source("mimic", root, labeler=labeler)
            path.write_bytes(kept)
    (root / f"mimic-cxr-2.0.0-{what}.csv").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    assert list(open_source("mimic", root, labeler=labeler))
    (root / f"mimic-cxr-2.0.0-{what}.csv").unlink()
    with pytest.raises(ValueError, match=rf"mimic-cxr-2\.0\.0-{what}\.csv\.gz is missing"):
        open_source("mimic", root, labeler=labeler)
    if what in ("chexpert", "negbio"):  # nobody needs the other labeler's table
        assert list(open_source("mimic", root, labeler="chexpert" if what == "negbio" else "negbio"))


def test_options(root: Path) -> None:
    for options, words in (
        (
            {"labeler": "chexbert"},
            r"labeler is 'chexbert'; it must be chexpert or negbio \(did you mean 'chexpert'\?\)",
        ),
        ({"protocol": "papr"}, "protocol is 'papr'"),
        ({"views": "LATERAL"}, "no view 'LATERAL'"),
        ({"labeller": "negbio"}, "no option 'labeller'"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source("mimic", root, **options)
    with pytest.raises(ValueError, match=r"metadata\.csv\.gz has no training image with the views COSTAL"):
        list(open_source("mimic", root, views="COSTAL"))


def test_shards_hold_no_identifier_and_no_date(official: Path, tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(b"a salt for tests only, 32 bytes.")
    words = ["mimic", "--root", str(official), "--out", str(tmp_path / "out"), "--salt-file", str(tmp_path / "salt")]
    assert make_shards.main([*words, "--views", "all"]) == 0
    rows = dicts(official, "metadata")
    secrets = {row[column].encode() for row in rows for column in ("dicom_id", "subject_id", "study_id", "StudyTime")}
    secrets |= {date.encode() for date in STUDY_DATES}
    written = list((tmp_path / "out").rglob("*"))
    assert any(path.suffix == ".tar" for path in written) and len(secrets) > 80
    for path in written:
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in secrets if secret in data], path


def test_dicom_files_beside_the_tables(official: Path, tmp_path: Path) -> None:
    root = write_mimic(tmp_path / "dicom", pixels=0)
    source = open_source("mimic", root)
    records = list(source)
    dicom = root / records[0].image.replace(".jpg", ".dcm")
    dicom.parent.mkdir(parents=True)
    dicom.touch()
    located = source.locate(records)
    assert located[0].image == records[0].image.replace(".jpg", ".dcm") and located[1:] == records[1:]
    source = open_source("mimic", official)
    assert source.locate(list(source)) == list(source)
