from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.covidx import write_covidx

from scaletransfer import keys
from scaletransfer.index import from_records
from scaletransfer.make_shards import main as make_shards
from scaletransfer.sources import Record, open_source, source_options

SALT = b"a salt for tests only, 32 bytes."


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_covidx(tmp_path_factory.mktemp("covidx") / "COVIDx-CXR2", shared=2)


def lists(root: Path, train: str, test: str = "9 z.png negative rsna\n") -> Path:
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)
    return root


def test_records_in_the_order_of_the_lists(official: Path) -> None:
    source = open_source("covidx", official)
    records = list(source)
    assert records == list(source) == list(source.listed())
    assert source.task == "multiclass" and not source.public and source.label_names == ("negative", "positive")
    assert Counter(r.split for r in records) == {"train": 24, "test": 8}
    assert source_options("covidx") == ("valid_share", "seed")
    assert records[3] == Record(
        source_id="train/COVID (3).png",
        split="train",
        patient="ricord/1",
        image="train/COVID (3).png",
        labels=1,
        view="",
    )
    assert all((official / r.image).is_file() for r in records)
    assert {Path(r.image).suffix for r in records} == {".png", ".jpg", ".jpeg"}


def test_as_pandas_reads_it(official: Path) -> None:
    """The published code reads the lists so (a name with blanks is more than it can do)."""
    names = ["patient", "file", "label", "source"]
    source = open_source("covidx", official)
    for split in ("train", "test"):
        lines = [line for line in (official / f"{split}.txt").read_text().splitlines() if line.count(" ") == 3]
        table = pandas.DataFrame([line.split(" ") for line in lines], columns=names)
        expected = {
            f"{split}/{row.file}": (int(row.label == "positive"), f"{row.source}/{row.patient}")
            for row in table.itertuples()
        }
        ours = {r.image: (r.labels, r.patient) for r in source if r.split == split and " " not in r.image}
        assert ours == expected


def test_patients_with_blanks(tmp_path: Path) -> None:
    """As the official lists have them for the source sirm."""
    text = (
        "COVID 386 COVID(386).png positive sirm\nCOVID 7 COVID-7.png positive sirm\n5 ARDSSevere.png negative cohen\n"
    )
    records = list(open_source("covidx", lists(tmp_path, text)))
    assert [(r.patient, r.source_id) for r in records if r.split == "train"] == [
        ("sirm/COVID 386", "train/COVID(386).png"),
        ("sirm/COVID 7", "train/COVID-7.png"),
        ("cohen/5", "train/ARDSSevere.png"),
    ]


def test_ids_are_unique_in_a_source_only(tmp_path: Path) -> None:
    records = list(open_source("covidx", lists(tmp_path, "9 a.png positive cohen\n9 b.png negative rsna\n")))
    assert [r.patient for r in records] == ["cohen/9", "rsna/9", "rsna/9"]


def test_patients_in_both_lists_are_a_note(official: Path) -> None:
    source = open_source("covidx", official)
    assert not source.notes
    patients: dict[str, set[str]] = {"train": set(), "test": set()}
    for record in source:
        patients[record.split].add(record.patient)
    both = patients["train"] & patients["test"]
    assert both
    assert len(source.notes) == 1
    assert source.notes[0].startswith(
        f"{len(both)} of the {len(patients['test'])} patients of test.txt are in train.txt"
    )
    alone = open_source("covidx", official, valid_share=0.5)
    list(alone)
    assert alone.notes == source.notes  # held-out patients come from train.txt too


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_a_share_of_the_patients_is_held_out(official: Path, share: float, seed: int) -> None:
    split_of: dict[str, set[str]] = {}
    before = list(open_source("covidx", official))
    after = list(open_source("covidx", official, valid_share=share, seed=seed))
    assert [(r.source_id, r.labels) for r in before] == [(r.source_id, r.labels) for r in after]
    for old, new in zip(before, after, strict=True):
        assert new.split == old.split or (old.split, new.split) == ("train", "valid")
        if old.split == "train":
            split_of.setdefault(new.patient, set()).add(new.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    fewer = open_source("covidx", official, valid_share=share / 2, seed=seed)
    assert {r.source_id for r in fewer if r.split == "valid"} <= {r.source_id for r in after if r.split == "valid"}


def test_the_share_is_about_what_was_asked_for(tmp_path: Path) -> None:
    lines = "".join(f"{n // 2} {n}.png negative rsna\n" for n in range(4000))
    records = list(open_source("covidx", lists(tmp_path, lines), valid_share=0.1))
    assert 320 <= sum(r.split == "valid" for r in records) <= 480
    other = list(open_source("covidx", tmp_path, valid_share=0.1, seed=1))
    assert [r.split for r in other] != [r.split for r in records]


def test_the_folder_above_will_do(official: Path) -> None:
    assert next(iter(open_source("covidx", official.parent))).image.startswith("COVIDx-CXR2/train/")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            "1 a.png positive\n",
            "train.txt, line 1: '1 a.png positive' is no entry; a line is: patient, file, label, source",
        ),
        ("1 a.png postive cohen\n", r"train.txt, line 1: 'postive' is no label; .*did you mean 'positive'"),
        ("1 a.png Positive cohen\n", "'Positive' is no label"),
        ("1 ../a.png positive cohen\n", "train.txt, line 1: '../a.png' is no file name inside of train/"),
        ("1 /etc/a.png positive cohen\n", "'/etc/a.png' is no file name"),
        ("1 a.png positive cohen\n\n2 a.png negative rsna\n", "train.txt, line 3: a.png is already in line 1"),
        ("1 a.png positive cohen\n1 a.png positive cohen\n", "train.txt, line 2: .* is already in line 1"),
        ("\n", "train.txt names no image"),
    ],
)
def test_wrong_lists(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(open_source("covidx", lists(tmp_path, train)))
    assert "\n" not in str(caught.value)


def test_missing_files_and_options(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.txt is missing; --root must be the folder of COVIDx-CXR2"):
        open_source("covidx", tmp_path)
    for options, message in (
        ({"valid_share": 1}, "valid_share must be a number from 0 to below 1, not 1"),
        ({"seed": "x"}, "seed is 'x'; it must be a whole number"),
        ({"valid_shar": 0.1}, r"no option 'valid_shar' \(did you mean 'valid_share'\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("covidx", official, **options)
    root = write_covidx(tmp_path / "set", train=6, test=4)
    (root / "test" / "cohen-01000-0.png").unlink(missing_ok=True)
    (root / "train" / "COVID (3).png").unlink()
    with pytest.raises(
        ValueError,
        match=r"train/COVID \(3\).png \(split train, row \d+ \(line \d+ of its table\)\) is missing or empty",
    ):
        from_records(open_source("covidx", root), SALT)


def test_shards_hold_no_identifier(official: Path, tmp_path: Path) -> None:
    (tmp_path / "salt").write_text("0123456789abcdef")
    words = ["covidx", "--root", str(official), "--out", str(tmp_path / "shards"), "--encode", "png"]
    assert make_shards([*words, "--salt-file", str(tmp_path / "salt")]) == 0
    secrets = {Path(r.image).stem for r in open_source("covidx", official)}
    secrets |= {r.patient for r in open_source("covidx", official)}
    for path in (tmp_path / "shards").rglob("*"):
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path
    index = from_records(open_source("covidx", official), SALT)
    assert index.splits["train"].patients == len(
        {r.patient for r in open_source("covidx", official) if r.split == "train"}
    )
    assert keys.fingerprint(SALT) == index.salt_fingerprint != keys.fingerprint(keys.PUBLIC_SALT)
