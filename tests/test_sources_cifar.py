"""CIFAR-10 and -100 from archives and folders, against torchvision's own reading of the same files."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT
from official.cifar10 import CLASSES, pickle2, store, write_cifar10
from official.cifar100 import write_cifar100
from PIL import Image
from torchvision import datasets

from scaletransfer import make_shards
from scaletransfer.image_files import read_image
from scaletransfer.index import from_records, load_index
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.loader import ShardDataset, Source
from scaletransfer.sources import open_source, source_options

WRITERS = {"cifar10": write_cifar10, "cifar100": write_cifar100}
THEIRS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def theirs(name: str, root: Path, train: bool):
    """The class of torchvision, without its check of the official files' hashes (None is no hash)."""
    cls = THEIRS[name]
    own = {
        "train_list": [[file, None] for file, _ in cls.train_list],
        "test_list": [[file, None] for file, _ in cls.test_list],
        "meta": {**cls.meta, "md5": None},
    }
    return type("Unchecked", (cls,), own)(root, train=train)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_pixels_and_labels_are_torchvisions(tmp_path: Path, name: str, archive: bool) -> None:
    WRITERS[name](tmp_path / "loose", archive=False)
    root = WRITERS[name](tmp_path / "root", archive=archive)
    source = open_source(name, root)
    records = list(source)
    assert records == list(source) and source.public and source.task == "multiclass"
    for split, train in (("train", True), ("test", False)):
        expected = theirs(name, tmp_path / "loose", train)
        assert source.label_names == tuple(expected.classes)
        mine = [record for record in records if record.split == split]
        assert [record.labels for record in mine] == expected.targets
        for record, (picture, _) in zip(mine, expected, strict=True):
            found = Image.open(io.BytesIO(read_image(root, record.image, record.span)))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(picture))
    assert {record.split for record in records} == {"train", "test"}


def test_records(tmp_path: Path) -> None:
    packed = list(open_source("cifar10", write_cifar10(tmp_path / "a")))
    loose = list(open_source("cifar10", write_cifar10(tmp_path / "b", archive=False)))
    inside = list(open_source("cifar10", tmp_path / "b/cifar-10-batches-py"))
    assert packed[17].image == "cifar-10-python.tar.gz//cifar-10-batches-py/data_batch_1//17.png"
    assert loose[17].image == "cifar-10-batches-py/data_batch_1//17.png"
    assert inside[17].image == "data_batch_1//17.png" and packed[17].source_id == "data_batch_1/17"
    assert packed[20].source_id == "data_batch_2/0" and packed[100].source_id == "test_batch/0"
    for other in (loose, inside):
        assert [(r.source_id, r.split, r.labels) for r in packed] == [(r.source_id, r.split, r.labels) for r in other]
    source = open_source("cifar10", tmp_path / "a")
    assert list(source) and source.label_names == CLASSES
    assert source.notes == [
        "the split train has 100 images; the official cifar10 has 50,000.",
        "the split test has 20 images; the official cifar10 has 10,000.",
    ]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_batches_that_python_3_wrote_with_bytes(tmp_path: Path, protocol: int) -> None:
    """Keys and names as bytes, which is how Python 3 shows the official files (pickle.load(..., encoding="bytes"))."""
    root = write_cifar10(tmp_path, archive=False)
    before = open_source("cifar10", root)
    expected, names = list(before), before.label_names
    for file in (root / "cifar-10-batches-py").iterdir():
        content = pickle.loads(file.read_bytes(), encoding="bytes")  # noqa: S301 - written by us just now
        file.write_bytes(pickle.dumps(content, protocol))
    after = open_source("cifar10", root)
    assert (list(after), after.label_names) == (expected, names)


def test_fine_and_coarse_labels(tmp_path: Path) -> None:
    root = write_cifar100(tmp_path)
    fine, coarse = open_source("cifar100", root), open_source("cifar100", root, labels="coarse")
    assert (len(fine.label_names), len(coarse.label_names)) == (100, 20)
    assert fine.label_names[3] == "fine 03" and coarse.label_names[3] == "coarse 03"
    pairs = [(a.labels, b.labels) for a, b in zip(fine, coarse, strict=True)]
    assert all(group == number * 7 % 20 for number, group in pairs) and {n for n, _ in pairs} == set(range(100))
    assert source_options("cifar100") == ("labels",) and source_options("cifar10") == ()
    with pytest.raises(ValueError, match=r"no labels 'corse' \(did you mean 'coarse'\?\)"):
        open_source("cifar100", root, labels="corse")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_shards_are_the_same_from_archive_and_folder(tmp_path: Path, name: str) -> None:
    hashes = []
    for number, (archive, workers) in enumerate(((True, 1), (True, 2), (False, 1))):
        root, out = WRITERS[name](tmp_path / f"data{number}", archive=archive), tmp_path / f"out{number}"
        assert make_shards.main([name, "--root", str(root), "--out", str(out), "--workers", str(workers)]) == 0
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()})
    assert hashes[0] == hashes[1] == hashes[2] and len(hashes[0]) > 6
    # from files, as fine-tuning reads them, and from the shards: the same samples
    memory, stored = from_records(open_source(name, root), PUBLIC_SALT), load_index(out)
    assert memory.label_names == stored.label_names and memory.image.channels == stored.image.channels == 3
    for split in ("train", "test"):
        batches = []
        for index in (memory, stored):
            dataset = ShardDataset(
                [Source(index=index, split=split, policy="corrected", names=())], None, _as_it_is, 3, 0
            )
            batches.append(dataset.__getitems__(np.argsort(index.table(split)["key"]).tolist()))
        for entry in ("image", "target", "key"):
            assert torch.equal(batches[0][entry], batches[1][entry])
        assert batches[0]["image"].shape[1:] == (3, 32, 32)


def _as_it_is(image: torch.Tensor) -> torch.Tensor:
    return image


def test_the_listing_and_few_images(tmp_path: Path) -> None:
    root, table = write_cifar100(tmp_path / "data"), tmp_path / "list.csv"
    command = ["cifar100", "--root", str(root), "--list", str(table), "--check-images", "--option", "labels=coarse"]
    assert make_shards.main(command) == 0
    lines = table.read_text().splitlines()
    assert len(lines) == 301 and lines[1].endswith("train/0,0") and "train//0.png" in lines[1]
    out = tmp_path / "out"
    assert make_shards.main([*command[:3], "--out", str(out), "--option", "labels=coarse", "--limit", "30"]) == 0
    index = load_index(out)
    assert index.options["labels"] == "coarse" and index.splits["train"].samples == 30
    assert from_records(open_source("cifar100", root), SALT).splits["test"].samples == 100


def damaged(tmp_path: Path, name: str, **entries: object) -> Path:
    """CIFAR-10 whose file `name` has these entries; None: the file is not there."""
    root = write_cifar10(tmp_path, archive=False)
    folder = root / "cifar-10-batches-py"
    if not entries:
        (folder / name).unlink()
        return root
    whole = {"labels": [0, 1], "data": np.zeros((2, 3072), np.uint8), **entries}
    (folder / name).write_bytes(pickle2({key: value for key, value in whole.items() if value is not None}))
    return root


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("data_batch_3", {}, "data_batch_3 is missing"),
        ("batches.meta", {}, "batches.meta is missing"),
        ("batches.meta", {"label_names": ["a"] * 10}, "names 1 classes in 'label_names', cifar10 has 10"),
        ("batches.meta", {"label_names": [str(n) for n in range(9)]}, "names 9 classes"),
        ("batches.meta", {"label_names": list(range(10))}, "no list 'label_names' of names"),
        ("batches.meta", {"x": 1}, "no list 'label_names'"),
        ("data_batch_2", {"data": np.zeros((2, 3071), np.uint8)}, r"data_batch_2: 'data' must be bytes .* \[2, 3071\]"),
        ("data_batch_2", {"data": np.zeros(6144, np.uint8)}, r"must be bytes in the shape \[n, 3072\], not \[6144\]"),
        ("data_batch_2", {"data": [1, 2]}, "'data' must be bytes"),
        ("data_batch_2", {"data": None}, "'data' must be bytes .* not missing"),
        ("test_batch", {"labels": None}, "test_batch has 2 images and no labels in 'labels'"),
        ("test_batch", {"labels": [1]}, "2 images and 1 labels"),
        ("test_batch", {"labels": "ab"}, "no labels in 'labels'"),
        ("test_batch", {"labels": [1, 10]}, "test_batch, image 1: the label 10 is not a class from 0 to 9"),
        ("test_batch", {"labels": [-1, 1]}, "image 0: the label -1"),
        ("test_batch", {"labels": [1, "1"]}, "image 1: the label of the type str"),
    ],
)
def test_wrong_batches(tmp_path: Path, name: str, entries: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(open_source("cifar10", damaged(tmp_path, name, **entries)))


class Runs:
    """Makes a file where it is unpickled."""

    mark = ""

    def __reduce__(self):
        return open, (Runs.mark, "w")


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, archive: bool, file: str) -> None:
    import pickle

    Runs.mark = str(tmp_path / "it ran")
    write_cifar10(tmp_path / "good", archive=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "good/cifar-10-batches-py").iterdir()}
    files[file] = pickle.dumps({"data": Runs(), "labels": [], "label_names": []}, 2)
    root = store(tmp_path / "bad", "cifar-10-batches-py", "cifar-10-python.tar.gz", files, archive)
    with pytest.raises(ValueError, match=rf"{file} is no batch of CIFAR: it asks for \w+\.open.*nothing of it was run"):
        list(open_source("cifar10", root))
    place = "cifar-10-python.tar.gz//cifar-10-batches-py" if archive else "cifar-10-batches-py"
    with pytest.raises(ValueError, match=r"asks for \w+\.open"):
        read_image(root, f"{place}/{file}//0.png")
    with pytest.raises(ValueError, match="asks for"):
        make_shards.main(["cifar10", "--root", str(root), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "it ran").exists()


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither cifar-10-batches-py nor cifar-10-python\.tar\.gz"):
        open_source("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is not a readable tar\.gz file"):
        open_source("cifar10", tmp_path)
    store(tmp_path / "few", "cifar-10-batches-py", "cifar-10-python.tar.gz", {"data_batch_1": b""}, True)
    with pytest.raises(ValueError, match="data_batch_1 is no batch of CIFAR: it is damaged"):
        open_source("cifar10", tmp_path / "few")
