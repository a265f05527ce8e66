"""Tables of labels against hand-made ones, and patients who are in two splits or two sets."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas
import pytest
from helpers_check_data import Pictures, drawing, rows_of
from helpers_data import SALT, make_chexpert
from official.nih import write_nih

from scaletransfer import keys, make_shards
from scaletransfer.check_data import check_data, main
from scaletransfer.cli import run_command
from scaletransfer.index import load_index


def labels_of(folder, tmp_path):
    out = tmp_path / "labels"
    run_command(main, [str(folder), "--out", str(out), "--workers", "1"])
    names = ("positive", "negative", "uncertain", "unknown")
    return {
        (row["split"], row["label"]): tuple(int(row[name]) for name in names) for row in rows_of(out / "labels.csv")
    }


def test_states_by_hand(tmp_path):
    source = Pictures(tmp_path / "s", ("A", "B", "C"))
    states = [(1, 0, -2), (1, -1, -2), (0, -2, -1), (1, 1, -2), (-2, 0, -2)]
    for number, row in enumerate(states):
        source.add(drawing(number), split="valid" if number == 4 else "train", labels=row)
    assert labels_of(source.shards(tmp_path / "shards"), tmp_path) == {
        ("train", "A"): (3, 1, 0, 0),
        ("train", "B"): (1, 1, 1, 1),
        ("train", "C"): (0, 0, 1, 3),
        ("valid", "A"): (0, 0, 0, 1),
        ("valid", "B"): (0, 1, 0, 0),
        ("valid", "C"): (0, 0, 0, 1),
    }
    text = (tmp_path / "labels" / "report.txt").read_text()
    assert "shards/train: labels not known of any image: C" in text and "any image: A, C" in text
    assert "shards/valid: labels without a positive: B" in text


def test_states_are_those_of_chexperts_table(tmp_path):
    """Against pandas on the official file, counted there."""
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=30, valid=0, laterals=False)
    (tmp_path / "salt").write_bytes(SALT)
    make_shards.main(
        ["chexpert", "--root", str(root), "--out", str(tmp_path / "shards"), "--salt-file", str(tmp_path / "salt")]
    )
    table = pandas.read_csv(root / "train.csv").rename(columns={"Pleural Effusion": "Effusion"})
    found = labels_of(tmp_path / "shards", tmp_path)
    assert len(found) == 14
    for (_, name), counts in found.items():
        column = table[name]
        assert counts == ((column == 1).sum(), (column == 0).sum(), (column == -1).sum(), column.isna().sum())


def test_tokens_are_findings(tmp_path):
    """What is not listed is absent; "No Finding" is no finding of its own."""
    source = Pictures(tmp_path / "t", ("Edema", "Mass", "No Finding"), label_kind="tokens", name="clinic")
    for number, tokens in enumerate([("Edema",), ("Edema", "Mass"), ("No Finding",), ()]):
        source.add(drawing(number), labels=tokens)
    assert labels_of(source.shards(tmp_path / "shards"), tmp_path) == {
        ("train", "Edema"): (2, 2, 0, 0),
        ("train", "Mass"): (1, 3, 0, 0),
    }


def test_tokens_are_those_of_nihs_table(tmp_path):
    """Against pandas on the official file."""
    root = write_nih(tmp_path / "nih")
    (tmp_path / "salt").write_bytes(SALT)
    command = ["nih", "--root", str(root), "--out", str(tmp_path / "shards"), "--salt-file", str(tmp_path / "salt")]
    assert make_shards.main(command) == 0
    table = pandas.read_csv(root / "Data_Entry_2017_v2020.csv", index_col=False, usecols=["Finding Labels"])
    listed = table["Finding Labels"].str.get_dummies("|")
    found = labels_of(tmp_path / "shards", tmp_path)
    for name in listed.columns.drop("No Finding"):
        counts = [its for (_, label), its in found.items() if label == name]
        positive, negative, uncertain, unknown = map(sum, zip(*counts, strict=True))
        assert (positive, negative) == (listed[name].sum(), (listed[name] == 0).sum()) and not uncertain + unknown
    assert "No Finding" not in {label for _, label in found}


def test_classes(tmp_path):
    source = Pictures(tmp_path / "c", tuple(f"class {number}" for number in range(40)), label_kind="classes")
    for number in range(9):
        source.add(drawing(number), labels=[7, 7, 7, 7, 7, 3, 3, 0, 39][number])
    found = labels_of(source.shards(tmp_path / "shards"), tmp_path)
    assert len(found) == 40 and found["train", "class 7"] == (5, 4, 0, 0) and found["train", "class 1"] == (0, 9, 0, 0)
    text = (tmp_path / "labels" / "report.txt").read_text()
    assert "the 5 largest and smallest of 40 labels" in text
    assert "without a positive: class 1, class 2, class 4, class 5, class 6 and 31 more" in text


def patients_source(folder, people, **options):
    """One image for each (split, patient)."""
    source = Pictures(folder, **options)
    first = int.from_bytes(hashlib.sha256(folder.name.encode()).digest()[:4], "big")
    for number, (split, patient) in enumerate(people):
        source.add(drawing(first + number), split=split, patient=patient)
    return source


def test_patients_in_two_splits_of_one_set(tmp_path):
    people = [
        ("train", "1"),
        ("train", "1"),
        ("train", "2"),
        ("valid", "1"),
        ("valid", "3"),
        ("test", "3"),
        ("test", ""),
    ]
    source = patients_source(tmp_path / "p", [*people, ("train", "")])
    out = tmp_path / "out"
    assert run_command(main, [str(source.shards(tmp_path / "shards")), "--out", str(out)]) == 1
    text = (out / "report.txt").read_text()
    assert "1 patient in shards/train and in shards/valid" in text
    assert "1 patient in shards/valid and in shards/test" in text and "REFUSED, 2 findings" in text
    found = {(row["patient"], row["relation"], row["split"], row["key"]) for row in rows_of(out / "patients.csv")}
    key = [keys.key("pictures", record.source_id, SALT) for record in source.records]
    by_key = {row[3]: row for row in found}
    assert set(by_key) == {key[0], key[1], key[3], key[4], key[5]}
    assert len({by_key[key[number]][0] for number in (0, 1, 3)}) == 1 != by_key[key[4]][0]
    assert {row[1] for row in found} == {"refused"}


def test_a_tampered_table_is_seen(tmp_path):
    """Somebody's table gives a patient of train to an image of valid; all hashes fit."""
    people = [("train", str(number)) for number in range(6)] + [("valid", str(number)) for number in range(6, 10)]
    folder = patients_source(tmp_path / "p", people).shards(tmp_path / "shards")
    check = check_data([folder], cache=tmp_path / "cache")
    assert not check.refusals
    table = load_index(folder).table("valid").copy()
    table["patient"][2] = load_index(folder).table("train")["patient"][0]
    np.save(folder / "samples-valid.npy", table)
    content = json.loads((folder / "index.json").read_text())
    content["splits"]["valid"]["table_sha256"] = hashlib.sha256((folder / "samples-valid.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(content))
    [refusal] = check_data([folder], cache=tmp_path / "cache").refusals
    assert refusal == "1 patient in shards/train and in shards/valid"


def test_patients_across_folders_by_their_codes(tmp_path):
    """The numbers in tables are ranks of one folder: only the codes in the label members can be compared."""
    one = patients_source(tmp_path / "one", [("train", "x"), ("train", "y"), ("valid", "z")]).shards(tmp_path / "a")
    two = patients_source(tmp_path / "two", [("train", "x"), ("valid", "y"), ("test", "b")]).shards(tmp_path / "b")
    for index in map(load_index, (one, two)):  # both number their patients 0, 1, 2, and z is not b
        assert {int(number) for split in index.splits for number in index.table(split)["patient"]} == {0, 1, 2}
    together = check_data([one, two], cache=tmp_path / "cache")
    assert together.refusals == ["1 patient in a/train and in b/valid"]
    assert "1 patient in a/train and in b/train" in together.warnings, "a set that trains beside it may share a split"
    apart = check_data([one], [two], cache=tmp_path / "cache")
    assert apart.refusals == ["1 patient in a/train and in b/train", "1 patient in a/train and in b/valid"]
    third = patients_source(tmp_path / "n", [("train", "n")]).shards(tmp_path / "c")
    targets = check_data([third], [one, two], cache=tmp_path / "cache")
    assert not targets.refusals and "1 patient in a/train and in b/valid" in targets.warnings


def test_other_salts_and_classes_cannot_be_compared(tmp_path):
    """That is said, the images are compared all the same, and --strict refuses it."""
    one = patients_source(tmp_path / "one", [("train", "x"), ("valid", "z")])
    first = one.shards(tmp_path / "first")
    two = patients_source(tmp_path / "two", [("train", "x")])
    two.add(drawing(99), split="test", patient="q")
    one.add(drawing(99), split="train", patient="r")
    second = two.shards(tmp_path / "second", salt=b"another salt of enough bytes")
    third = one.shards(tmp_path / "third")
    check = check_data([first], [second], cache=tmp_path / "cache")
    assert not check.refusals
    [warning] = [text for text in check.warnings if "not compared" in text]
    fingerprints = [load_index(folder).salt_fingerprint for folder in (first, second)]
    assert "patients of first and second" in warning and all(text in warning for text in fingerprints)
    assert check_data([first], [second], cache=tmp_path / "cache", strict=True).refusals == [warning]
    found = check_data([third], [second], cache=tmp_path / "cache")
    assert found.refusals == ["1 image in third/train and in second/test (1 bytes)"]
    classes = patients_source(tmp_path / "k", [("train", "x"), ("valid", "y")], label_kind="classes")
    check = check_data([first], [classes.shards(tmp_path / "fourth")], cache=tmp_path / "cache")
    [warning] = [text for text in check.warnings if "not compared" in text]
    assert "shards of classes hold no patient codes (fourth)" in warning and not check.refusals


@pytest.mark.parametrize("both", ["train", "valid"])
def test_patients_inside_a_set_of_classes_are_compared(tmp_path, both):
    classes = patients_source(tmp_path / "k", [("train", "x"), (both, "x"), ("valid", "y")], label_kind="classes")
    check = check_data([classes.shards(tmp_path / "k2")], cache=tmp_path / "cache")
    assert check.refusals == ([] if both == "train" else ["1 patient in k2/train and in k2/valid"])


def test_a_sample_still_compares_all_patients_of_one_set(tmp_path):
    people = [("train", str(number)) for number in range(20)] + [("valid", str(number)) for number in range(19, 30)]
    folder = patients_source(tmp_path / "p", people).shards(tmp_path / "shards")
    for seed in range(3):
        check = check_data([folder], cache=tmp_path / f"cache{seed}", max_images=2, seed=seed)
        assert check.refusals == ["1 patient in shards/train and in shards/valid"]
