"""ImageNet from folders, tars and tars of tars: the same records, the same shards, torchvision's classes and labels."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from official.imagenet1k import DEVKIT, KAGGLE, TRAIN_TAR, VALID_TAR, WNIDS, draw, meta_mat, put, tar, write_imagenet1k
from official.imagenet21k import write_imagenet21k
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets import imagenet as their_imagenet

from scaletransfer import make_shards
from scaletransfer.decode import decode
from scaletransfer.image_files import read_image
from scaletransfer.index import ShardIndex, from_records, load_index
from scaletransfer.keys import PUBLIC_SALT, key
from scaletransfer.loader import ShardDataset, Source
from scaletransfer.sources import open_source, source_options

LAYOUTS = {
    "tar": {},
    "folders": {"train_as": "folders", "valid_as": "folders"},
    "tars and flat": {"train_as": "tars", "valid_as": "flat", "labels_as": "devkit"},
    "a list": {"train_as": "folders", "valid_as": "tar", "labels_as": "list"},
    "kaggle": {"train_as": "folders", "valid_as": "flat", "labels_as": "kaggle", "base": KAGGLE},
}


def told(records):
    """What may not depend on the layout."""
    return [(r.source_id, r.split, r.patient, r.labels, r.view) for r in records]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_records_and_bytes_do_not_depend_on_the_layout(tmp_path: Path, layout: str) -> None:
    root = write_imagenet1k(tmp_path / "a", **LAYOUTS[layout])
    other = write_imagenet1k(tmp_path / "b", train_as="folders", valid_as="folders")
    mine, plain = open_source("imagenet1k", root), open_source("imagenet1k", other)
    records, expected = list(mine), list(plain)
    assert records == list(mine) and told(records) == told(expected)
    assert mine.label_names == plain.label_names == WNIDS[:4]
    assert mine.notes == plain.notes and mine.left_out == plain.left_out
    assert mine.public and mine.task == "multiclass" and source_options("imagenet1k") == ()
    for record, same in zip(records, expected, strict=True):
        assert read_image(root, record.image, record.span) == (other / same.image).read_bytes()
    assert [r.source_id for r in records if r.split == "valid"] == [f"ILSVRC2012_val_{n:08d}" for n in range(1, 13)]
    if layout == "tar":
        file, inner, name = records[0].image.split("//")
        assert (file, inner) == (TRAIN_TAR, "n01440764.tar") and name == f"{records[0].source_id}.JPEG"


def test_classes_and_labels_are_torchvisions(tmp_path: Path) -> None:
    root = write_imagenet1k(tmp_path / "b", train_as="folders", valid_as="folders")
    records = list(open_source("imagenet1k", write_imagenet1k(tmp_path / "a")))
    for split, folder in (("train", "train"), ("valid", "val")):
        theirs = ImageFolder(root / folder)
        labels = {Path(path).stem: label for path, label in theirs.samples}
        assert labels == {r.source_id: r.labels for r in records if r.split == split}
        if split == "train":
            assert tuple(theirs.classes) == open_source("imagenet1k", root).label_names


def test_the_devkit_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_imagenet1k(tmp_path, valid=40)
    monkeypatch.setattr(their_imagenet, "_verify_archive", lambda *_: None)  # the official file's hash
    their_imagenet.parse_devkit_archive(root)
    _, wnids = their_imagenet.load_meta_file(root)
    source = open_source("imagenet1k", root)
    found = [source.label_names[r.labels] for r in source if r.split == "valid"]
    assert found == wnids and len(set(found)) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_from_a_tar_of_tars_are_those_from_folders(tmp_path: Path, workers: int) -> None:
    """Every file, index.json included; the PNG and the CMYK image by the name of JPEG are kept as they are."""
    made = {}
    for layout in ("tar", "folders", "kaggle"):
        root = write_imagenet1k(tmp_path / layout, per_class=20, valid=70, **LAYOUTS[layout])
        out = tmp_path / f"out {layout}"
        command = ["imagenet1k", "--root", str(root), "--out", str(out)]
        assert make_shards.main([*command, "--workers", str(workers if layout == "tar" else 1)]) == 0
        made[layout] = hashes(out)
    assert made["tar"] == made["folders"] == made["kaggle"] and len(made["tar"]) == 8 + 8 + 2 + 2 + 1 + 1
    index = load_index(out)
    assert (index.image.extension, index.image.channels) == ("jpg", 3) and index.encoder == {"name": "original"}
    assert all(not info.quarantine for info in index.splits.values())
    stored = {}
    for path in out.glob("train-*.tar"):
        with tarfile.open(path) as shard:
            stored |= {info.name: shard.extractfile(info).read() for info in shard if info.name.endswith(".jpg")}
    originals = {path.read_bytes() for path in (tmp_path / "folders/train").rglob("*.JPEG")}
    assert set(stored.values()) == originals and len(originals) == 80
    kinds = [Image.open(io.BytesIO(data)) for data in stored.values()]
    assert {(p.format, p.mode) for p in kinds} == {("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "CMYK")}


def test_fine_tuning_reads_from_the_tar_what_is_in_the_shards(tmp_path: Path) -> None:
    root, out = write_imagenet1k(tmp_path / "data"), tmp_path / "out"
    assert make_shards.main(["imagenet1k", "--root", str(root), "--out", str(out)]) == 0
    source = open_source("imagenet1k", root)
    memory, stored = from_records(source, PUBLIC_SALT), load_index(out)
    assert [shard.file for shard in memory.splits["train"].shards] == [TRAIN_TAR]
    assert [shard.file for shard in memory.splits["valid"].shards] == [VALID_TAR]
    for split in ("train", "valid"):
        assert memory.splits[split].totals == stored.splits[split].totals
        order = [np.argsort(index.table(split)["key"]) for index in (memory, stored)]
        one, other = (
            _images(index, split).__getitems__(rows.tolist())
            for index, rows in zip((memory, stored), order, strict=True)
        )
        for entry in ("image", "target", "key"):
            assert torch.equal(one[entry], other[entry])
    keys, dataset = memory.keys("train", slice(None)), _images(memory, "train")
    for record in list(source)[:5]:  # and what that is: the pixels of the image itself
        row = keys.index(key("imagenet1k", record.source_id, PUBLIC_SALT))
        decoded = decode(read_image(root, record.image, record.span), 3)
        assert torch.equal(dataset[row]["image"][0], _cut(decoded))


def _images(index: ShardIndex, split: str) -> ShardDataset:
    return ShardDataset([Source(index=index, split=split, policy="corrected", names=())], None, _cut, 3, 0)


def _cut(image: torch.Tensor) -> torch.Tensor:
    return image[:, :32, :32]


def test_the_listing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, table = write_imagenet1k(tmp_path / "data"), tmp_path / "list.csv"
    assert make_shards.main(["imagenet1k", "--root", str(root), "--list", str(table), "--check-images"]) == 0
    lines = table.read_text().splitlines()
    assert len(lines) == 1 + 24 + 12 and "n01440764.tar//n01440764_" in lines[1]
    said = capsys.readouterr().err
    assert "4 classes; the official imagenet1k has 1,000." in said
    assert "24 training images; the official imagenet1k has 1,281,167." in said


def test_without_validation_or_training(tmp_path: Path) -> None:
    assert {r.split for r in open_source("imagenet1k", write_imagenet1k(tmp_path / "a", valid_as="none"))} == {"train"}
    root = write_imagenet1k(tmp_path / "b", valid=40)
    (root / TRAIN_TAR).unlink()
    source = open_source("imagenet1k", root)
    assert {r.split for r in source} == {"valid"} and source.label_names == WNIDS[:4]
    (root / VALID_TAR).unlink()
    with pytest.raises(ValueError, match="holds no images of ImageNet"):
        open_source("imagenet1k", root)


def test_names_that_are_not_the_sets_own(tmp_path: Path) -> None:
    """Equal names in two classes are two images; files that are no images are passed over and named."""
    for wnid in WNIDS[:2]:
        put(tmp_path / "train" / wnid, {"0001.png": b"x", "notes.txt": b"", ".DS_Store": b""})
    put(tmp_path / "train", {"readme": b""})
    source = open_source("imagenet1k", tmp_path)
    assert [r.source_id for r in source] == ["n01440764/0001", "n01443537/0001"]
    assert sorted(entry.partition(":")[0] for entry in source.skipped) == [
        "train/n01440764/notes.txt",
        "train/n01443537/notes.txt",
        "train/readme",
    ]


def bad(tmp_path: Path, what: str) -> Path:
    """A set with one thing wrong."""
    root = write_imagenet1k(tmp_path, train_as="folders", valid_as="flat", labels_as="devkit")
    truth, meta = root / DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt", root / DEVKIT / "data/meta.mat"
    lines = truth.read_text().splitlines()
    if what == "ID":
        truth.write_text("\n".join([*lines[:4], "5", *lines[5:]]))  # the synset above the others
    elif what == "text":
        truth.write_text("\n".join([*lines[:2], "cat", *lines[3:]]))
    elif what == "short":
        truth.write_text("\n".join(lines[:-1]))
    elif what == "mat":
        meta.write_bytes(b"MATLAB 5.0 MAT-file" + b"\0" * 200)
    elif what == "cut mat":
        meta.write_bytes(meta.read_bytes()[:700])
    elif what == "unknown":
        meta.write_bytes(meta_mat({"n99999999": 1, **{wnid: n for n, wnid in enumerate(WNIDS[1:4], 2)}}))
    elif what == "name":
        (root / "val/ILSVRC2012_val_00000003.JPEG").rename(root / "val/cat.JPEG")
    elif what == "empty":
        put(root / "train/n02000000", {})
    elif what == "two":
        put(root / "train/n01440764", {"n01440764_1.JPEG": b"", "n01440764_1.png": b""})
    elif what == "no labels":
        (root / DEVKIT).rename(root / "kit")
    return root


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ID", r"ground_truth\.txt, line 5: '5' is no ILSVRC2012_ID of a synset without children in meta\.mat"),
        ("text", r"ground_truth\.txt, line 3: 'cat'"),
        ("short", "not of the validation image ILSVRC2012_val_00000012"),
        ("mat", r"meta\.mat is not the devkit's table"),
        ("cut mat", r"meta\.mat is not the devkit's table"),
        ("unknown", r"ground_truth\.txt says n99999999 of the validation image ILSVRC2012_val_\d{8}, which has no tr"),
        ("name", "not of the validation image cat"),
        ("empty", "n02000000 holds no image"),
        ("two", r"n01440764_1\.JPEG and train/n01440764/n01440764_1\.png have one name"),
        ("no labels", "val has no folders for the synsets, and no file that says them"),
    ],
)
def test_wrong_sets(tmp_path: Path, what: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(open_source("imagenet1k", bad(tmp_path, what)))


def test_wrong_lists(tmp_path: Path) -> None:
    root = write_imagenet1k(tmp_path / "a", labels_as="list")
    labels = root / "imagenet_2012_validation_synset_labels.txt"
    labels.write_text(labels.read_text().replace("n0", "m0", 1))
    with pytest.raises(ValueError, match=r"labels\.txt, line 1: 'm0\d+' is not a synset"):
        open_source("imagenet1k", root)
    root = write_imagenet1k(tmp_path / "b", labels_as="kaggle")
    table = root / "LOC_val_solution.csv"
    rows = table.read_text().splitlines()
    for line, words in (
        ("ILSVRC2012_val_00000001,n01440764 1 1 2 2 n01443537 1 1 2 2", r"csv, line 14: .* is not one synset"),
        ("ILSVRC2012_val_00000001,", "is not one synset"),
        (f"{rows[1].partition(',')[0]},n99999999 1 1 2 2", "is there twice with other synsets"),
    ):
        table.write_text("\n".join([*rows, line]))
        with pytest.raises(ValueError, match=words):
            open_source("imagenet1k", root)
    table.write_text("\n".join(rows[:-1]))
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv has no line for the validation image"):
        list(open_source("imagenet1k", root))


def test_validation_folders_that_do_not_fit(tmp_path: Path) -> None:
    root = write_imagenet1k(tmp_path, train_as="folders", valid_as="folders")
    image = next((root / "val/n01440764").iterdir())
    put(root / "val/n01443537", {image.name: b""})
    with pytest.raises(ValueError, match="are one image"):
        list(open_source("imagenet1k", root))
    put(root / "val/n02000000", {"ILSVRC2012_val_00000099.JPEG": b""})
    with pytest.raises(ValueError, match="val/n02000000 has no counterpart among the training images"):
        open_source("imagenet1k", root)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (tar({"../../n01440764_1.JPEG": b"x"}), r"n01440764\.tar: .*no plain name"),
        (tar({"a.JPEG": b"1", "./a.JPEG": b"2"}), "two files of the name a.JPEG"),
        (tar({"x/a.JPEG": b"1", "y/a.JPEG": b"2"}), "have one name but for suffix or folder"),
        (tar({"a.JPEG": b"1" * 4000})[:2048], "ends inside of 'a.JPEG'"),
        (tar({}), "holds no image"),
        (b"no tar" * 300, "not a readable plain tar"),
    ],
)
def test_hostile_tars_inside_of_the_tar(tmp_path: Path, inner: bytes, words: str) -> None:
    (tmp_path / TRAIN_TAR).write_bytes(tar({"n01440764.tar": inner}))
    with pytest.raises(ValueError, match=words):
        list(open_source("imagenet1k", tmp_path))


def test_the_outer_tar(tmp_path: Path) -> None:
    one = tar({"n01440764_1.JPEG": b"x"})
    (tmp_path / TRAIN_TAR).write_bytes(tar({"n01440764.tar": one, "d/n01440764.tar": one}))
    with pytest.raises(ValueError, match="two tars of the synset n01440764"):
        open_source("imagenet1k", tmp_path)
    (tmp_path / TRAIN_TAR).write_bytes(one)
    with pytest.raises(ValueError, match="holds no tars of synsets"):
        open_source("imagenet1k", tmp_path)
    (tmp_path / TRAIN_TAR).write_bytes(tar({"n01440764.tar": one, "readme.txt": b""}))
    source = open_source("imagenet1k", tmp_path)
    assert len(list(source)) == 1 and source.skipped == [f"{TRAIN_TAR}//readme.txt: no tar of a synset"]


# ImageNet-21k


@pytest.mark.parametrize("protocol", ["corrected", "paper"])
def test_21k_shards_do_not_depend_on_the_layout(tmp_path: Path, protocol: str) -> None:
    made = []
    for number, kind in enumerate(("tars", "folders", "whole")):
        root = write_imagenet21k(tmp_path / kind, kind=kind)
        out = tmp_path / f"out{number}"
        command = ["imagenet21k", "--root", str(root), "--out", str(out), "--protocol", protocol, "--shard-size", "9"]
        assert make_shards.main([*command, "--workers", str(1 + number % 2)]) == 0
        made.append(hashes(out))
    assert made[0] == made[1] == made[2]
    index = load_index(out)
    assert index.options["protocol"] == protocol and set(index.splits) == {"train"}
    synsets = tuple(f"n{n:08d}" for n in (4475, 5787, 6024, 6484, 7846))
    assert index.label_names == (("(none)", *synsets) if protocol == "paper" else synsets)
    memory = from_records(open_source("imagenet21k", root, protocol=protocol), PUBLIC_SALT)
    for totals in (index.splits["train"].totals, memory.splits["train"].totals):
        assert totals == dict.fromkeys(synsets, 6) | ({"(none)": 0} if protocol == "paper" else {})
    first = 1 if protocol == "paper" else 0
    assert set(index.table("train")["label"].tolist()) == set(range(first, first + 5))


def test_21k_records_from_tars(tmp_path: Path) -> None:
    root = write_imagenet21k(tmp_path / "a")
    source = open_source("imagenet21k", root)
    records = list(source)
    assert records == list(source) and len(records) == 30 and {r.split for r in records} == {"train"}
    assert records[0].image == f"n00004475.tar//{records[0].source_id}.JPEG"
    assert source.notes == ["5 synsets; the official imagenet21k has 21,841."]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/train").symlink_to(root)
    assert told(open_source("imagenet21k", tmp_path / "b")) == told(records)
    with tarfile.open(root / "n00004475.tar") as tar_file:
        tar_file.extractall(root / "n00004475", filter="data")
    both = open_source("imagenet21k", root)
    assert told(both) == told(records)
    assert both.notes[0] == "1 synsets have a folder and a tar, n00004475 first; the folders were used."


def test_21k_with_a_list_of_classes(tmp_path: Path) -> None:
    root = write_imagenet21k(tmp_path / "data")
    (root / "some.txt").write_text("n00006024\n\nn00004475\n")
    source = open_source("imagenet21k", root, classes="some.txt")
    assert source.label_names == ("n00006024", "n00004475")
    assert [r.labels for r in source] == [0] * 6 + [1] * 6
    assert source.notes[0] == "3 synsets that some.txt doesn't list were passed over."
    paper = open_source("imagenet21k", root, classes=str(root / "some.txt"), protocol="paper")
    assert paper.label_names == ("(none)", "n00006024", "n00004475") and {r.labels for r in paper} == {1, 2}
    for content, words in (
        ("n00006024\nn00004476\n", r"some\.txt, line 2: the synset n00004476 is not in"),
        ("n00006024\nn00006024\n", r"line 2: n00006024 is already in line 1"),
        ("n00006024 cat\n", "line 1: 'n00006024 cat' is not a synset"),
        ("\n", "lists no synset"),
    ):
        (root / "some.txt").write_text(content)
        with pytest.raises(ValueError, match=words):
            open_source("imagenet21k", root, classes="some.txt")
    with pytest.raises(ValueError, match=r"The list of classes none\.txt is not there"):
        open_source("imagenet21k", root, classes="none.txt")
    with pytest.raises(ValueError, match="no protocol 'papers'"):
        open_source("imagenet21k", root, protocol="papers")


def test_21k_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no synsets"):
        open_source("imagenet21k", tmp_path)
    (tmp_path / "winter21_whole.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"can't be read one at a time from .*winter21_whole\.tar\.gz; unpack it"):
        open_source("imagenet21k", tmp_path)


def test_a_broken_image_is_quarantined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {f"n00004475_{n}.JPEG": draw(rng) for n in range(4)} | {"n00004475_9.JPEG": b"broken"}
    put(tmp_path / "data", {"n00004475.tar": tar(files)})
    assert make_shards.main(["imagenet21k", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    info = load_index(tmp_path / "out").splits["train"]
    assert info.samples == 4 and [entry["reason"] for entry in info.quarantine] == [
        "the file is not an image of a known format"
    ]
