"""One pass over tars that others made: what is hostile, damaged or incomplete is refused; and which split a tar is."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers_foreign import add, images_of, index_of, picture, refused, write_cls, write_json, write_tar

from scaletransfer.foreign_scan import choose_splits
from scaletransfer.shards import shards_main

# ---- which tars are which split


@pytest.mark.parametrize(
    ("names", "option", "expected"),
    [
        (["00000.tar", "00001.tar"], None, {"train": [0, 1]}),
        (["test-1.tar", "train_0.tar", "val.tar", "valid-3.tar"], None, {"test": [0], "train": [1], "valid": [2, 3]}),
        (["0.tar", "1.tar", "2.tar"], "valid={0..0}.tar,train=*.tar", {"valid": [0], "train": [1, 2]}),
        (["a.tar", "b.tar"], "train=a.tar", {"train": [0]}),
        (["a.tar", "b.tar"], "train=a.tar,train=b.tar", {"train": [0, 1]}),
    ],
)
def test_splits(names, option, expected):
    found = choose_splits(names, option, Path("f"))
    assert found == {split: [names[row] for row in rows] for split, rows in expected.items()}


@pytest.mark.parametrize(
    ("names", "option", "words"),
    [
        (["train-0.tar", "x.tar"], None, "f holds train-0.tar and x.tar, which names no split"),
        (["a.tar"], "valid=b*.tar", "no tar in f is named 'b*.tar'"),
        (["a.tar"], "a.tar", "'a.tar'; give SPLIT=PATTERN"),
        (["a.tar"], "train=../a.tar", "'train=../a.tar'; give SPLIT=PATTERN"),
        (["a.tar"], "../x=a.tar", "give SPLIT=PATTERN"),
    ],
)
def test_splits_that_are_refused(names, option, words):
    with pytest.raises(ValueError, match="splits") as error:
        choose_splits(names, option, Path("f"))
    assert words in str(error.value)


def test_folders_without_plain_tars(tmp_path):
    assert "holds no .tar" in refused(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    assert "a.tar.gz is compressed" in refused(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "b.tar is not a readable plain tar" in refused(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        shards_main(["index", str(tmp_path / "none"), "--public"])


# ---- hostile and damaged tars


def info(name: str, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(made, key, value)
    return made


HOSTILE: dict[str, tuple[tarfile.TarInfo, str]] = {
    "parent": (info("../x.jpg"), "'../x.jpg' at byte {at}, which is no plain name"),
    "absolute": (info("/etc/x.jpg"), "'/etc/x.jpg' at byte {at}, which is no plain name"),
    "symlink": (info("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'x.jpg' at byte {at} is a link"),
    "hard link": (info("x.jpg", type=tarfile.LNKTYPE, linkname="0.jpg"), "'x.jpg' at byte {at} is a link"),
    "device": (info("x.jpg", type=tarfile.CHRTYPE), "'x.jpg' at byte {at} is a link, a device"),
    "fifo": (info("x.pyd", type=tarfile.FIFOTYPE), "'x.pyd' at byte {at} is a link, a device"),
    "10 GB": (info("x.jpg", size=10**10), "'x.jpg', which claims 10000000000 bytes at byte {at}"),
    "10 GB pickle": (info("x.pickle", size=10**10), "'x.pickle', which claims 10000000000 bytes at byte {at}"),
    "line break": (info("x\n.jpg"), "at byte {at}, which is no plain name"),
    "same key": (info("0.jpg"), "'0.jpg' at byte {data} belongs to a sample that ended before it"),
    "same name": (info("1.JPG"), "two members of the name '1.JPG' (case apart)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members(tmp_path, kind):
    """One sentence with the tar, the member and the byte; nothing appears anywhere."""
    bad, words = HOSTILE[kind]
    folder = tmp_path / "t"
    folder.mkdir()
    with tarfile.open(folder / "bad.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(2):
            add(tar, f"{number}.cls", b"0")
            add(tar, f"{number}.jpg", picture(number))
        at = tar.fileobj.tell()  # type: ignore[union-attr]
        tar.addfile(bad) if not bad.size else tar.fileobj.write(bad.tobuf(tarfile.GNU_FORMAT))  # type: ignore[union-attr]
    text = refused(folder)
    assert "bad.tar" in text and words.format(at=at, data=at + 512) in text
    assert [path.name for path in tmp_path.rglob("*")] == ["t", "bad.tar"]


@pytest.mark.parametrize("left", [700, 3000, 5000])
def test_truncated_tars(tmp_path, left):
    folder = write_cls(tmp_path / "t", "train", 5)
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:left])
    text = refused(folder)
    assert str(path) in text and "byte" in text


def test_extended_headers_that_claim_gigabytes(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    head = info("x", type=tarfile.XHDTYPE, size=10**10).tobuf(tarfile.GNU_FORMAT)
    (folder / "bad.tar").write_bytes(head + bytes(10240))
    assert "bad.tar is damaged: a header claims" in refused(folder)


def test_an_image_that_is_none(tmp_path):
    folder = write_tar(tmp_path / "t" / "a.tar", [("0.jpg", b"not an image"), ("0.cls", b"0")])
    assert "a.tar" in refused(folder) and "is not an image" in refused(folder)


# ---- samples without image or label


def test_incomplete_samples(tmp_path):
    members = [("a.jpg", picture(0)), ("a.cls", b"0"), ("b.jpg", picture(1)), ("c.cls", b"1"), ("d.txt", b"")]
    members += [("e.jpg", b""), ("e.cls", b"0"), ("f.jpg", picture(2)), ("f.cls", b"1")]
    folder = write_tar(tmp_path / "t" / "a.tar", members)
    text = refused(folder)
    assert "the sample 'b' at byte" in text and "has no label (it has .jpg); --skip-incomplete" in text
    assert "--label cls" in text and "json:FIELD" in text
    index = index_of(folder, "--skip-incomplete")
    assert index.left_out == {"no image": 2, "no label": 1, "an empty image": 1}
    assert images_of(index) == [picture(0), picture(2)]


def test_a_split_without_one_complete_sample(tmp_path):
    folder = write_tar(tmp_path / "t" / "a.tar", [("a.jpg", picture(0))])
    assert "hold no sample with image and label" in refused(folder, "--skip-incomplete")


def test_two_images_in_a_sample(tmp_path):
    members = [("a.jpg", picture(0)), ("a.seg.png", picture(1, "png")), ("a.png", picture(2, "png")), ("a.cls", b"0")]
    folder = write_tar(tmp_path / "t" / "a.tar", members)
    assert "has 2 images (jpg, png): say by --image-ext" in refused(folder)
    assert images_of(index_of(folder, "--image-ext", "seg.png")) == [picture(1, "png")]
    for bad in ("jpg,../x", "", "cls"):
        with pytest.raises(ValueError, match="--image-ext has"):
            shards_main(["index", str(folder), "--public", "--image-ext", bad, "--overwrite"])


def test_names_that_mean_something_else(tmp_path):
    folder = write_json(tmp_path / "chexpert", "train", 6)
    assert "chexpert is the name of a data set with findings of its own" in refused(folder, "--label", "json:findings")
    with pytest.raises(ValueError, match="must consist of a-z"):
        shards_main(["index", str(folder), "--public", "--name", "A B"])
    assert index_of(folder, "--label", "json:findings", "--name", "mine").source == "mine"
