from __future__ import annotations

import csv
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.nih import HEADER, write_nih
from PIL import Image

from scaletransfer import make_shards
from scaletransfer.labels import vocabulary
from scaletransfer.listing import write_listing
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import Record, open_source, source_options

TABLE = "Data_Entry_2017_v2020.csv"
SALT = b"a salt for tests only, 32 bytes."


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_nih(tmp_path_factory.mktemp("nih"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Small, without images; a test may change it."""
    return write_nih(tmp_path / "nih", patients=16, test_patients=3, pixels=0)


def rows_of(root: Path) -> list[dict[str, str]]:
    with open(root / TABLE, newline="") as stream:
        return list(csv.DictReader(stream))


def change(root: Path, row: int, column: str, value: str) -> str:
    """Change a cell of the data row `row` (0 is line 2); gives the row's Image Index."""
    with open(root / TABLE, newline="") as stream:
        rows = list(csv.reader(stream))
    rows[row + 1][HEADER.index(column)] = value
    with open(root / TABLE, "w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
    return rows[row + 1][0]


def test_records_in_the_order_of_the_table(official: Path) -> None:
    rows = rows_of(official)
    source = open_source("nih", official, views="all")
    records = list(source)
    assert records == list(source) == list(source.listed())
    assert source.label_kind == "tokens" and source.task == "multilabel" and not source.public
    assert not source.left_out and not source.notes
    assert [r.source_id for r in records] == [row["Image Index"] for row in rows]
    assert [r.patient for r in records] == [row["Patient ID"] for row in rows]
    assert [r.view for r in records] == [row["View Position"] for row in rows]
    assert ["|".join(map(str, r.labels)) for r in records if isinstance(r.labels, tuple)] == [
        row["Finding Labels"] for row in rows
    ]
    assert {r.view for r in open_source("nih", official)} == {"PA", "AP"}
    frontal = [r for r in records if r.view == "PA"]
    assert list(open_source("nih", official, views="PA")) == frontal and 0 < len(frontal) < len(records)
    assert source_options("nih") == ("views", "protocol", "valid_share", "seed")


def test_the_findings_are_fourteen_in_alphabetical_order(official: Path) -> None:
    source = open_source("nih", official)
    findings = vocabulary("nih", "corrected", source.label_names)
    assert len(findings) == 14 and list(findings) == sorted(findings) == list(vocabulary("nih", "paper", findings))
    assert set(source.label_names) == {*findings, "No Finding"} and len(source.label_names) == 15


@pytest.mark.parametrize("labels", ["raw", "paper", "corrected"])
def test_the_listing_against_the_table(official: Path, tmp_path: Path, labels: str) -> None:
    source = open_source("nih", official)
    counts = write_listing(source, tmp_path / "list.csv", labels, SALT)
    rows = rows_of(official)
    with open(tmp_path / "list.csv", newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert counts["rows"] == len(rows) == len(listed)
    for row, cells in zip(rows, listed, strict=True):
        if labels == "raw":
            assert cells["tokens"] == row["Finding Labels"]
            continue
        shown = row["Finding Labels"].split("|")  # what isn't listed is absent, as in the published code
        found = dict(list(cells.items())[6:])
        assert list(found) == sorted(found) and len(found) == 14
        assert found == {name: "1" if name in shown else "0" for name in found}


def splits_of(records: list[Record]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(record.split, set()).add(record.source_id)
    return found


def test_splits_of_both_protocols(official: Path) -> None:
    lists = {name: set((official / name).read_text().split()) for name in ("train_val_list.txt", "test_list.txt")}
    corrected = splits_of(list(open_source("nih", official, valid_share=0.3)))
    assert set(corrected) == {"train", "valid", "test"}
    assert corrected["test"] == lists["test_list.txt"]
    assert corrected["train"] | corrected["valid"] == lists["train_val_list.txt"]
    source = open_source("nih", official, protocol="paper")
    assert splits_of(list(source)) == {"train": lists["train_val_list.txt"], "valid": lists["test_list.txt"]}
    assert len(source.notes) == 1 and "published best epochs" in source.notes[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)))
def test_no_patient_is_in_two_splits(official: Path, seed: int, shares: tuple[float, float]) -> None:
    valid: list[set[str]] = []
    for share in sorted(shares):
        records = list(open_source("nih", official, valid_share=share, seed=seed))
        patients = {split: {r.patient for r in records if r.split == split} for split in ("train", "valid", "test")}
        assert sum(map(len, patients.values())) == len(set().union(*patients.values()))
        valid.append(patients["valid"])
        frontal = list(open_source("nih", official, valid_share=share, seed=seed, views="PA"))
        assert frontal == [r for r in records if r.view == "PA"]  # a view moves nobody to another split
    assert valid[0] <= valid[1]


def test_without_both_lists_a_note_says_so(root: Path) -> None:
    for name in ("train_val_list.txt", "test_list.txt"):
        kept = (root / name).read_bytes()
        (root / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing beside"):
            open_source("nih", root)
        (root / name).write_bytes(kept)
    for name in ("train_val_list.txt", "test_list.txt"):
        (root / name).unlink()
    source = open_source("nih", root, valid_share=0.4)
    assert set(splits_of(list(source))) == {"train", "valid"}
    assert "among train and valid" in source.notes[0]
    source = open_source("nih", root, protocol="paper")
    assert set(splits_of(list(source))) == {"train"} and "among train:" in source.notes[0]


BAD_CELLS = [
    ("Finding Labels", "Cardiomegalie", r"line 4, column 'Finding Labels': .*'Cardiomegalie' \(did you mean 'Cardiom"),
    ("Finding Labels", "Mass|No Finding", r"line 4, .*No Finding stands beside a finding \('Mass\|No Finding'\)"),
    ("Finding Labels", "", "line 4, column 'Finding Labels': the cell is empty"),
    ("Finding Labels", "|", "line 4, column 'Finding Labels': the cell is empty"),
    ("View Position", "LL", "line 4, column 'View Position': 'LL' is neither PA nor AP"),
    ("View Position", "", "line 4, column 'View Position': '' is neither"),
    ("Patient ID", " ", "line 4: .* has no Patient ID"),
    ("Image Index", "../00000001_000.png", "line 4: the Image Index .* is no file name"),
    ("Image Index", ".hidden.png", "line 4: .* is no file name"),
    ("Image Index", "a\nb.png", "is no file name"),
    ("Image Index", "00000001_000.png", "line 4: 00000001_000.png is already in line 2"),
    ("Image Index", "90000000_000.png", "line 4: 90000000_000.png is neither in train_val_list.txt nor in test_list"),
]


@pytest.mark.parametrize("column, value, words", BAD_CELLS)
def test_bad_cells_name_file_and_line(root: Path, column: str, value: str, words: str) -> None:
    change(root, 2, column, value)
    with pytest.raises(ValueError, match=words) as error:
        list(open_source("nih", root))
    assert TABLE in str(error.value)


def test_tokens_keep_the_order_and_repetitions_of_the_table(root: Path) -> None:
    image = change(root, 0, "Finding Labels", "Mass| Edema |Mass")
    (found,) = [r.labels for r in open_source("nih", root) if r.source_id == image]
    assert found == ("Mass", "Edema", "Mass")


def append(root: Path, name: str, image: str) -> int:
    """Gives the line of the new entry."""
    lines = [*(root / name).read_text().split(), image]
    (root / name).write_text("\n".join(lines))
    return len(lines)


def test_lists_that_do_not_fit_the_table(root: Path) -> None:
    line = append(root, "test_list.txt", "90000000_000.png")
    with pytest.raises(ValueError, match=rf"test_list\.txt, line {line}: {TABLE} has no row of 90000000_000\.png"):
        list(open_source("nih", root))


def test_lists_that_overlap(root: Path) -> None:
    first = (root / "train_val_list.txt").read_text().split()[0]
    line = append(root, "test_list.txt", first)
    with pytest.raises(
        ValueError, match=rf"test_list\.txt, line {line}: {first} is also in train_val_list\.txt, line 1"
    ):
        list(open_source("nih", root))
    append(root, "train_val_list.txt", first)
    with pytest.raises(ValueError, match=rf"train_val_list\.txt, line \d+: {first} is already in line 1"):
        list(open_source("nih", root))


@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_patients_in_both_lists_are_counted(root: Path, protocol: str) -> None:
    # The image of a training patient with several goes over to the test list.
    images = (root / "train_val_list.txt").read_text().split()
    moved = next(image for image in images if image.endswith("_001.png"))
    (root / "train_val_list.txt").write_text("\n".join(image for image in images if image != moved))
    append(root, "test_list.txt", moved)
    with pytest.raises(ValueError, match=rf"1 of 4 patients of .*test_list\.txt .* \(the first is {int(moved[:8])}\)"):
        list(open_source("nih", root, protocol=protocol))


def test_options_and_folders(root: Path) -> None:
    for options, words in (
        ({"views": "PA,AQ"}, "no view 'AQ'"),
        ({"protocol": "papr"}, "protocol is 'papr'"),
        ({"valid_share": 1}, "valid_share must be"),
        ({"valid_share": 0.2, "protocol": "paper"}, "valid_share has no meaning"),
        ({"labeler": "negbio"}, "no option 'labeler'"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source("nih", root, **options)
    with pytest.raises(ValueError, match="no training row with the views COSTAL"):
        list(open_source("nih", root, views="COSTAL"))
    with pytest.raises(ValueError, match=r"valid_share 0\.999"):
        list(open_source("nih", root, valid_share=0.999))
    (root / TABLE).rename(root / "table.csv")
    with pytest.raises(ValueError, match=rf"{TABLE} is missing"):
        open_source("nih", root)


def in_zips(root: Path) -> None:
    images = sorted((root / "images").iterdir())
    for part, names in enumerate(np.array_split(np.arange(len(images)), 12)):
        with zipfile.ZipFile(root / f"images_{part + 1:03d}.zip", "w") as archive:
            for name in names:
                archive.write(images[name], f"images/{images[name].name}")
    shutil.rmtree(root / "images")


def in_parts(root: Path) -> None:
    for number, image in enumerate(sorted((root / "images").iterdir())):
        folder = root / f"images_{number % 12 + 1:03d}/images"
        folder.mkdir(parents=True, exist_ok=True)
        image.rename(folder / image.name)


def beside(root: Path) -> None:
    for image in list((root / "images").iterdir()):
        image.rename(root / image.name)


@pytest.mark.parametrize("layout", [in_zips, in_parts, beside])
def test_images_wherever_they_lie_give_the_same_shards(
    tmp_path: Path, official: Path, layout: Callable[[Path], None]
) -> None:
    (tmp_path / "salt").write_bytes(SALT)
    digests = []
    for number in range(2):
        root = shutil.copytree(official, tmp_path / f"root{number}")
        if number:
            layout(root)
        out = tmp_path / f"out{number}"
        words = ["nih", "--root", str(root), "--out", str(out), "--salt-file", str(tmp_path / "salt")]
        assert make_shards.main([*words, "--option", "valid_share=0.3"]) == 0
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()})
    assert digests[0] == digests[1] and "index.json" in digests[0]
    assert {name.split("-")[0] for name in digests[0] if name.endswith(".tar")} == {"train", "valid", "test"}


def test_locating_dicom_missing_images_and_tars(official: Path, tmp_path: Path) -> None:
    root = shutil.copytree(official, tmp_path / "root")
    source = open_source("nih", root)
    records = list(source)
    first, second = (root / record.image for record in records[:2])
    first.rename(first.with_suffix(".dcm"))
    second.unlink()
    located = source.locate(records)
    assert located[0].image == records[0].image.replace(".png", ".dcm") and located[1:] == records[1:]
    (root / "images_003.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"1 images are missing and .*images_003\.tar\.gz .* extract it"):
        source.locate(records)


def test_a_radiograph_stored_in_colour_is_grey(tmp_path):
    """A few hundred official images are RGBA; they must not make the whole set one of colour."""
    root = write_nih(tmp_path / "nih")
    for path in sorted((root / "images").glob("*.png"))[:3]:
        Image.open(path).convert("RGBA").save(path)
    index = build(plan_shards(open_source("nih", root), b"a secret of many bytes"), tmp_path / "shards").index
    assert index.image.channels == 1
    path = sorted((root / "images").glob("*.png"))[0]
    coloured = np.array(Image.open(path))
    coloured[7, 5, 0] ^= 255
    Image.fromarray(coloured).save(path)
    plan = plan_shards(open_source("nih", root), b"a secret of many bytes")
    assert build(plan, tmp_path / "colour").index.image.channels == 3
