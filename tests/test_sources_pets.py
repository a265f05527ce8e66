from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.pets import BREEDS, write_pets
from torchvision.datasets import OxfordIIITPet

from scaletransfer import keys
from scaletransfer.index import from_records
from scaletransfer.sources import Record, open_source, source_options


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody changes it."""
    return write_pets(tmp_path_factory.mktemp("pets") / "oxford-iiit-pet")


def lists(root: Path, trainval: str, test: str) -> Path:
    (root / "annotations").mkdir()
    (root / "annotations/trainval.txt").write_text(trainval)
    (root / "annotations/test.txt").write_text(test)
    return root


def test_records_in_the_order_of_the_lists(official: Path) -> None:
    source = open_source("pets", official)
    records = list(source)
    assert records == list(source) == list(source.listed())
    assert source.task == "multiclass" and source.public and "CC BY-SA" in source.licence
    assert source.label_names == tuple(sorted(BREEDS)) and len(BREEDS) == 37
    listed = []
    for split, name in (("train", "trainval"), ("test", "test")):
        listed += [(split, line.split()[0]) for line in (official / f"annotations/{name}.txt").read_text().splitlines()]
    assert [(r.split, r.source_id) for r in records] == listed and len(records) == 37 * 3
    assert records[0] == Record(
        source_id=listed[0][1], split="train", patient="", image=f"images/{listed[0][1]}.jpg", labels=0, view=""
    )
    assert source_options("pets") == ()


@pytest.mark.parametrize("split", ["train", "test"])
def test_as_torchvision_reads_it(official: Path, split: str) -> None:
    """Their classes are in the order of the official numbers, ours in that of the names."""
    theirs = OxfordIIITPet(official.parent, "trainval" if split == "train" else split)
    source = open_source("pets", official)
    ours = [r for r in source if r.split == split]
    assert [official / r.image for r in ours] == theirs._images
    shown = [" ".join(part.title() for part in name.split("_")) for name in source.label_names]
    assert [shown[r.labels] for r in ours] == [theirs.classes[label] for label in theirs._labels]
    assert all((official / r.image).is_file() for r in ours)


def test_the_folder_above_will_do(official: Path) -> None:
    above = list(open_source("pets", official.parent))
    assert above[0].image.startswith("oxford-iiit-pet/images/")
    index = from_records(open_source("pets", official.parent), keys.PUBLIC_SALT)
    assert {split: info.samples for split, info in index.splits.items()} == {"train": 74, "test": 37}


def test_comments_and_names_of_several_words(tmp_path: Path) -> None:
    root = lists(
        tmp_path,
        "#Image CLASS-ID SPECIES BREED ID\nMaine_Coon_7 2 1 2\nAbyssinian_100 1 1 1\n\n# x\nsaint_bernard_1 3 2 1\n",
        "Maine_Coon_20 2 1 2\n",
    )
    source = open_source("pets", root)
    assert source.label_names == ("Abyssinian", "Maine_Coon", "saint_bernard")
    assert [(r.split, r.source_id, r.labels) for r in source] == [
        ("train", "Maine_Coon_7", 1),
        ("train", "Abyssinian_100", 0),
        ("train", "saint_bernard_1", 2),
        ("test", "Maine_Coon_20", 1),
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(BREEDS), st.integers(1, 300)), min_size=2, max_size=12, unique=True))
def test_the_class_is_the_name_without_its_last_part(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, int]]
) -> None:
    lines = [f"{breed}_{number} {BREEDS.index(breed) + 1} 1 1\n" for breed, number in entries]
    root = lists(tmp_path_factory.mktemp("pets"), "".join(lines), f"{entries[0][0]}_301 {lines[0].split(' ', 1)[1]}")
    source = open_source("pets", root)
    assert [source.label_names[r.labels] for r in source] == [breed for breed, _ in entries] + [entries[0][0]]
    assert list(source.label_names) == sorted({breed for breed, _ in entries})


@pytest.mark.parametrize(
    ("trainval", "test", "message"),
    [
        ("pug_1 1 2 1\npug_x 1 2 1\n", "pug_3 1 2 1\n", "trainval.txt, line 2: 'pug_x 1 2 1' is no entry; lines look"),
        ("pug_1 1 2\n", "pug_3 1 2 1\n", "trainval.txt, line 1: 'pug_1 1 2' is no entry"),
        ("../pug_1 1 2 1\n", "pug_3 1 2 1\n", "trainval.txt, line 1: '../pug_1 1 2 1' is no entry"),
        ("pug_1 1 3 1\n", "pug_3 1 2 1\n", "trainval.txt, line 1: 'pug_1 1 3 1' is no entry"),
        ("pug_1 1 2 1\n", "# x\npug_1 1 2 1\n", "test.txt, line 2: pug_1 is already in trainval.txt, line 1"),
        ("pug_1 1 2 1\npug_1 1 2 1\n", "pug_3 1 2 1\n", "trainval.txt, line 2: .* is already in line 1"),
        (
            "pug_1 1 2 1\n",
            "boxer_3 2 2 1\n",
            "test.txt, line 1: boxer_3 is of the class boxer, which trainval.txt does",
        ),
        ("pug_1 1 2 1\n", "\n", "test.txt names no image"),
    ],
)
def test_wrong_lists(tmp_path: Path, trainval: str, test: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_source("pets", lists(tmp_path, trainval, test))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("second", ["pug_2 2 2 1", "boxer_2 1 2 1"])
def test_a_class_number_that_does_not_fit_is_said(tmp_path: Path, second: str) -> None:
    source = open_source("pets", lists(tmp_path, f"pug_1 1 2 1\n{second}\n", "pug_3 1 2 1\n"))
    assert len(source.notes) == 1 and f"line 2: the class number of {second.split(maxsplit=1)[0]} is" in source.notes[0]
    assert [source.label_names[record.labels] for record in source] == ["pug", second.partition("_")[0], "pug"]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations/trainval.txt is missing; --root must be the folder of pets"):
        open_source("pets", tmp_path)
    root = write_pets(tmp_path / "pets")
    (root / "images" / "pug_1.jpg").unlink(missing_ok=True)
    (root / "images" / "pug_2.jpg").unlink(missing_ok=True)
    gone = sum(r.source_id in ("pug_1", "pug_2") for r in open_source("pets", root))
    assert gone
    with pytest.raises(
        ValueError, match=rf"images/pug_\d.jpg \(split \w+, row .*\) is missing or empty, and with it {gone} of"
    ):
        from_records(open_source("pets", root), keys.PUBLIC_SALT)
    with pytest.raises(ValueError, match="The source pets has no option 'protocol'; it has none"):
        open_source("pets", root, protocol="paper")
