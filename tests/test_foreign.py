"""The index of tars that others made: what it says is what webdataset reads, and what changed since is noticed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from helpers_data import SALT
from helpers_foreign import (
    FINDINGS,
    images_of,
    index_of,
    picture,
    refused,
    states,
    write_cls,
    write_img2dataset,
    write_json,
    write_tar,
)
from PIL import Image

from scaletransfer import foreign
from scaletransfer.check_data import main as check_data_main
from scaletransfer.cli import run_command
from scaletransfer.foreign_labels import LabelRule
from scaletransfer.foreign_scan import Settings
from scaletransfer.index import load_index
from scaletransfer.shard_reader import ShardReader, read_image
from scaletransfer.shards import shards_main
from scaletransfer.storage_settings import RemoteSettings


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


def test_an_image_that_is_none_is_named_by_tar_and_byte(tmp_path):
    tar = write_tar(tmp_path / "t" / "a.tar", [("x.jpg", b"no image"), ("x.cls", b"1")]) / "a.tar"
    assert f"{tar}: the image at byte 512 is not an image that can be read" in refused(tar.parent)


def test_a_flipped_byte_of_an_image_is_noticed(tmp_path, capsys):
    """Also where the header is as it was and a decoder would not mind: the CRC-32 was taken when it was indexed."""
    folder = write_cls(tmp_path / "a", "train", 5)
    index = index_of(folder)
    row = index.table("train")[2]
    place, path = int(row["offset"]), folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[place + int(row["size"]) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"train-000000\.tar at offset {place} is damaged .* shards index DIR --overwrite"
    ):
        images_of(index)
    assert shards_main(["verify", "--no-decode", str(folder)]) == 1
    assert f"train-000000.tar at byte {place}: the image does not have the CRC-32" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["range", "cache"])
def test_tars_behind_a_url(tmp_path, mode):
    """Long names as well, whose headers are asked for apart."""
    members = [
        (f"{'long' * 60}/{n}.{ext}", data) for n in range(3) for ext, data in (("jpg", picture(n)), ("cls", b"1"))
    ]
    folder = write_tar(tmp_path / "t" / "a.tar", members)
    index_of(folder)
    remote = fsspec.filesystem("memory")
    for path in folder.iterdir():
        remote.pipe(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    settings = RemoteSettings(mode=mode, cache_dir=str(tmp_path / "cache"))
    index, reader = load_index(f"memory://{tmp_path.name}", settings), ShardReader(settings)
    assert [read_image(reader, index, "train", row) for row in range(3)] == [picture(row) for row in range(3)]


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


def test_other_commands(tmp_path, capsys):
    folder = write_json(tmp_path / "films", "train", 12)
    index_of(folder, "--label", "json:findings", "--licence", "mine\nalone")
    assert run_command(check_data_main, [str(folder), "--out", str(tmp_path / "checks")]) == 0
    assert shards_main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "train  12 samples, 2 shards" in told and "licence: mine alone" in told
    with pytest.raises(ValueError, match="tars that make_shards has not made"):
        shards_main(["verify", "--repair", str(folder)])


def test_a_damaged_naming_is_refused(tmp_path):
    folder = write_cls(tmp_path / "a", "train", 5)
    index = index_of(folder)
    index.encoder["secret"] = "x"
    with pytest.raises(ValueError, match="field 'encoder' of the index is damaged"):
        images_of(index)


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
