"""Tars that others made: what the index says is what webdataset reads, and what is hostile or odd is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers_data import SALT
from helpers_foreign import (
    FINDINGS,
    add,
    picture,
    states,
    write_cls,
    write_img2dataset,
    write_json,
    write_tar,
)
from PIL import Image

from scaletransfer import foreign
from scaletransfer.foreign_labels import LabelRule
from scaletransfer.foreign_scan import Settings, choose_splits
from scaletransfer.index import ShardIndex, load_index
from scaletransfer.shard_reader import ShardReader, read_image
from scaletransfer.shards import shards_main


def index_of(folder: Path, *options: str) -> ShardIndex:
    """The index that the command writes into `folder`."""
    assert shards_main(["index", str(folder), "--public", *options]) == 0
    return load_index(folder)


def refused(folder: Path, *options: str) -> str:
    """The sentence by which the command refuses."""
    with pytest.raises(ValueError) as error:
        shards_main(["index", str(folder), "--public", *options])
    text = str(error.value)
    assert "\n" not in text and not (folder / "index.json").exists()
    return text


def images_of(index: ShardIndex, split: str = "train") -> list[bytes]:
    reader = ShardReader()
    return [read_image(reader, index, split, row) for row in range(index.splits[split].samples)]


def by_webdataset(folder: Path, split: str = "") -> Iterator[dict[str, Any]]:
    tars = sorted(str(path) for path in folder.glob(f"{split}*.tar"))
    return iter(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


# ---- what is read


def test_classes_of_shard_writer(tmp_path):
    """The same images and classes in the same order as webdataset itself reads, of several kinds of images."""
    folder = write_cls(tmp_path / "Some Set", "train", 17, extensions=("jpg", "png", "webp"))
    write_cls(folder, "val", 6, start=100)
    index = index_of(folder)
    for split, prefix in (("train", "train"), ("valid", "val")):
        theirs = list(by_webdataset(folder, prefix))
        images = [sample.get("jpg") or sample.get("png") or sample["webp"] for sample in theirs]
        assert images_of(index, split) == images
        assert index.table(split)["label"].tolist() == [int(sample["cls"]) for sample in theirs]
    assert (index.task, index.label_names, index.source) == ("multiclass", ("0", "1", "2"), "some_set")
    assert (index.image.extension, index.image.channels, index.image.bit_depth) == ("", 3, 8)
    assert [shard.samples for shard in index.splits["train"].shards] == [5, 5, 5, 2]
    numbers = np.concatenate([index.table(split)["key"] for split in index.splits])
    assert len(set(numbers.tolist())) == 23


def test_findings_of_json(tmp_path):
    folder = write_json(tmp_path / "films", "train", 13)
    index = index_of(folder, "--label", "json:findings")
    theirs = list(by_webdataset(folder))
    assert images_of(index) == [sample["png"] for sample in theirs]
    assert index.label_names == FINDINGS and index.label_kind == "states"
    assert index.table("train")["labels"].tolist() == [states(number) for number in range(13)]
    assert (index.image.extension, index.image.channels) == ("png", 1)
    assert index.splits["train"].totals["Hernia"] == {
        "positive": 4,
        "negative": 3,
        "uncertain": 3,
        "not_mentioned": 3,
    }


def test_img2dataset(tmp_path):
    """Captions, the statistics beside the tars and all fields but one are left alone; two processes give the same."""
    folder = write_img2dataset(tmp_path / "laion")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = index_of(folder, "--label", "json:label", "--label-names", "cat,dog,emu")
    theirs = list(by_webdataset(folder))
    assert images_of(index) == [sample["jpg"] for sample in theirs] and len(theirs) == 12
    assert index.table("train")["label"].tolist() == [json.loads(sample["json"])["label"] for sample in theirs]
    assert index.label_names == ("cat", "dog", "emu") and index.image.extension == "jpg"
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: written[name] for name in before} == before
    assert set(written) - set(before) == {"index.json", "samples-train.npy"}
    options = ["--label", "json:label", "--label-names", "cat,dog,emu", "--workers", "2", "--overwrite"]
    index_of(folder, *options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


def test_our_own_shards_are_foreign_tars_to_the_command(tmp_path):
    """Without their index they are tars with a list of states."""
    sample = Path(__file__).parents[1] / "shards" / "sample"
    own = load_index(sample)
    for path in sample.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index = index_of(tmp_path, "--label", "json:labels", "--label-names", ",".join(own.label_names))
    for split in own.splits:
        ours, theirs = own.table(split), index.table(split)
        for column in ("shard", "offset", "size", "labels"):
            np.testing.assert_array_equal(ours[column], theirs[column])
        assert not set(ours["key"].tolist()) & set(theirs["key"].tolist())


def test_deep_images(tmp_path):
    members = [
        (f"{n}.{ext}", data) for n in range(4) for ext, data in (("png", picture(n, "png", "I;16")), ("cls", b"0"))
    ]
    index = index_of(write_tar(tmp_path / "t" / "a.tar", members))
    assert (index.image.bit_depth, index.image.channels, index.image.pixel_max) == (16, 1, 4095)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unusual_names(tmp_path, form):
    """A header holds 100 bytes of a name; what is longer, or not ASCII, stands in headers of its own before it."""
    long = "/".join(["a folder with a long name"] * 3)
    stems = ["short", f"{long}/one", f"{long}/two", "./dot/three", "v1.2/four"]
    if form != tarfile.USTAR_FORMAT:
        stems += [f"{'x' * 300}/{number}" for number in range(3)] + ["größe/Ω", "y" * 4000]
    members = []
    for number, stem in enumerate(stems):
        members += [(f"{stem}.JPG", picture(number)), (f"{stem}.cls", str(number % 2).encode())]
    folder = write_tar(tmp_path / "t" / "a.tar", members, form)
    index = index_of(folder)
    assert images_of(index) == [picture(number) for number in range(len(stems))]
    assert [sample["jpg"] for sample in by_webdataset(folder)] == images_of(index)


def test_members_of_other_kinds_are_not_read(tmp_path):
    """Nor unpickled, which would leave a file."""
    planted = tmp_path / "planted"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (planted,)

    harm = pickle.dumps(Harm())
    members = [("__meta__/a.json", b"{"), ("__note__", b""), (".hidden.jpg", b"?"), ("readme", b"no dot")]
    for number in range(3):
        kinds = {"pyd": harm, "pickle": harm, "pth": harm, "seg.png": b"?", "txt": b"\xff", "cls": b" 1\n"}
        members += [(f"{number}.{extension}", data) for extension, data in kinds.items()]
        members.append((f"{number}.jpg", picture(number)))
    folder = write_tar(tmp_path / "t" / "a.tar", members)
    index = index_of(folder)
    assert images_of(index) == [picture(number) for number in range(3)]
    assert not planted.exists() and {path.name for path in tmp_path.iterdir()} == {"t"}


def test_keys_need_the_salt_unless_public(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = write_cls(tmp_path / "set", "train", 5)
    public = index_of(folder)
    known = set(public.keys("train", slice(None)))
    assert shards_main(["index", str(folder), "--overwrite"]) == 0
    secret = load_index(folder)
    assert public.salt_fingerprint != secret.salt_fingerprint
    assert not known & set(secret.keys("train", slice(None)))
    text = (folder / "index.json").read_text()
    assert (tmp_path / "config/scaletransfer/salt").read_text().strip() not in text and "img0" not in text


def test_names_that_begin_anew_in_each_tar(tmp_path):
    folder = tmp_path / "t"
    for shard in range(2):
        members = [
            (f"{n}.{ext}", data) for n in range(3) for ext, data in (("jpg", picture(9 * shard + n)), ("cls", b"0"))
        ]
        write_tar(folder / f"{shard}.tar", members)
    text = refused(folder)
    assert "1.tar" in text and "0.tar" in text and "'0.jpg' at byte 512" in text and "--keys-of-shard" in text
    index = index_of(folder, "--keys-of-shard")
    assert images_of(index) == [picture(9 * shard + n) for shard in range(2) for n in range(3)]
    shutil.copy(folder / "0.tar", folder / "1.tar")
    with pytest.raises(ValueError, match=r"1\.tar.*is not the image of that sample.*--overwrite"):
        images_of(load_index(folder))


# ---- where the index goes, and splits


def test_another_folder_for_the_index(tmp_path):
    folder = write_cls(tmp_path / "set", "train", 6)
    before = sorted(folder.iterdir())
    assert shards_main(["index", str(folder), "--public", "--out", str(tmp_path / "out")]) == 0
    assert sorted(folder.iterdir()) == before
    index = load_index(tmp_path / "out")
    assert images_of(index) == [picture(number) for number in range(6)] and index.source == "set"


def test_an_index_is_replaced_only_when_asked(tmp_path):
    folder = write_cls(tmp_path / "set", "train", 6)
    index_of(folder)
    with pytest.raises(ValueError, match=r"index\.json exists: give --overwrite"):
        shards_main(["index", str(folder), "--public"])
    write_cls(folder, "train", 11)
    with pytest.raises(ValueError, match=r"index\.json says"):
        load_index(folder)
    assert index_of(folder, "--overwrite").splits["train"].samples == 11
    ours = Path(__file__).parents[1] / "shards" / "sample"
    with pytest.raises(ValueError, match=r"data\.format shards"):
        shards_main(["index", str(ours), "--public", "--overwrite"])


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


# ---- changed after they were indexed


def test_a_tar_of_the_same_size_with_other_content_is_noticed(tmp_path):
    """By the header before each image, as in our own shards; verify compares hashes."""
    folder, other = write_cls(tmp_path / "a", "train", 5), write_cls(tmp_path / "b", "train", 5, start=50)
    index = index_of(folder)
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    content = (other / "train-000000.tar").read_bytes()[: len(data)]
    path.write_bytes(content + bytes(len(data) - len(content)))
    with pytest.raises(
        ValueError, match=r"train-000000\.tar: the member at offset \d+ is not the image of that sample"
    ):
        images_of(index)
    for place in (345 - 512, 124 - 512, 0 - 512):  # prefix, size, name of a header
        row = index.table("train")[2]
        broken = bytearray(data)
        broken[int(row["offset"]) + place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is not the image of that sample"):
            images_of(load_index(folder))
    path.write_bytes(data)
    assert images_of(index) == [picture(number) for number in range(5)]


def test_verify(tmp_path, capsys):
    """Other tars and files may lie beside those that are indexed."""
    folder = write_img2dataset(tmp_path / "set")
    index = index_of(folder, "--label", "json:label", "--splits", "train={00000..00001}.tar")
    assert "not used: 1 tars" in capsys.readouterr().out
    assert shards_main(["verify", str(folder)]) == 0 and f"{folder}: ok" in capsys.readouterr().out
    row = index.table("train")[5]
    path, place = folder / "00001.tar", int(row["offset"])
    assert row["shard"] == 1
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes(200) + data[place + 200 :])
    assert shards_main(["verify", str(folder)]) == 1
    told = capsys.readouterr().out
    assert "00001.tar: sha256 differs" in told and f"00001.tar at byte {place}: the image cannot be used" in told
    path.write_bytes(data[: place - 512] + b"1" + data[place - 511 :])
    assert shards_main(["verify", "--no-decode", str(folder)]) == 1
    assert f"00001.tar: the member at offset {place} is not the image of that sample" in capsys.readouterr().out
    path.unlink()
    assert shards_main(["verify", str(folder)]) == 1
    assert "00001.tar is missing" in capsys.readouterr().out


def test_the_white_of_deep_images(tmp_path, capsys):
    """Some images are looked at for it; --pixel-max says it of all."""
    members = []
    for number in range(150):
        pixels = np.full((8, 8), 100 if number != 101 else 4000, np.uint16)
        pixels[0, 0] = number
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        members += [(f"{number}.png", buffer.getvalue()), (f"{number}.cls", b"0")]
    folder = write_tar(tmp_path / "t" / "a.tar", members)
    assert index_of(folder).image.deep_white == 255
    assert shards_main(["verify", str(folder)]) == 1
    assert "has the value 4000, larger than the white 255 of the index" in capsys.readouterr().out
    assert index_of(folder, "--pixel-max", "4000", "--overwrite").image.deep_white == 4095
    assert shards_main(["verify", str(folder)]) == 0


def test_a_damaged_naming_is_refused(tmp_path):
    folder = write_cls(tmp_path / "a", "train", 5)
    index = index_of(folder)
    index.encoder["secret"] = "x"
    with pytest.raises(ValueError, match="field 'encoder' of the index is damaged"):
        images_of(index)


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


# ---- which of the two a folder is


def test_the_format_of_a_folder(tmp_path):
    theirs = index_of(write_cls(tmp_path / "set", "train", 5))
    ours = load_index(Path(__file__).parents[1] / "shards" / "sample")
    foreign.check_format(theirs, "webdataset")
    foreign.check_format(ours, "shards")
    with pytest.raises(ValueError, match=r"set data\.format to webdataset"):
        foreign.check_format(theirs, "shards")
    with pytest.raises(ValueError, match=r"set data\.format to shards"):
        foreign.check_format(ours, "webdataset")
    foreign.check_indexed(tmp_path / "set", "webdataset")
    foreign.check_indexed(tmp_path, "shards")
    with pytest.raises(ValueError, match=r"has no index\.json.*scaletransfer shards index"):
        foreign.check_indexed(tmp_path, "webdataset")


def test_the_python_side(tmp_path):
    folder = write_cls(tmp_path / "set", "train", 6)
    settings = Settings(name="mine", labels=LabelRule.of("cls"), label_names=("a", "b", "c"))
    told: list[int] = []
    index = foreign.index_tars(
        folder, {"train": ["train-000000.tar"], "test": ["train-000001.tar"]}, settings, SALT, progress=told.append
    )
    assert list(index.splits) == ["train", "test"] and told == [1, 1]
    assert index.splits["test"].totals == {"a": 0, "b": 0, "c": 1}
