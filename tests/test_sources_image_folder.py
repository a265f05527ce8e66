from __future__ import annotations

from pathlib import Path

import pytest

from scaletransfer.sources import Record, open_source


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_flat_layout(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.png", "cat/1.JPG", "cat/deep/2.jpeg", "dog/a.jpg")
    source = open_source("image_folder", tmp_path)
    assert source.label_names == ("cat", "dog") and source.task == "multiclass" and not source.public
    records = list(source)
    assert records == list(source)
    assert [(r.image, r.labels, r.split) for r in records] == [
        ("cat/1.JPG", 0, "train"),
        ("cat/deep/2.jpeg", 0, "train"),
        ("dog/a.jpg", 1, "train"),
        ("dog/b.png", 1, "train"),
    ]
    assert records[0] == Record(source_id="cat/1.JPG", split="train", patient="", image="cat/1.JPG", labels=0, view="")


@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_split_layout(tmp_path: Path, valid: str) -> None:
    touch(tmp_path, "train/b/1.png", "train/a/2.png", f"{valid}/b/3.png", "test/a/4.png")
    found = [(r.split, r.image, r.labels) for r in open_source("image_folder", tmp_path)]
    assert found == [
        ("train", "train/a/2.png", 0),
        ("train", "train/b/1.png", 1),
        ("valid", f"{valid}/b/3.png", 1),
        ("test", "test/a/4.png", 0),
    ]


def test_other_files_are_reported_or_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/a/Thumbs.db", "train/a/.DS_Store", "train/.git/x.png")
    touch(tmp_path, "train/a/notes.txt", "train/readme.md", "extra/a/1.png", "__MACOSX/a.png")
    source = open_source("image_folder", tmp_path)
    assert len(list(source)) == len(list(source)) == 1
    assert sorted(entry.split(":")[0] for entry in source.skipped) == [
        "extra",
        "train/a/notes.txt",
        "train/readme.md",
    ]


@pytest.mark.parametrize(
    "names, words",
    [
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "both val and valid"),
        (["val/a/1.png"], "no train folder"),
        (["train/a/1.png", "test/b/1.png"], "test/b has no counterpart"),
        (["1.png"], "no class folders"),
        (["a/1.png", "b/notes.txt"], "b holds no image"),
    ],
)
def test_wrong_layouts_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(open_source("image_folder", touch(tmp_path, *names)))


def test_valid_share_is_by_hash_and_leaves_each_class_something(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{n}.png" for c in "ab" for n in range(300)), "c/only.png")
    splits = {r.image: r.split for r in open_source("image_folder", tmp_path, valid_share=0.2)}
    count = sum(split == "valid" for split in splits.values())
    assert 80 < count < 160 and splits["c/only.png"] == "train"
    other = {r.image: r.split for r in open_source("image_folder", tmp_path, valid_share=0.2, seed=1)}
    assert other != splits
    larger = {r.image: r.split for r in open_source("image_folder", tmp_path, valid_share=0.4)}
    assert all(larger[image] == "valid" for image, split in splits.items() if split == "valid")
    (tmp_path / "a/0.png").unlink()  # another image's split doesn't depend on who else is there
    fewer = {r.image: r.split for r in open_source("image_folder", tmp_path, valid_share=0.2)}
    assert fewer.items() <= splits.items()
    tight = [r for r in open_source("image_folder", tmp_path, valid_share=0.999) if r.split == "train"]
    assert {r.labels for r in tight} == {0, 1, 2}


def test_valid_share_out_of_range_or_not_needed(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "val/a/1.png")
    for share in (1.0, -0.1, "0.1", True):
        with pytest.raises(ValueError, match="valid_share"):
            open_source("image_folder", tmp_path, valid_share=share)
    with pytest.raises(ValueError, match="validation split already"):
        open_source("image_folder", tmp_path, valid_share=0.1)
