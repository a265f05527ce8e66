"""Labels of tars that others made: what is one, what is refused, and that sums of samples come out as they were."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletransfer.foreign_labels import LabelColumn, LabelRule, read_label_names


def column(values: list[Any], names: tuple[str, ...] | None = None, field: str = "x") -> LabelColumn:
    """Of samples whose .json has these values in `field`."""
    rule, made = LabelRule.of(f"json:{field}"), LabelColumn(names)
    for value in values:
        label = rule.parse(json.dumps({field: value}).encode())
        assert label is not None
        made.add(label)
    return made


@pytest.mark.parametrize("text", ["txt", "folder", "json", "json:", "cls:x", ""])
def test_other_label_sources_are_refused(text):
    with pytest.raises(ValueError, match=f"--label {text}: no label can be read.*--label cls.*json:FIELD"):
        LabelRule.of(text)


@pytest.mark.parametrize(("content", "label"), [(b"0", 0), (b" 17\n", 17), (b"007", 7)])
def test_cls(content, label):
    assert LabelRule.of("cls").parse(content) == label


@pytest.mark.parametrize("content", [b"", b"-1", b"1.0", b"cat", b"\xff", b"1 2", b"9" * 30])
def test_cls_that_is_no_number(content):
    with pytest.raises(ValueError, match="is no class number but"):
        LabelRule.of("cls").parse(content)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("3", 3),
        ("3.0", 3),
        ('"cat"', "cat"),
        ("[1, 0, -1, null]", (1, 0, -1, -2)),
        ("[1.0, NaN, true]", (1, -2, 1)),
        ('["a", "b"]', ("a", "b")),
        ("[]", ()),
        ('{"a": 1, "b": null, "c": -1.0}', {"a": 1, "b": -2, "c": -1}),
        ("null", None),
        ("NaN", None),
    ],
)
def test_json(text, label):
    assert LabelRule.of("json:x").parse(f'{{"x": {text}}}'.encode()) == label
    assert LabelRule.of("json:y.z.x").parse(f'{{"y": {{"z": {{"x": {text}}}}}}}'.encode()) == label
    assert LabelRule.of("json:y.x").parse(f'{{"y.x": {text}}}'.encode()) == label
    assert LabelRule.of("json:y").parse(f'{{"x": {text}}}'.encode()) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"x": -1}', "has the class number -1 in 'x'"),
        (b'{"x": true}', "has no label in 'x' but 'True'"),
        (b'{"x": 1.5}', "has no label in 'x' but '1.5'"),
        (b'{"x": 1e999}', "has no label in 'x' but 'inf'"),
        (b'{"x": [1, 2]}', "has the state '2' in 'x'"),
        (b'{"x": [1, "a"]}', "has the state 'a' in 'x'"),
        (b'{"x": {"a": "yes"}}', "has the state 'yes' in 'x'"),
        (b'{"x": {"a": [1]}}', r"has the state '\[1\]' in 'x'"),
    ],
)
def test_json_that_is_no_label(content, words):
    with pytest.raises(ValueError, match=words):
        LabelRule.of("json:x").parse(content)


@given(st.lists(st.lists(st.sampled_from((1, 0, -1, -2)), min_size=3, max_size=3), min_size=1))
def test_lists_of_states(rows):
    kind, names, found = column(rows, ("c", "a", "b")).finish()
    assert (kind, names, found.tolist()) == ("states", ("c", "a", "b"), rows)
    assert column(rows).finish()[1] == ("0", "1", "2")


@given(st.lists(st.dictionaries(st.sampled_from("dbca"), st.sampled_from((1, 0, -1, -2))), min_size=1))
def test_objects_of_states(rows):
    """In the order of the alphabet, whatever came first; what an object does not name is not mentioned."""
    every = sorted({name for row in rows for name in row})
    if not every:
        with pytest.raises(ValueError, match="not one sample has a finding"):
            column(rows).finish()
        return
    kind, names, found = column(rows).finish()
    assert kind == "states" and list(names) == every
    assert found.tolist() == [[row.get(name, -2) for name in every] for row in rows]


@given(st.lists(st.lists(st.sampled_from("dbca")), min_size=1))
def test_lists_of_findings(rows):
    """What is not listed is absent; twice is once."""
    kind, names, found = column(rows, tuple("abcd")).finish()
    assert kind == "tokens" and names == tuple("abcd")
    assert found.tolist() == [[int(name in row) for name in "abcd"] for row in rows]
    every = sorted({name for row in rows for name in row})
    if every:
        assert list(column(rows).finish()[1]) == every


def test_classes():
    assert column([2, 0, 2]).finish()[1] == ("0", "1", "2")
    kind, names, rows = column(["dog", "cat"], ("cat", "dog", "emu")).finish()
    assert (kind, names, rows.tolist()) == ("classes", ("cat", "dog", "emu"), [1, 0])
    assert rows.dtype == np.dtype("<i4")


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ([0, [1, 0]], None, "has a list of states where samples before it have a class number"),
        ([{"a": 1}, ["a"]], None, "has a list of findings where samples before it have an object of states"),
        ([[1, 0], [1]], None, "has 1 states where samples before it have 2"),
        ([[1]], ("a", "b"), "has 1 states where --label-names has 2"),
        ([[], [1, 0]], None, "has a list of states where samples before it have an empty list"),
        (["cat"], None, "has the class name 'cat', whose number --label-names tells"),
        (["cow"], ("cat",), "has the label 'cow', which is not among the 1 of --label-names"),
        ([{"x": 1}], ("cat",), "has the label 'x', which is not among"),
        ([5], ("cat",), "has the class 5, and --label-names has 1"),
        ([10**8], None, "there can be 1,000,000 classes"),
        ([[" "]], None, "has the finding ' '"),
    ],
)
def test_labels_that_do_not_fit_each_other(values, names, words):
    with pytest.raises(ValueError) as error:
        column(values, names)
    assert words in str(error.value)


def test_label_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("tench\ngreat white, shark\n\n", encoding="utf-8")
    assert read_label_names(None) is None
    assert read_label_names("a, b,c") == ("a", "b", "c")
    assert read_label_names(str(path)) == ("tench", "great white, shark")
    for bad, words in (
        ("a,a", "names 'a' twice"),
        ("a,,b", "an empty name"),
        (str(tmp_path / "none"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            read_label_names(bad)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a readable text file"):
        read_label_names(str(path))
