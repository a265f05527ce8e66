"""Making shards through the Python API: bytes, determinism, quarantine, options, folders in use, verify."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from PIL import Image

from scaletransfer import keys
from scaletransfer.index import INDEX_NAME, load_index
from scaletransfer.shard_plan import shuffled
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import Encoding, build, plan_shards, verify
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]


def make(source: str, root: Path, out: Path, *, workers: int = 1, overwrite: bool = False, **options):
    plan = plan_shards(open_source(source, root), SALT, **options)
    return build(plan, out, workers=workers, overwrite=overwrite)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("shards") / "CheXpert-v1.0", rows=40, valid=12)


@pytest.fixture(scope="module")
def finished(root) -> Path:
    make("chexpert", root, root.parent / "finished", shard_size=7)
    return root.parent / "finished"


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- what is written


def test_members_are_pairs_in_plain_ustar(finished, root):
    records = {keys.key("chexpert", r.source_id, SALT): r for r in open_source("chexpert", root)}
    seen = set()
    for path in sorted(finished.glob("*.tar")):
        raw = path.read_bytes()
        assert raw[257:265] == b"ustar\x0000"
        pairs = members(path)
        assert len(pairs) % 2 == 0
        for (image, data), (label, text) in zip(pairs[::2], pairs[1::2], strict=True):
            key = image.name.removesuffix(".jpg")
            assert image.name == f"{key}.jpg" and label.name == f"{key}.json"
            record = records[key]
            assert data == (root / record.image).read_bytes()
            patient = keys.patient_code("chexpert", record.patient, SALT)
            content = {"labels": list(record.labels), "patient": patient, "view": record.view}
            assert text == json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
            for member in (image, label):
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                assert member.uname == member.gname == "" and member.isreg()
            seen.add(key)
    assert seen == set(records)


def test_class_sets_have_cls_members(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".JPEG")
    make("image_folder", root, tmp_path / "out")
    pairs = members(tmp_path / "out" / "train-000000.tar")
    classes = {keys.key("image_folder", r.source_id, SALT): r.labels for r in open_source("image_folder", root)}
    for (image, _), (label, text) in zip(pairs[::2], pairs[1::2], strict=True):
        key, extension = image.name.split(".")
        assert extension == "jpg" and label.name == f"{key}.cls"
        assert int(text) == classes[key]
    assert load_index(tmp_path / "out").splits["train"].totals == {"cat": 4, "dog": 4, "emu": 4}


def test_order_is_a_recorded_shuffle_that_never_changes():
    # A change here would make every existing folder of shards irreproducible.
    assert shuffled(10, 0, "train") == [3, 9, 0, 7, 4, 1, 8, 2, 6, 5]
    assert sorted(shuffled(1000, 3, "valid")) == list(range(1000))
    assert shuffled(1000, 3, "valid") != shuffled(1000, 4, "valid") != shuffled(1000, 4, "train")


def test_no_identifier_of_the_data_set_in_any_file(finished, root):
    records = list(open_source("chexpert", root))
    forbidden = {text for r in records for text in (r.source_id, r.patient, r.image, Path(r.image).name)}
    forbidden |= {str(root), root.name, str(REPOSITORY), "study1", "patient0"}
    for path in finished.rglob("*"):
        data = path.read_bytes()
        for text in forbidden:
            assert text.encode() not in data, f"{text!r} is in {path.name}"


def test_default_shard_sizes(tmp_path, root):
    plan = plan_shards(open_source("chexpert", root), SALT)
    assert plan.shard_size == {"train": 35, "valid": 11}  # few and small: one shard
    many = make_image_folder(tmp_path / "many", per_class=22, splits=("train",))
    plan = plan_shards(open_source("image_folder", many), SALT)
    sizes = [end - start for _, _, start, end in plan.shards()]
    assert sum(sizes) == 66 and len(sizes) >= 8 and max(sizes) - min(sizes) <= 6
    big = tmp_path / "big"
    for number in range(6):
        (big / "a").mkdir(parents=True, exist_ok=True)
        with open(big / "a" / f"{number}.jpg", "wb") as file:
            file.truncate(40_000_000)  # sparse: only its size is looked at
    assert plan_shards(open_source("image_folder", big), SALT).shard_size == {"train": 2}


# ---- determinism and interruptions


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_for_any_number_of_workers_and_any_time(finished, root, tmp_path, workers):
    make("chexpert", root, tmp_path / "out", shard_size=7, workers=workers)
    assert hashes(tmp_path / "out") == hashes(finished)


def test_another_seed_is_another_order(finished, root, tmp_path):
    make("chexpert", root, tmp_path / "out", shard_size=7, seed=1)
    first, second = load_index(finished), load_index(tmp_path / "out")
    ours, theirs = first.table("train")["key"], second.table("train")["key"]
    assert ours.tolist() != theirs.tolist() and sorted(ours) == sorted(theirs)


def start_build(root: Path, out: Path, salt: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "scaletransfer.make_shards", "chexpert", "--root", root, "--out", out]
    command += ["--salt-file", salt, "--workers", str(workers), "--shard-size", "20"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([str(c) for c in command], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_while_working_it_continues_to_the_same_bytes(tmp_path, workers):
    root = make_chexpert(tmp_path / "r", rows=500, valid=20, laterals=False)
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start_build(root, whole, salt, 1).wait(60) == 0

    process = start_build(root, out, salt, workers)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not (out / INDEX_NAME).exists(), "the build ended before it could be killed: make it longer"
    with pytest.raises(ValueError, match="unfinished"):
        load_index(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(f"{WORK_FOLDER}/*.tar.json")}
    assert 0 < len(kept) < 26
    times = {name: (out / name.removesuffix(".json")).stat().st_mtime_ns for name in kept}

    time.sleep(0.5 if workers > 1 else 0)  # workers notice that their parent is gone
    assert start_build(root, out, salt, workers).wait(60) == 0
    assert hashes(out) == hashes(whole)
    assert not list(out.rglob("*.tmp")) and not (out / WORK_FOLDER).exists()
    again = {name: (out / name.removesuffix(".json")).stat().st_mtime_ns for name in kept}
    assert again == times, "finished shards were written again"


def interrupt(root: Path, out: Path, after: int, **options) -> None:
    """Stop a build in this process after `after` samples."""

    class Stop(Exception):
        pass

    done = 0

    def progress(samples):
        nonlocal done
        done += samples
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        build(plan_shards(open_source("chexpert", root), SALT, **options), out, progress=progress)


def test_a_damaged_finished_shard_is_written_again(finished, root, tmp_path):
    out = tmp_path / "out"
    interrupt(root, out, 30, shard_size=7)
    shards = sorted(out.glob("*.tar"))
    assert len(shards) >= 3
    data = bytearray(shards[0].read_bytes())
    data[600] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    report = make("chexpert", root, out, shard_size=7)
    assert report.kept_shards == len(shards) - 2
    assert hashes(out) == hashes(finished)


# ---- folders in use


def test_finished_with_the_same_plan_nothing_is_touched(folder, root):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = make("chexpert", root, folder, shard_size=7)
    assert report.images == 0 and report.index.splits["train"].samples == 35
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_finished_with_other_options_is_refused_unless_overwritten(folder, root):
    before = hashes(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds finished shards made from other data or with other options"):
        make("chexpert", root, folder, shard_size=5)
    assert {**before, "notes.txt": hashlib.sha256(b"mine").hexdigest()} == hashes(folder)
    make("chexpert", root, folder, shard_size=18, overwrite=True)
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
        "valid-000000.tar",
    ]
    assert (folder / "notes.txt").read_text() == "mine" and verify(folder) == []


def test_interrupted_build_of_another_plan_is_refused(root, tmp_path):
    out = tmp_path / "out"
    interrupt(root, out, 10, shard_size=7)
    with pytest.raises(ValueError, match="interrupted; give the same options to continue it"):
        make("chexpert", root, out, shard_size=8)
    assert make("chexpert", root, out, shard_size=8, overwrite=True).kept_shards == 0
    assert verify(out) == []


def test_foreign_tars_are_not_overwritten(root, tmp_path):
    (tmp_path / "train-000000.tar").write_text("somebody's")
    with pytest.raises(ValueError, match=r"files such as train-000000\.tar"):
        make("chexpert", root, tmp_path)
    assert hashes(tmp_path).keys() == {"train-000000.tar"}


def test_two_builds_at_once_are_refused(root, tmp_path):
    refused = []

    def progress(samples):
        if not refused:
            with pytest.raises(ValueError, match="another make_shards is writing"):
                make("chexpert", root, tmp_path / "out")
            refused.append(True)

    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "out", progress=progress)
    assert refused and verify(tmp_path / "out") == []


# ---- images that cannot be used


def test_unusable_images_are_quarantined_with_reasons(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=20, valid=4, laterals=False)
    records = [r for r in open_source("chexpert", root) if r.split == "train"]

    def damage(number: int, data: bytes) -> str:
        (root / records[number].image).write_bytes(data)
        return keys.key("chexpert", records[number].source_id, SALT)

    whole = (root / records[0].image).read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    floats = io.BytesIO()
    Image.new("F", (8, 8)).save(floats, "TIFF")
    expected = {
        damage(1, b""): "the file is empty",
        damage(3, whole[: len(whole) // 2]): "the image is truncated",
        damage(5, b"<html>404</html>"): "not an image of a known format",
        damage(7, bomb.getvalue()): "decompression bomb",
        damage(9, floats.getvalue()): "pixel format F is not supported",
    }
    report = make("chexpert", root, tmp_path / "out", shard_size=4)
    info = report.index.splits["train"]
    assert info.samples == 15 and sum(shard.samples for shard in info.shards) == 15
    found = {entry["key"]: entry["reason"] for entry in info.quarantine}
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in found[key]
    assert not set(expected) & set(report.index.keys("train", slice(None)))
    assert verify(tmp_path / "out") == []
    make("chexpert", root, tmp_path / "again", shard_size=4, workers=2)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")


def test_a_shard_without_a_usable_image_has_no_file(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=6, valid=3, laterals=False)
    source = open_source("chexpert", root)
    plan = plan_shards(source, SALT, shard_size=2)
    for sample in plan.samples["train"][2:4]:
        (root / sample.image).write_bytes(b"")
    index = build(plan, tmp_path / "out").index
    names = [shard.file for shard in index.splits["train"].shards]
    assert names == ["train-000000.tar", "train-000002.tar"]
    assert index.table("train")["shard"].tolist() == [0, 0, 1, 1]
    assert verify(tmp_path / "out") == []


def test_a_split_without_a_usable_image_is_an_error_and_leaves_nothing(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=6, valid=3, laterals=False)
    for record in open_source("chexpert", root):
        if record.split == "valid":
            (root / record.image).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of the split 'valid' of chexpert can be used.*empty"):
        make("chexpert", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_images_stop_before_anything_is_written(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=6, valid=3, laterals=False)
    records = list(open_source("chexpert", root))
    for number in (2, 4):
        (root / records[number].image).unlink()
    with pytest.raises(ValueError, match=rf"2 of 9 images are missing; the first is row 3 .*{records[2].image}"):
        make("chexpert", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    index = make("chexpert", root, tmp_path / "out", allow_missing=True).index
    assert index.splits["train"].samples == 4
    assert [entry["reason"] for entry in index.splits["train"].quarantine] == ["the file is missing"] * 2


def test_all_images_missing_is_an_error_even_if_allowed(tmp_path):
    root = make_chexpert(tmp_path / "r", images=False)
    with pytest.raises(ValueError, match="not one image of the split 'train' is there; check --root"):
        make("chexpert", root, tmp_path / "out", allow_missing=True)


def test_equal_keys_are_refused(tmp_path, monkeypatch):
    root = make_image_folder(tmp_path / "images")
    monkeypatch.setattr(keys, "key", lambda source, source_id, salt: f"{source}-{len(source_id):016x}")
    with pytest.raises(ValueError, match="two records of image_folder have the key"):
        make("image_folder", root, tmp_path / "out")


# ---- formats and sizes


def test_mixed_formats_need_encode(tmp_path):
    root = make_image_folder(tmp_path / "images")
    draw_image(root / "train" / "cat" / "other.png", 5, mode="RGB")
    with pytest.raises(ValueError, match=r"24 jpg and 1 png.*--encode jpg or --encode png"):
        make("image_folder", root, tmp_path / "out")
    index = make("image_folder", root, tmp_path / "out", encoding=Encoding(encode="jpg")).index
    assert index.image.extension == "jpg" and index.encoder["name"] == "opencv" and index.encoder["quality"] == 95
    originals = {keys.key("image_folder", r.source_id, SALT): r.image for r in open_source("image_folder", root)}
    for member, data in members(tmp_path / "out" / "train-000000.tar")[::2]:
        original = originals[member.name.removesuffix(".jpg")]
        assert Image.open(io.BytesIO(data)).format == "JPEG"
        # what is JPEG already stays byte for byte
        assert (data == (root / original).read_bytes()) == original.endswith(".jpg")


def test_formats_that_readers_lack_need_encode(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".bmp")
    with pytest.raises(ValueError, match=r"bmp images.*--encode png"):
        make("image_folder", root, tmp_path / "out")
    make("image_folder", root, tmp_path / "out", encoding=Encoding(encode="png"))
    path = root / next(iter(open_source("image_folder", root))).image
    key = keys.key("image_folder", path.relative_to(root).as_posix(), SALT)
    data = {m.name: d for m, d in members(tmp_path / "out" / "train-000000.tar")}[f"{key}.png"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(path)))


def test_size_scales_down_only_and_grey_stays_grey(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=16, valid=4)
    index = make("chexpert", root, tmp_path / "out", encoding=Encoding(size=48, quality=80)).index
    assert index.image.size == 48 and index.image.channels == 1 and index.encoder["size"] == 48
    originals = {keys.key("chexpert", r.source_id, SALT): root / r.image for r in open_source("chexpert", root)}
    scaled = 0
    for member, data in members(tmp_path / "out" / "train-000000.tar")[::2]:
        original = Image.open(originals[member.name.removesuffix(".jpg")])
        image = Image.open(io.BytesIO(data))
        assert image.mode == "L"
        if min(original.size) <= 48:
            assert data == originals[member.name.removesuffix(".jpg")].read_bytes()
        else:
            scaled += 1
            assert min(image.size) == 48
            assert image.size == tuple(round(side * 48 / min(original.size)) for side in original.size)
            # antialiased: near the exact area means of the original, far nearer than its single pixels are
            small = np.asarray(original.resize(image.size, Image.Resampling.BOX), float)
            assert np.abs(np.asarray(image, float) - small).mean() < 25
    assert scaled > 3


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".png", mode="I;16")
    index = make("image_folder", root, tmp_path / "out").index
    assert (index.image.bit_depth, index.image.channels) == (16, 1)
    records = list(open_source("image_folder", root))
    highest = max(int(np.asarray(Image.open(root / r.image)).max()) for r in records)
    assert index.image.pixel_max == highest > 60_000
    make("image_folder", root, tmp_path / "small", encoding=Encoding(size=20))
    data = members(tmp_path / "small" / "train-000000.tar")[0][1]
    image = Image.open(io.BytesIO(data))
    assert image.mode == "I;16" and min(image.size) == 20 and np.asarray(image).max() > 300
    with pytest.raises(ValueError, match="16 bits a pixel and JPEG holds 8: give --encode png"):
        make("image_folder", root, tmp_path / "jpg", encoding=Encoding(encode="jpg"))
    assert not (tmp_path / "jpg").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_mixed_bit_depths_are_refused(tmp_path, workers):
    root = make_image_folder(tmp_path / "images", suffix=".png")
    draw_image(root / "train" / "cat" / "deep.png", 5, mode="I;16")
    with pytest.raises(ValueError, match="images of 8 and of 16 bits a pixel are mixed"):
        make("image_folder", root, tmp_path / "out", shard_size=5, workers=workers)
    assert not (tmp_path / "out").exists()


def test_channels_are_three_as_soon_as_one_image_has_colour(tmp_path):
    root = make_image_folder(tmp_path / "images", mode="L")
    assert make("image_folder", root, tmp_path / "grey").index.image.channels == 1
    draw_image(root / "train" / "cat" / "colour.jpg", 5, mode="RGB")
    assert make("image_folder", root, tmp_path / "colour").index.image.channels == 3


def test_reencoding_drops_what_the_file_says_beside_its_pixels(tmp_path):
    root = make_image_folder(tmp_path / "images", classes=("a",), per_class=1, splits=("train",))
    path = root / "train" / "a" / "img_0.jpg"
    image = Image.open(path)
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    image.save(path, exif=exif, comment=b"Jane Doe")
    make("image_folder", root, tmp_path / "out", encoding=Encoding(size=20))
    assert b"Jane Doe" not in (tmp_path / "out" / "train-000000.tar").read_bytes()


# ---- verify


def rewrite(folder: Path, name: str, change) -> None:
    """Write a shard anew from a changed list of (name, content)."""
    content = change([(member.name, data) for member, data in members(folder / name)])
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in content:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def accept_files(folder: Path) -> None:
    """Make the index agree with sizes and hashes of the shards, so that only deeper checks can object."""
    content = json.loads((folder / INDEX_NAME).read_text())
    for split in content["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            shard.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (folder / INDEX_NAME).write_text(json.dumps(content))
    for path in folder.glob("wids-*.json"):
        wids = json.loads(path.read_text())
        for shard in wids["shardlist"]:
            shard["filesize"] = (folder / shard["url"]).stat().st_size
        path.write_text(json.dumps(wids, sort_keys=True, indent=1) + "\n")


def test_a_sound_folder_has_no_problems(finished):
    assert verify(finished) == []


def test_verify_names_a_planted_pickle(folder):
    rewrite(folder, "train-000001.tar", lambda pairs: [*pairs, ("evil.pkl", b"cos\nsystem\n")])
    accept_files(folder)
    (problem,) = verify(folder)
    assert re.fullmatch(rf"{folder}/train-000001\.tar at byte \d+: unexpected member 'evil\.pkl'", problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[2:], "is missing"),
        (lambda pairs: pairs[2:] + pairs[:2], "not in the order of the table"),
        (lambda pairs: [pairs[1], pairs[0], *pairs[2:]], "not in the order of the table"),
        (lambda pairs: [*pairs, pairs[0]], "is there twice"),
        (
            lambda pairs: [pairs[0], (pairs[1][0], pairs[3][1]), *pairs[2:]],
            "does not say what the table says",
        ),
        (lambda pairs: [pairs[0], (pairs[1][0], b"[]"), *pairs[2:]], "does not say what the table says"),
        (
            lambda pairs: [(pairs[0][0], pairs[0][1] + b"x" * 600), *pairs[1:]],
            "does not lie where the table says",
        ),
    ],
)
def test_verify_finds_what_the_hashes_no_longer_show(folder, change, message):
    rewrite(folder, "train-000001.tar", change)
    accept_files(folder)
    problems = verify(folder)
    assert problems and any(message in problem for problem in problems)


def test_verify_finds_changed_bytes_totals_and_strays(folder):
    path = folder / "valid-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    (folder / "train-000099.tar").write_bytes(b"")
    (folder / "_info.json").unlink()
    content = json.loads((folder / INDEX_NAME).read_text())
    content["splits"]["train"]["totals"]["Edema"]["positive"] += 1
    content["splits"]["train"]["patients"] += 1
    (folder / INDEX_NAME).write_text(json.dumps(content))
    problems = "\n".join(verify(folder))
    for message in (
        "valid-000000.tar: sha256 differs",
        "does not have the CRC-32 of the table",
        "train-000099.tar does not belong",
        "_info.json is missing",
        "the totals of the split train",
        "the number of patients of the split train",
    ):
        assert message in problems
    assert len(problems.splitlines()) == 6


def test_verify_of_a_folder_without_an_index(tmp_path):
    assert len(verify(tmp_path)) == 1 and "unfinished or not a shard folder" in verify(tmp_path)[0]


# ---- the sample set of the repository


def test_the_sample_set_is_sound_and_small():
    folder = REPOSITORY / "shards" / "sample"
    assert verify(folder) == []
    assert sum(path.stat().st_size for path in folder.iterdir()) < 60_000
    index = load_index(folder)
    assert index.salt_fingerprint == keys.fingerprint(keys.PUBLIC_SALT)
    assert {split: info.samples for split, info in index.splits.items()} == {"train": 9, "valid": 3}


def test_its_tool_draws_it_again(tmp_path):
    command = [sys.executable, REPOSITORY / "tools" / "make_sample_shards.py", tmp_path / "sample"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True, capture_output=True)
    again, kept = load_index(tmp_path / "sample"), load_index(REPOSITORY / "shards" / "sample")
    for split in kept.splits:
        # another release of Pillow may encode a picture into other bytes, nothing else
        for name in ("shard", "key", "patient", "view", "labels"):
            assert np.array_equal(again.table(split)[name], kept.table(split)[name])


def test_the_reader_in_the_specification_runs(capsys, monkeypatch):
    text = (REPOSITORY / "shards" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(REPOSITORY)
    exec(compile(code, "shards/README.md", "exec"), {})  # noqa: S102 (the documentation of this repository)
    printed = capsys.readouterr().out
    assert printed.startswith("chexpert-") and "(64, 64)" in printed and "'Edema'" in printed
