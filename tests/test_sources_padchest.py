from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.padchest import HEADER, TABLE, row, write_padchest, write_table

from scaletransfer import make_shards
from scaletransfer.index import from_records, load_index
from scaletransfer.padchest_labels import EXCLUDED_IMAGE_IDS, FINDINGS, reviewed
from scaletransfer.sources import open_source, source_options
from scaletransfer.sources.padchest import paper_split

FIVE = {"PA", "AP", "AP Supine", "L", "COSTAL"}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_padchest(tmp_path_factory.mktemp("padchest"))


def table_rows(root: Path) -> list[dict[str, str]]:
    with gzip.open(root / f"{TABLE}.gz", "rt", newline="") as stream:
        return list(csv.DictReader(stream))


def written(root: Path, *cells: str, **changes: str) -> Path:
    """A folder with a table of one row a Labels cell, P0 and so on; `changes` go to the last row."""
    rows = [row(at, f"1000{at}", "0", f"P{at}", "PA", cell, image=f"{at}.png") for at, cell in enumerate(cells)]
    rows[-1].update(changes)
    write_table(root, rows)
    return root


def test_records_in_the_order_of_the_table(official: Path) -> None:
    source = open_source("padchest", official)
    records = list(source)
    assert records == list(source) == list(source.listed())
    assert (source.task, source.label_kind, source.public) == ("multilabel", "tokens", False)
    assert source.label_names == tuple(reviewed()) and len(source.label_names) == 193
    by_id = {entry["ImageID"]: entry for entry in table_rows(official)}
    assert [r.source_id for r in records] == [name for name in by_id if name in {r.source_id for r in records}]
    for record in records:
        entry = by_id[record.source_id]
        assert record.patient == entry["PatientID"] and record.image == f"{entry['ImageDir']}/{entry['ImageID']}"
        assert record.view == entry["Projection"].replace("AP_horizontal", "AP Supine")
        words = [word.strip(" '") for word in entry["Labels"].strip("[]").split(",")]
        assert record.labels == tuple(word for word in words if word)  # order and repetitions kept, '' dropped
    assert {record.view for record in records} == FIVE


def test_rows_that_say_nothing_are_left_out_and_counted(official: Path) -> None:
    source = open_source("padchest", official)
    records = list(source)
    assert source.left_out == {
        "nothing but unchanged": 2,
        "marked exclude": 1,
        "suboptimal study without a finding": 1,
        "labels that are an empty list": 1,
        "no labels (null)": 1,
    }
    usable = [entry for entry in table_rows(official) if entry["Projection"] not in ("EXCLUDE", "UNK")]
    assert len(records) + source.left_out.total() == len(usable)
    assert len(list(source)) == len(records) and source.left_out.total() == 6  # counted anew in every pass


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("['unchanged', 'unchanged', '']", "nothing but unchanged"),
        ("['cardiomegaly', ' exclude']", "marked exclude"),
        ("['suboptimal study', 'kyphosis']", "suboptimal study without a finding"),
        ("[]", "labels that are an empty list"),
        ("['', ' ']", "labels that are an empty list"),
        ("", "no labels (null)"),
        ("nan", "no labels (null)"),
        ("['suboptimal study', 'cardiomegaly']", ""),
        ("['unchanged', 'kyphosis']", ""),
        ("['normal']", ""),
    ],
)
def test_what_says_nothing(tmp_path: Path, cell: str, reason: str) -> None:
    source = open_source("padchest", written(tmp_path, "['normal']", cell), valid_share=0)
    assert len(list(source)) == (1 if reason else 2)
    assert source.left_out == (Counter({reason: 1}) if reason else Counter())
    paper = open_source("padchest", written(tmp_path, *["['normal']"] * 3, cell), protocol="paper")
    assert len(list(paper)) == (3 if "null" in reason else 4)


def test_views(official: Path) -> None:
    counts = {
        views: Counter(r.view for r in open_source("padchest", official, views=views))
        for views in ("PA,AP", "all", "AP Supine")
    }
    assert set(counts["PA,AP"]) == {"PA", "AP"} and set(counts["AP Supine"]) == {"AP Supine"}
    assert set(counts["all"]) == FIVE | {"EXCLUDE", "UNK"}
    source = open_source("padchest", official, views="AP Supine")
    list(source)
    assert source.left_out == {"marked exclude": 1}  # the other silent rows are of other views
    with pytest.raises(ValueError, match=r"no view 'AP_horizontal'"):
        open_source("padchest", official, views="AP_horizontal")


def test_corrected_splits_by_patient(official: Path) -> None:
    splits = {split: set() for split in ("train", "valid")}
    for record in open_source("padchest", official, valid_share=0.3):
        splits[record.split].add(record.patient)
    assert splits["train"] and splits["valid"] and not splits["train"] & splits["valid"]
    more = {r.patient for r in open_source("padchest", official, valid_share=0.6) if r.split == "valid"}
    assert splits["valid"] < more
    other = {r.patient for r in open_source("padchest", official, valid_share=0.3, seed=1) if r.split == "valid"}
    assert other != splits["valid"]
    assert all(r.split == "train" for r in open_source("padchest", official, valid_share=0))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_other_rows_do_not_move_a_patient(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.integers(0, 10**6).map(str), min_size=4, max_size=30, unique=True))
    part = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    found = []
    for chosen in (names, part):
        rows = [row(at, "1", "0", name, "PA", "['normal']", image=f"{name}.png") for at, name in enumerate(chosen)]
        root = tmp_path_factory.mktemp("set")
        write_table(root, [*rows, row(0, "1", "0", "of the training split", "PA", "['normal']", image="x.png")])
        found.append({r.patient: r.split for r in open_source("padchest", root, valid_share=0.4)})
    assert found[1].items() <= found[0].items()


def test_paper_keeps_the_published_order(official: Path) -> None:
    source = open_source("padchest", official, protocol="paper")
    records, listed = list(source), list(source.listed())
    ids = [
        entry["ImageID"]
        for entry in table_rows(official)
        if entry["Projection"] not in ("EXCLUDE", "UNK") and entry["Labels"] != "nan"
    ]
    assert [r.source_id for r in listed] == ids
    shuffled = np.array(ids)
    np.random.RandomState(42).shuffle(shuffled)
    assert [r.source_id for r in records] == shuffled.tolist()
    assert [r.split for r in records] == ["train"] * (n := int(0.9 * len(ids))) + ["valid"] * (len(ids) - n)
    assert sorted(records, key=lambda r: r.source_id) == sorted(listed, key=lambda r: r.source_id)
    train = {r.patient for r in records if r.split == "train"}
    shared = np.mean([r.patient in train for r in records if r.split == "valid"])
    [note] = source.notes
    assert 0 < shared < 1 and f"{shared:.1%}" in note and "--protocol corrected" in note
    assert source.left_out == {"no labels (null)": 1}


@given(st.integers(0, 300))
def test_paper_split_is_a_permutation(rows: int) -> None:
    order, train = paper_split(rows)
    assert sorted(order) == list(range(rows)) and train == int(rows * 0.9)


def test_paper_drops_the_published_files(tmp_path: Path) -> None:
    cells = ["['normal']"] * 4
    dropped = min(EXCLUDED_IMAGE_IDS)
    root = written(tmp_path, *cells, ImageID=dropped)
    paper, corrected = (open_source("padchest", root, protocol=p) for p in ("paper", "corrected"))
    assert len(list(paper)) == 3 and paper.left_out == {"images that the published protocol drops by name": 1}
    assert dropped in {record.source_id for record in corrected} and not corrected.left_out


def test_single_label(tmp_path: Path) -> None:
    cells = (
        "['normal']",
        "['pseudonodule']",
        "['hydropneumothorax']",
        "['nodule', 'nodule', 'kyphosis']",
        "['nodule', 'scoliosis']",
        "['consolidation']",
        "['tuberculosis sequelae', 'scoliosis']",
        "['endotracheal tube']",
    )
    root = written(tmp_path, *cells)
    shown = {
        "corrected": {"3.png": "Nodule", "6.png": "Scoliosis", "7.png": "Support Devices"},
        "paper": {"1.png": "Nodule", "2.png": "Pneumothorax", "3.png": "Nodule"},
    }
    for protocol, expected in shown.items():
        source = open_source("padchest", root, protocol=protocol, single_label=True)
        records = list(source)
        assert (source.task, source.label_kind, source.label_names) == ("multiclass", "classes", FINDINGS)
        assert {r.source_id: FINDINGS[r.labels] for r in records} == expected
        assert source.left_out == {"no finding (single_label)": 2, "more than one finding (single_label)": 3}


def test_single_label_is_chosen_after_the_split(official: Path) -> None:
    both = {r.source_id: r for r in open_source("padchest", official, protocol="paper")}
    single = list(open_source("padchest", official, protocol="paper", single_label=True))
    assert 0 < len(single) < len(both) and {r.split for r in single} == {"train", "valid"}
    assert all(both[r.source_id].split == r.split for r in single)
    place = {name: at for at, name in enumerate(both)}
    assert [place[r.source_id] for r in single] == sorted(place[r.source_id] for r in single)


@pytest.mark.parametrize("place", ["dirs", "images", ".", "zips"])
def test_images_are_found_where_they_lie(tmp_path: Path, place: str) -> None:
    source = open_source("padchest", write_padchest(tmp_path, patients=8, place=place))
    plain = list(source)
    records = source.locate(plain)
    for before, record in zip(plain, records, strict=True):
        folder, name = before.image.split("/")
        expected = {"dirs": before.image, "images": f"images/{name}", ".": name, "zips": f"{folder}.zip//{name}"}
        assert record.image == expected[place] and record.source_id == name
    index = from_records(source, b"s" * 32)
    assert index.image.bit_depth == 16 and index.image.channels == 1
    assert sum(info.samples for info in index.splits.values()) == len(records)


def test_an_image_that_is_missing_or_dicom(tmp_path: Path) -> None:
    source = open_source("padchest", write_padchest(tmp_path, patients=4))
    first, second, *_ = records = list(source)
    (tmp_path / first.image).rename((tmp_path / first.image).with_suffix(".dcm"))
    (tmp_path / second.image).unlink()
    found = source.locate(records)
    assert found[0].image == first.image.replace(".png", ".dcm") and found[1:] == records[1:]


def test_listing(official: Path, tmp_path: Path) -> None:
    command = ["padchest", "--root", str(official), "--list", str(tmp_path / "list.csv")]
    source = open_source("padchest", official, protocol="paper")
    listed = list(source.listed())
    for labels in ("raw", "paper", "corrected"):
        assert make_shards.main([*command, "--protocol", "paper", "--labels", labels]) == 0
        with open(tmp_path / "list.csv") as stream:
            rows = list(csv.DictReader(stream))
        assert [entry["source_id"] for entry in rows] == [record.source_id for record in listed]
        assert [entry["split"] for entry in rows] == [record.split for record in listed]
        if labels == "raw":
            assert [entry["tokens"] for entry in rows] == ["|".join(record.labels) for record in listed]
        else:
            assert tuple(rows[0])[6:] == FINDINGS
            assert {entry[name] for entry in rows for name in FINDINGS} == {"0", "1"}


def test_shards(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_shards.main(["padchest", "--root", str(official), "--out", "all", "--option", "valid_share=0.2"]) == 0
    index = load_index(Path("all"))
    source = open_source("padchest", official, valid_share=0.2)
    records = list(source)
    assert index.label_kind == "tokens" and index.label_names == source.label_names
    assert {split: info.samples for split, info in index.splits.items()} == Counter(r.split for r in records)
    assert index.left_out == source.left_out
    shown = sum(info.totals["scoliosis"]["positive"] for info in index.splits.values())
    assert shown == sum("scoliosis" in record.labels for record in records)
    single = ["padchest", "--root", str(official), "--out", "single", "--option", "single_label=true"]
    assert make_shards.main(single) == 0
    index = load_index(Path("single"))
    assert index.task == "multiclass" and index.label_names == FINDINGS
    assert json.loads(Path("single/index.json").read_text())["options"]["single_label"] is True


# A cell in each form that Python writes: single or double quotes, blanks before tokens.
cells = st.lists(
    st.tuples(st.sampled_from((*reviewed(), "")), st.sampled_from(("", " ", "  ")), st.sampled_from("'\"")), max_size=6
)


@settings(deadline=None, max_examples=50)
@given(st.lists(cells, min_size=1, max_size=8))
def test_cells_give_their_tokens(tmp_path_factory: pytest.TempPathFactory, drawn: list) -> None:
    texts = ["[" + ", ".join(f"{q}{gap}{token}{q}" for token, gap, q in cell) + "]" for cell in drawn]
    root = written(tmp_path_factory.mktemp("set"), *texts, "['normal']")
    source = open_source("padchest", root, valid_share=0)
    kept = {record.source_id: record.labels for record in source}
    for at, cell in enumerate(drawn):
        tokens = tuple(token for token, _, _ in cell if token)
        assert kept.get(f"{at}.png", tokens) == tokens


BAD_CELLS = (
    "['nodule'",
    "nodule",
    "['nodule', 1]",
    "[['nodule']]",
    "['nodule' 'scoliosis']",
    "['no\\x64ule']",
    "[__import__('os').system('touch hacked')]",
    "[" * 20000 + "]" * 20000,
    "['" + "\x00" + "']",
    "NaN",
)


@pytest.mark.parametrize("cell", BAD_CELLS, ids=lambda cell: cell[:20].replace("\x00", "NUL"))
def test_what_is_no_list_of_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    monkeypatch.chdir(tmp_path)
    root = written(tmp_path, "['normal']", cell)
    message = rf"{TABLE}, line 3, column 'Labels': .* is no list of labels such as .*; mend the cell"
    with pytest.raises(ValueError, match=message):
        list(open_source("padchest", root))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Labels": "['noduel']"},
            r"line 4, column 'Labels': there is the token 'noduel'.*did you mean 'nodule'.*mend",
        ),
        ({"ImageID": "0.png"}, r"line 4: the ImageID 0\.png is already in line 2; remove one of them"),
        ({"ImageID": "../0.png"}, r"line 4: the ImageID '\.\./0\.png' is no plain name"),
        ({"ImageID": "a/0.png"}, "line 4: the ImageID"),
        ({"ImageID": ""}, "line 4: the ImageID"),
        ({"ImageID": "a\nb.png"}, "line 5: the ImageID"),  # the cell has a line break, so its row ends in line 5
        ({"ImageDir": ".."}, "line 4: the ImageDir '..' is no plain name"),
        ({"ImageDir": "/tmp"}, "line 4: the ImageDir"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    root = written(tmp_path, *["['normal']"] * 3, **changes)
    for protocol in ("corrected", "paper"):
        with pytest.raises(ValueError, match=message):
            list(open_source("padchest", root, protocol=protocol))


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    root = written(tmp_path, "['normal']")
    table = root / TABLE
    text = table.read_text()
    table.write_text(text.replace(",Labels,", ",Label,"))
    with pytest.raises(ValueError, match=r"lacks the column 'Labels' \(did you mean 'Label'\?\)"):
        open_source("padchest", root)
    table.write_text(text.replace(",StudyID,", ",Labels,"))
    with pytest.raises(ValueError, match="has twice the column 'Labels'"):
        open_source("padchest", root)
    table.write_text(text.replace("Physician,", ""))
    with pytest.raises(ValueError, match=f"line 2: the row has {len(HEADER) - 1} cells, the header {len(HEADER)}"):
        list(open_source("padchest", root))


def test_images_without_a_patient_are_their_own_groups(tmp_path: Path) -> None:
    rows = [row(at, "1", "0", "nan" if at % 2 else "", "PA", "['normal']", image=f"{at}.png") for at in range(60)]
    write_table(tmp_path, rows)
    source = open_source("padchest", tmp_path, valid_share=0.5)
    records = list(source)
    assert {r.patient for r in records} == {""} and {r.split for r in records} == {"train", "valid"}
    assert any("60 images" in note and "no PatientID" in note for note in source.notes)
    paper = open_source("padchest", tmp_path, protocol="paper")
    list(paper)
    assert not any("published split" in note for note in paper.notes)  # nobody knows


def test_an_unknown_projection_is_told(tmp_path: Path) -> None:
    root = written(tmp_path, *["['normal']"] * 3, Projection="AP_horizontl")
    source = open_source("padchest", root, valid_share=0)
    assert len(list(source)) == 2
    [note] = source.notes
    assert "line 4" in note and "'AP_horizontl'" in note and "did you mean 'AP_horizontal'" in note


def test_nothing_to_train_on(tmp_path: Path, official: Path) -> None:
    root = written(tmp_path, "['normal']", "['exclude']")
    for options in ({"views": "L"}, {"views": "PA", "valid_share": 0.9999999}):
        with pytest.raises(ValueError, match="no training row with the views"):
            list(open_source("padchest", root, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "papr"}, r"protocol is 'papr'.*did you mean 'paper'"),
        ({"single_label": "yes"}, "single_label is 'yes'"),
        ({"valid_share": 1.0}, "valid_share must be a number from 0 to below 1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"protocol": "paper", "valid_share": 0.2}, "no meaning under the protocol paper"),
        ({"protocol": "paper", "seed": 1}, "no meaning under the protocol paper"),
        ({"view": "PA"}, "did you mean 'views'"),
    ],
)
def test_bad_options_are_refused(official: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source("padchest", official, **options)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{TABLE} is missing; --root must be"):
        open_source("padchest", tmp_path)
    assert source_options("padchest") == ("views", "protocol", "valid_share", "seed", "single_label")


def test_plain_and_compressed_tables_say_the_same(tmp_path: Path) -> None:
    first, second = (
        list(open_source("padchest", write_padchest(tmp_path / str(zipped), pixels=0, compressed=zipped)))
        for zipped in (True, False)
    )
    assert first == second
