from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest

from scaletransfer.labels import CHEXPERT_COLUMNS, CHEXPERT_RAW
from scaletransfer.sources import SOURCES, open_source, source_options

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_COLUMNS]


def row(
    patient: int = 1,
    *,
    path: str = "",
    side: str = "Frontal",
    view: str = "PA",
    folder: str = "CheXpert-v1.0",
    split: str = "train",
    **cells: str,
) -> list[str]:
    path = path or f"{folder}/{split}/patient{patient:05d}/study1/view1_frontal.jpg"
    labels = [cells.get(column.replace(" ", "_"), "") for column in CHEXPERT_COLUMNS]
    return [path, "Female", "61", side, view, *labels]


def write(table: Path, *rows: list[str], header: list[str] = HEADER) -> Path:
    table.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    data = text.getvalue().encode()
    table.write_bytes(gzip.compress(data) if table.suffix == ".gz" else data)
    return table.parent


def test_records_in_the_order_of_the_tables(tmp_path: Path) -> None:
    cells = {"No_Finding": "1.0", "Pleural_Effusion": "-1.0", "Edema": "0.0", "Support_Devices": "1"}
    write(tmp_path / "train.csv", row(7, **cells), row(3, side="Lateral", view=""), row(5, view="AP"))
    write(tmp_path / "valid.csv", row(9, split="valid"))
    source = open_source("chexpert", tmp_path, views="all")
    assert source.label_names == CHEXPERT_RAW and source.task == "multilabel" and not source.public
    records = list(source)
    assert records == list(source)
    assert [(r.patient, r.view, r.split) for r in records] == [
        ("patient00007", "PA", "train"),
        ("patient00003", "L", "train"),
        ("patient00005", "AP", "train"),
        ("patient00009", "PA", "valid"),
    ]
    assert records[0].source_id == "CheXpert-v1.0/train/patient00007/study1/view1_frontal.jpg"
    assert records[0].image == "train/patient00007/study1/view1_frontal.jpg"
    assert isinstance(records[0].labels, tuple)
    found = dict(zip(CHEXPERT_RAW, records[0].labels, strict=True))
    expected = dict.fromkeys(CHEXPERT_RAW, -2) | {
        "No Finding": 1,
        "Effusion": -1,
        "Edema": 0,
        "Support Devices": 1,
    }
    assert found == expected


@pytest.mark.parametrize("folder", ["CheXpert-v1.0", "CheXpert-v1.0-small"])
def test_the_root_may_be_the_parent(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "train.csv.gz", row(1, folder=folder))
    (inside,) = open_source("chexpert", tmp_path / folder)
    (above,) = open_source("chexpert", tmp_path)
    assert inside.image == "train/patient00001/study1/view1_frontal.jpg"
    assert above.image == f"{folder}/{inside.image}" and above.source_id == inside.source_id
    renamed = (tmp_path / folder).rename(tmp_path / "data")
    (elsewhere,) = open_source("chexpert", renamed)
    assert elsewhere == inside


def test_two_data_sets_under_one_root_are_ambiguous(tmp_path: Path) -> None:
    for folder in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        write(tmp_path / folder / "train.csv", row())
    with pytest.raises(ValueError, match="both"):
        open_source("chexpert", tmp_path)


def test_a_missing_training_table_is_named(tmp_path: Path) -> None:
    write(tmp_path / "valid.csv", row())
    with pytest.raises(ValueError, match=r"train\.csv is missing"):
        open_source("chexpert", tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        open_source("chexpert", tmp_path / "nowhere")


@pytest.mark.parametrize("column", ["Path", "Frontal/Lateral", "AP/PA", "No Finding", "Edema"])
@pytest.mark.parametrize("table", ["train.csv", "valid.csv"])
def test_a_missing_column_is_named(tmp_path: Path, column: str, table: str) -> None:
    write(tmp_path / "train.csv", row(1))
    write(tmp_path / "valid.csv", row(2))
    at = HEADER.index(column)
    cut = [cells[:at] + cells[at + 1 :] for cells in (HEADER, row(1))]
    write(tmp_path / table, cut[1], header=cut[0])
    with pytest.raises(ValueError, match=f"{table} lacks the column '{column}'"):
        open_source("chexpert", tmp_path)


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    cells = row(1, Edema="1.0", Fracture="0.0")
    order = np.random.default_rng(0).permutation(len(HEADER))
    write(tmp_path / "a/train.csv", cells)
    write(tmp_path / "b/train.csv", [cells[i] for i in order], header=[HEADER[i] for i in order])
    assert list(open_source("chexpert", tmp_path / "a")) == list(open_source("chexpert", tmp_path / "b"))


BAD_ROWS = [
    (row(2, Edema="0.5"), r"line 3, column 'Edema': '0.5'"),
    (row(2, Edema="nan"), r"line 3, column 'Edema'"),
    (row(2, Edema="2"), r"line 3, column 'Edema'"),
    (row(2)[:-1], "line 3: the row has 18 cells"),
    (row(2, side="frontal"), "line 3, column 'Frontal/Lateral': 'frontal'"),
    (row(1), "already in train.csv, line 2"),
    (row(path="CheXpert-v1.0/train/nobody/study1/a.jpg"), "line 3.*has no patient"),
    (row(path="CheXpert-v1.0/train/xpatient00001/study1/a.jpg"), "has no patient"),
    (row(path="CheXpert-v1.0/../patient00002/a.jpg"), "leaves"),
    (row(path="CheXpert-v1.0/train/patient00002/../../../a.jpg"), "leaves"),
    (row(path="/etc/patient00002/a.jpg"), "leaves"),
    (row(path="CheXpert-v1.0\\train\\patient00002\\a.jpg"), "leaves"),
    (row(path="CheXpert-v1.0/train/patient00002//a.jpg"), "plain path"),
    (row(path="CheXpert-v1.0/train/patient00002/a\n.jpg"), "plain path"),
    (row(path="CheXpert-v1.0/train/patient00002/"), "plain path"),
    (row(path="train/study/extra/patient00002/a.jpg"), "plain path"),
]


@pytest.mark.parametrize("bad, words", BAD_ROWS)
def test_bad_rows_name_file_and_line(tmp_path: Path, bad: list[str], words: str) -> None:
    write(tmp_path / "train.csv", row(1), bad)
    with pytest.raises(ValueError, match=words) as error:
        list(open_source("chexpert", tmp_path))
    assert "train.csv, line " in str(error.value)


def test_bad_rows_of_other_views_count_as_well(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", row(1), row(2, side="Lateral", view="", Edema="x"))
    with pytest.raises(ValueError, match="'Edema'"):
        list(open_source("chexpert", tmp_path, views="PA"))


def test_duplicates_and_patients_across_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", row(1), row(2), row(3))
    write(tmp_path / "valid.csv", row(2, split="valid"), row(4, split="valid"))
    with pytest.raises(ValueError, match=r"1 of 2 patients .* \(the first is patient00002\)"):
        list(open_source("chexpert", tmp_path))
    write(tmp_path / "valid.csv", row(3))
    with pytest.raises(ValueError, match=r"valid\.csv, line 2: .* already in train\.csv, line 4"):
        list(open_source("chexpert", tmp_path))


def test_unreadable_tables(tmp_path: Path) -> None:
    whole = gzip.compress(b"Path\n" * 100_000)
    for content in (b"not gzip", whole[: len(whole) // 2]):
        (tmp_path / "train.csv.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train\.csv\.gz"):
            open_source("chexpert", tmp_path)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00Path")
    with pytest.raises(ValueError, match="not a readable table"):
        open_source("chexpert", tmp_path)
    (tmp_path / "train.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="lacks the column 'Path'"):
        open_source("chexpert", tmp_path)


def test_a_byte_order_mark_and_empty_lines_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", row(1))
    text = (tmp_path / "train.csv").read_bytes()
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\r\n", b"\n\n"))
    assert len(list(open_source("chexpert", tmp_path))) == 1


def test_a_view_that_there_is_not(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", row(1), row(2, view="PQ"))
    with pytest.raises(ValueError, match=r"train\.csv, line 3, column 'AP/PA': there is no view 'PQ'"):
        list(open_source("chexpert", tmp_path))


def test_views_and_options(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", row(1), row(2, view="LL"), row(3, view="AP"))
    assert [r.view for r in open_source("chexpert", tmp_path)] == ["PA", "AP"]
    assert [r.view for r in open_source("chexpert", tmp_path, views=["LL", "PA"])] == ["PA", "LL"]
    assert len(list(open_source("chexpert", tmp_path, views="all"))) == 3
    with pytest.raises(ValueError, match="no row with the views L;"):
        list(open_source("chexpert", tmp_path, views="L"))
    for views, words in (
        ("PA,AQ", "no view 'AQ'"),
        ("", "all|empty"),
        (",", "empty"),
        ("all,PA", "no view 'all'"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source("chexpert", tmp_path, views=views)
    with pytest.raises(ValueError, match=r"no option 'view' \(did you mean 'views'\?\)"):
        open_source("chexpert", tmp_path, view="PA")
    with pytest.raises(ValueError, match="did you mean 'chexpert'"):
        open_source("chexprt", tmp_path)
    assert source_options("chexpert") == ("views",) and "chexpert" in SOURCES
