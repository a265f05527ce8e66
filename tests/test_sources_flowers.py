from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.flowers import write_flowers
from scipy.io import savemat
from torchvision.datasets import Flowers102

from scaletransfer import keys
from scaletransfer.index import from_records
from scaletransfer.make_shards import main as make_shards
from scaletransfer.sources import Record, open_source, source_options


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms, in the folder that torchvision looks for; nobody changes it."""
    return write_flowers(tmp_path_factory.mktemp("flowers"), form="both", folder="flowers-102")


def lists(root: Path, **lines: str) -> Path:
    """A root with the three lists."""
    for split in ("train", "valid", "test"):
        (root / f"{split}.txt").write_text(lines.get(split, ""))
    return root


def matlab(root: Path, labels: object, trnid: object = (1,), valid: object = (2,), tstid: object = (3,)) -> Path:
    savemat(root / "imagelabels.mat", {"labels": np.array([labels])})
    ids = {"trnid": trnid, "valid": valid, "tstid": tstid}
    savemat(root / "setid.mat", {name: np.array([values], np.uint16) for name, values in ids.items()})
    return root


def test_both_forms_give_the_same_records(tmp_path: Path) -> None:
    found = {}
    for form in ("lists", "matlab", "both"):
        root = write_flowers(tmp_path / form, form=form, folder=".", side=0)
        source = open_source("flowers", root)
        assert source.task == "multiclass" and source.public and "cite" in source.licence
        found[form] = list(source)
        assert found[form] == list(source) == list(source.listed())
        assert not source.left_out and not source.notes
    assert found["lists"] == found["matlab"] == found["both"]
    assert Counter(r.split for r in found["lists"]) == {"train": 102, "valid": 102, "test": 204}
    names = [r.source_id for r in found["lists"]]
    assert names == sorted(names) == [f"image_{number:05d}" for number in range(1, 409)]
    first = found["lists"][0]
    assert first == Record(
        source_id="image_00001",
        split=first.split,
        patient="",
        image="jpg/image_00001.jpg",
        labels=first.labels,
        view="",
    )


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_as_torchvision_reads_it(official: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # checksums of the real files
    theirs = Flowers102(official.parent, {"valid": "val"}.get(split, split))
    expected = {path.name: label for path, label in zip(theirs._image_files, theirs._labels, strict=True)}
    source = open_source("flowers", official)
    ours = {Path(r.image).name: r.labels for r in source if r.split == split}
    assert ours == expected
    assert source.label_names == tuple(str(label + 1) for label in range(102))


def test_the_paper_swaps_train_and_test(official: Path) -> None:
    assert source_options("flowers") == ("protocol",)
    corrected = {r.source_id: r.split for r in open_source("flowers", official)}
    source = open_source("flowers", official, protocol="paper")
    paper = {r.source_id: r.split for r in source}
    assert paper == {name: "train" if split == "test" else "test" for name, split in corrected.items()}
    assert Counter(paper.values()) == {"train": 204, "test": 204} and "swaps" in source.notes[0]
    with pytest.raises(ValueError, match=r"protocol is 'papr'; it must be corrected or paper \(did you mean 'paper'"):
        open_source("flowers", official, protocol="papr")


def test_the_folder_above_will_do(tmp_path: Path) -> None:
    root = write_flowers(tmp_path)
    above, own = list(open_source("flowers", tmp_path)), list(open_source("flowers", root))
    assert above[0].image == "oxford-102-flowers/jpg/image_00001.jpg"
    assert [r.source_id for r in above] == [r.source_id for r in own]
    assert from_records(open_source("flowers", tmp_path), keys.PUBLIC_SALT).splits["test"].samples == 204


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_lists(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever the lists' order and blanks: records by number, each with its label and split."""
    numbers = data.draw(st.lists(st.integers(1, 8189), min_size=3, max_size=20, unique=True))
    entries = {
        n: (data.draw(st.sampled_from(("train", "valid", "test"))), data.draw(st.integers(0, 101))) for n in numbers
    }
    root = tmp_path_factory.mktemp("lists")
    blank = data.draw(st.sampled_from((" ", "  ", "\t")))
    lines = {
        split: "".join(
            f"jpg/image_{n:05d}.jpg{blank}{label}\r\n\n" for n, (own, label) in entries.items() if own == split
        )
        for split in ("train", "valid", "test")
    }
    found = list(open_source("flowers", lists(root, **lines)))
    assert [(r.source_id, r.split, r.labels) for r in found] == [
        (f"image_{n:05d}", *entries[n]) for n in sorted(entries)
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ({"train": "jpg/image_00001.jpg 0\njpg/image_00002.jpg 102\n"}, "train.txt, line 2: the label 102 is none"),
        ({"valid": "jpg/image_08190.jpg 0\n"}, "valid.txt, line 1: there is no image jpg/image_08190.jpg"),
        ({"valid": "jpg/image_00000.jpg 0\n"}, "valid.txt, line 1: there is no image"),
        ({"test": "jpg/../../x.jpg 0\n"}, "test.txt, line 1: 'jpg/../../x.jpg 0' is no entry; lines look like"),
        ({"test": "jpg/image_00001.jpg\n"}, "test.txt, line 1: 'jpg/image_00001.jpg' is no entry"),
        ({"test": "jpg/image_00001.jpg -1\n"}, "test.txt, line 1: 'jpg/image_00001.jpg -1' is no entry"),
        (
            {"train": "\njpg/image_00001.jpg 0\n", "test": "jpg/image_00003.jpg 0\njpg/image_00001.jpg 0\n"},
            "test.txt, line 2: jpg/image_00001.jpg is already in train.txt, line 2",
        ),
        ({"train": "jpg/image_00001.jpg 0\njpg/image_00001.jpg 0\n"}, "train.txt, line 2: .* is already in line 1"),
        (
            {"train": "jpg/image_00001.jpg 0\njpg/image_00001.jpg 1\n"},
            "train.txt, line 2: .* already in train.txt, line 1",
        ),
    ],
)
def test_wrong_lists(tmp_path: Path, lines: dict[str, str], message: str) -> None:
    source = open_source("flowers", lists(tmp_path, **lines))
    with pytest.raises(ValueError, match=message) as caught:
        list(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [1, 103, 2]}, r"imagelabels.mat, labels\(2\): the label 103 is none; labels are 1 to 102"),
        ({"labels": [0, 1, 2]}, r"imagelabels.mat, labels\(1\): the label 0 is none"),
        ({"labels": [1, 2, 3], "tstid": (3, 4)}, r"setid.mat, tstid\(2\): there is no image 4; .* labels of 1 to 3"),
        ({"labels": [1, 2, 3], "tstid": (3, 1)}, r"setid.mat, tstid\(2\): image 1 is already in trnid\(1\)"),
        ({"labels": [1.5, 2, 3]}, r"imagelabels.mat: labels must hold whole numbers"),
        ({"labels": [[1, 2], [3, 4]]}, r"imagelabels.mat lacks a row of numbers called 'labels'"),
    ],
)
def test_wrong_matlab_files(tmp_path: Path, content: dict[str, object], message: str) -> None:
    source = open_source("flowers", matlab(tmp_path, **content))
    with pytest.raises(ValueError, match=message):
        list(source)


def test_images_without_a_list_are_counted(tmp_path: Path) -> None:
    source = open_source("flowers", matlab(tmp_path, [5, 6, 7, 8, 9]))
    assert [r.labels for r in source] == [4, 5, 6]
    assert source.left_out == {"images with a label but in no list": 2}


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has neither setid.mat and imagelabels.mat nor train.txt, valid.txt, test.txt"
    ):
        open_source("flowers", tmp_path)
    (tmp_path / "mod_train").mkdir()
    with pytest.raises(ValueError, match="it holds mod_train, which are image folders: give them as train_dir"):
        open_source("flowers", tmp_path)
    lists(tmp_path)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(ValueError, match=r"valid.txt is missing beside train.txt"):
        open_source("flowers", tmp_path)
    matlab(tmp_path, [1, 2, 3])
    (tmp_path / "setid.mat").unlink()
    with pytest.raises(ValueError, match=r"setid.mat is missing beside imagelabels.mat"):
        open_source("flowers", tmp_path)
    (tmp_path / "setid.mat").write_bytes((tmp_path / "imagelabels.mat").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"setid.mat .*download"):
        list(open_source("flowers", tmp_path))
    (tmp_path / "setid.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"setid.mat is not a readable MATLAB file"):
        list(open_source("flowers", tmp_path))


def test_a_listed_file_that_is_absent_is_one_sentence(tmp_path: Path) -> None:
    root = write_flowers(tmp_path, folder=".", test=1)
    (root / "jpg/image_00007.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"jpg/image_00007.jpg \(split \w+, row .*\) is missing or empty, and with it 1 of 306"
    ):
        from_records(open_source("flowers", root), keys.PUBLIC_SALT)
    with pytest.raises(ValueError, match=re.escape("image_00007.jpg")):
        make_shards(["flowers", "--root", str(root), "--out", str(tmp_path / "shards")])
