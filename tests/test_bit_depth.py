"""16 bits a pixel: kept bit for bit, or taken to 8 bits and to white by the range that the data set really uses."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_loader import dataset, source
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scaletransfer import keys, shard_range
from scaletransfer.decode import decode
from scaletransfer.image_check import check_images
from scaletransfer.index import from_records, load_index
from scaletransfer.loader import ShardDataset
from scaletransfer.make_shards import main
from scaletransfer.pixel_range import full_range, rescaled, significant_bits
from scaletransfer.records import probe_images
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import Encoding, build, plan_shards, verify
from scaletransfer.sources import open_source

EIGHT = Encoding(bit_depth=8)
# 16-bit value -> the nearest of value * 255 / 4095, worked out by hand: 255 / 4095 = 0.0622710...
TWELVE = {0: 0, 8: 0, 9: 1, 24: 1, 25: 2, 1000: 62, 2047: 127, 2048: 128, 3000: 187, 4086: 254, 4087: 255, 4095: 255}
# ... of value * 255 / 1023, and 255 / 1023 = 0.2492668...
TEN = {0: 0, 2: 0, 3: 1, 6: 1, 7: 2, 512: 128, 1000: 249, 1020: 254, 1021: 255, 1023: 255}


def deep(path: Path, values, sbit: int | None = None) -> bytes:
    """Write a 16-bit grey PNG of rows of these values; its bytes."""
    row = np.asarray(values, dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([row] * 4)).save(buffer, "PNG")
    data = buffer.getvalue()
    if sbit is not None:
        chunk = b"sBIT" + bytes([sbit])
        data = data[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def twelve_bits(root: Path) -> Path:
    """Six images; 4095 is reached in the validation split alone, 3000 in training."""
    for number in range(4):
        deep(root / "train" / "ab"[number % 2] / f"{number}.png", [0, 8, 9, 24, 25, 1000, 2047, 2048, 3000 - number])
    for number in range(2):
        deep(root / "valid" / "ab"[number] / f"{number}.png", [4095 - 9 * number, 4087, 3000, 0])
    return root


def plan_of(root: Path, **options):
    return plan_shards(open_source("image_folder", root), SALT, **options)


def stored(out: Path, root: Path) -> dict[str, bytes]:
    """Path of the record -> image bytes in the shards."""
    names = {keys.key("image_folder", r.source_id, SALT): r.image for r in open_source("image_folder", root)}
    found = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension not in ("cls", "json"):
                    found[names[key]] = tar.extractfile(member).read()
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


# ---- the arithmetic


@given(st.integers(0, 65535), st.integers(1, 65535), st.sampled_from([255, 1023, 4095, 65535]))
def test_rescaled_is_the_exact_quotient_rounded_half_up(value, white, new):
    exact = math.floor(Fraction(min(value, white) * new, white) + Fraction(1, 2))
    assert rescaled(np.array([min(value, white)], dtype=np.uint16), white, new).tolist() == [exact]


def test_ranges():
    assert [full_range(n) for n in (0, 1, 2, 255, 256, 1023, 1024, 4095, 4096, 65535)] == [
        *(1, 1, 3, 255, 511, 1023, 2047, 4095, 8191, 65535)
    ]


# ---- make_shards


def test_keep_keeps_every_byte(tmp_path):
    root = twelve_bits(tmp_path / "images")
    build(plan_of(root), tmp_path / "out")
    kept = stored(tmp_path / "out", root)
    assert len(kept) == 6
    for image, data in kept.items():
        assert hashlib.sha256(data).digest() == hashlib.sha256((root / image).read_bytes()).digest()
    index = load_index(tmp_path / "out")
    assert (index.image.bit_depth, index.image.pixel_max, index.image.deep_white) == (16, 4095, 4095)
    assert index.encoder == {"name": "original", "metadata": "removed"} and verify(tmp_path / "out") == []


def test_eight_bits_come_from_the_range_of_all_splits(tmp_path):
    root = twelve_bits(tmp_path / "images")
    index = build(plan_of(root, encoding=EIGHT), tmp_path / "out").index
    for image, data in stored(tmp_path / "out", root).items():
        assert Image.open(io.BytesIO(data)).mode == "L"
        before = pixels((root / image).read_bytes())[0].tolist()
        hand = TWELVE | {2999: 187, 2998: 187, 2997: 187}
        assert pixels(data)[0].tolist() == [hand[value] for value in before]
    assert (index.image.bit_depth, index.image.pixel_max) == (8, 255)
    assert (index.encoder["bit_depth"], index.encoder["range"]) == (8, 4095)


def test_ten_bits_and_the_command(tmp_path):
    root = tmp_path / "images"
    for name in "ab":
        deep(root / "train" / name / "1.png", list(TEN))
    out, salt = tmp_path / "out", tmp_path / "salt"
    command = ["image_folder", "--root", str(root), "--out", str(out), "--salt-file", str(salt), "--bit-depth", "8"]
    assert main(command) == 0
    assert load_index(out).encoder["range"] == 1023
    with tarfile.open(out / "train-000000.tar") as tar:
        data = tar.extractfile(tar.getmembers()[0]).read()
    assert pixels(data)[0].tolist() == list(TEN.values())
    before = hashes(out)
    assert main(command) == 0 and hashes(out) == before  # finished: not even measured again
    with pytest.raises(ValueError, match="made from other data or with other options"):
        main([*command, "--pixel-max", "1023"])


def test_a_given_pixel_max(tmp_path):
    """Halves go up: 1 * 255 / 510 = 0.5, 3 * 255 / 510 = 1.5, 255 * 255 / 510 = 127.5."""
    root = tmp_path / "images"
    deep(root / "train" / "a" / "1.png", [0, 1, 2, 3, 255, 509, 510])
    index = build(plan_of(root, encoding=Encoding(bit_depth=8, pixel_max=510)), tmp_path / "out").index
    (data,) = stored(tmp_path / "out", root).values()
    assert pixels(data)[0].tolist() == [0, 1, 1, 2, 128, 255, 255]
    assert index.encoder["range"] == 510
    for number in range(9):  # more than a plan looks at
        deep(root / "train" / "a" / f"{number}.png", [0, 511 if number == 5 else 7])
    with pytest.raises(ValueError, match=r"a/5\.png: it has the value 511, larger than the 510"):
        build(plan_of(root, encoding=Encoding(bit_depth=8, pixel_max=510), shard_size=2), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_options_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="give --bit-depth 8 with it"):
        Encoding(pixel_max=4095)
    for wrong in (-1, 65536):
        with pytest.raises(ValueError, match=f"--pixel-max is {wrong}; give"):
            Encoding(bit_depth=8, pixel_max=wrong)
    root = twelve_bits(tmp_path / "images")
    salt = str(tmp_path / "salt")
    with pytest.raises(ValueError, match="--pixel-max is 0; give"):
        main(["image_folder", "--root", str(root), "--salt-file", salt, "--bit-depth", "8", "--pixel-max", "0"])


def test_the_bits_that_a_png_declares_come_first(tmp_path):
    root = tmp_path / "images"
    declared = deep(root / "train" / "a" / "ten.png", list(TEN), sbit=10)
    deep(root / "train" / "a" / "twelve.png", list(TWELVE))
    # By the PNG standard: 12 bits, stretched to 16 by repeating the upper 4 below (x * 16 + x // 256)
    stretched = [0, 16, 2048 * 16 + 8, 4095 * 16 + 15]
    deep(root / "train" / "a" / "standard.png", stretched, sbit=12)
    index = build(plan_of(root, encoding=EIGHT), tmp_path / "out").index
    made = {Path(image).stem: pixels(data)[0].tolist() for image, data in stored(tmp_path / "out", root).items()}
    assert made["ten"] == list(TEN.values()) and made["twelve"] == list(TWELVE.values())
    assert made["standard"] == [0, 0, 128, 255]
    assert index.encoder["range"] == 4095  # neither 1023 nor 65535: those two say it themselves
    assert significant_bits(declared) == 10 and significant_bits(b"\xff\xd8 no png") == 0
    # decoded for training, each of them has the white that was asked for
    assert decode(declared, 1, 8, deep_white=4095)[0, 0].tolist() == list(TEN.values())
    sixteen = decode(declared, 1, 16, deep_white=4095, white=4095)[0, 0].tolist()
    assert sixteen[-1] == 4095 and sixteen[1] == 8  # 2 * 4095 / 1023 = 8.006
    # scaled down, it still says so
    index = build(plan_of(root, encoding=Encoding(size=3)), tmp_path / "small").index
    small = stored(tmp_path / "small", root)["train/a/ten.png"]
    assert significant_bits(small) == 10 and pixels(small).max() <= 1023 and index.image.pixel_max == 65535


def test_images_that_cannot_be_used_do_not_count(tmp_path):
    root = twelve_bits(tmp_path / "images")
    noise = np.random.default_rng(0).integers(40_000, 65535, 4000, dtype=np.uint16)
    whole = deep(root / "train" / "a" / "cut.png", noise)
    (root / "train" / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "b" / "text.png").write_text("no picture")
    index = build(plan_of(root, encoding=EIGHT), tmp_path / "out").index
    assert index.encoder["range"] == 4095 and len(index.splits["train"].quarantine) == 2


def test_images_of_8_bits_stay_as_they_are_beside_those_of_16(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".png", mode="L")
    deep(root / "train" / "cat" / "deep.png", list(TWELVE))
    index = build(plan_of(root, encoding=EIGHT), tmp_path / "out").index
    assert (index.image.bit_depth, index.image.channels) == (8, 1)
    for image, data in stored(tmp_path / "out", root).items():
        if "deep" in image:
            assert pixels(data)[0].tolist() == list(TWELVE.values())
        else:
            assert data == (root / image).read_bytes()
    with pytest.raises(ValueError, match=r"are mixed .* give --bit-depth 8"):
        build(plan_of(root), tmp_path / "mixed")


def test_without_16_bit_images_nothing_changes(tmp_path):
    root = make_image_folder(tmp_path / "images")
    index = build(plan_of(root, encoding=EIGHT), tmp_path / "out").index
    assert index.encoder["range"] == 0
    assert all(data == (root / image).read_bytes() for image, data in stored(tmp_path / "out", root).items())


def test_jpeg_of_16_bit_images(tmp_path):
    root = tmp_path / "images"
    deep(root / "train" / "a" / "flat.png", [2048] * 64)
    deep(root / "train" / "a" / "white.png", [4095] * 64)
    with pytest.raises(ValueError, match=r"\.png: an image has 16 bits a pixel and JPEG holds 8: give --encode png"):
        build(plan_of(root, encoding=Encoding(encode="jpg")), tmp_path / "out")
    build(plan_of(root, encoding=Encoding(encode="jpg", bit_depth=8)), tmp_path / "out")
    made = stored(tmp_path / "out", root)
    assert abs(pixels(made["train/a/flat.png"]).astype(int) - 128).max() <= 1
    assert pixels(made["train/a/white.png"]).min() >= 254


def test_16_bit_colour_becomes_8_bit_colour(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">6H", 0x0102, 0x8000, 0xFFFF, 256, 512, 65535) for _ in range(2))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = tmp_path / "images" / "train" / "a" / "colour.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    build(plan_of(tmp_path / "images", encoding=EIGHT), tmp_path / "out")
    (made,) = stored(tmp_path / "out", tmp_path / "images").values()
    assert made[24] == 8 and pixels(made)[0].tolist() == [[1, 128, 255], [1, 2, 255]]


def test_scaling_leaves_12_bits_within_12_bits(tmp_path):
    """As a mean does; a Lanczos filter swings past both sides of an edge."""
    root = tmp_path / "images"
    edge = np.zeros((64, 64), np.uint16)
    edge[:, 30:] = 4095
    (root / "train" / "a").mkdir(parents=True)
    Image.fromarray(edge).save(root / "train" / "a" / "edge.png")
    assert np.asarray(Image.fromarray(edge).resize((24, 24), Image.Resampling.LANCZOS)).max() > 4095
    index = build(plan_of(root, encoding=Encoding(size=24)), tmp_path / "out").index
    assert index.image.pixel_max == 4095 and index.image.deep_white == 4095


# ---- the pass that measures


class Interrupted(Exception):
    """As Ctrl-C would."""


def after(number: int):
    left = [number]

    def progress(samples: int) -> None:
        left[0] -= samples
        if left[0] < 0:
            raise Interrupted

    return progress


def many(root: Path) -> Path:
    for number in range(24):
        split = "valid" if number % 6 == 5 else "train"
        rng = np.random.default_rng(number)
        deep(root / split / "ab"[number % 2] / f"{number}.png", rng.integers(0, 300 + 40 * number, 12))
    return root


def test_workers_and_interruptions_change_no_byte(tmp_path):
    root = many(tmp_path / "images")
    settings = {"encoding": EIGHT, "shard_size": 3}
    build(plan_of(root, **settings), tmp_path / "one")
    assert load_index(tmp_path / "one").encoder["range"] == 2047
    build(plan_of(root, **settings), tmp_path / "two", workers=2)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
    for cut in (1, 7, 20):
        out = tmp_path / f"cut{cut}"
        with pytest.raises(Interrupted):
            build(plan_of(root, **settings), out, measured=after(cut))
        with pytest.raises(Interrupted):
            build(plan_of(root, **settings), out, progress=after(cut))
        assert not (out / "index.json").exists()
        build(plan_of(root, **settings), out)
        assert hashes(out) == hashes(tmp_path / "one") and not (out / WORK_FOLDER).exists()


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    root = many(tmp_path / "images")
    settings = {"encoding": EIGHT, "shard_size": 3}
    with pytest.raises(Interrupted):
        build(plan_of(root, **settings), tmp_path / "out", progress=after(4))
    plan = plan_of(root, **settings)

    def refuse(data: bytes) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(shard_range, "largest_value", refuse)
    report = build(plan, tmp_path / "out")
    assert report.kept_shards == 1 and report.index.encoder["range"] == 2047


def test_an_interrupted_build_with_another_range_is_refused(tmp_path):
    root = many(tmp_path / "images")

    def make(pixel_max: int, **options):
        encoding = Encoding(bit_depth=8, pixel_max=pixel_max)
        return build(plan_of(root, encoding=encoding, shard_size=3), tmp_path / "out", **options)

    with pytest.raises(Interrupted):
        make(4095, progress=after(7))
    for other in (2047, 0):
        with pytest.raises(ValueError, match="other data or with other options that was interrupted"):
            make(other)
    assert make(4095).kept_shards == 2
    assert make(0, overwrite=True).index.encoder["range"] == 2047


def test_a_damaged_measure_is_taken_again_and_no_shard_of_another_range_is_kept(tmp_path):
    root = many(tmp_path / "images")
    settings = {"encoding": EIGHT, "shard_size": 3}
    with pytest.raises(Interrupted):
        build(plan_of(root, **settings), tmp_path / "out", progress=after(7))
    for path in (tmp_path / "out" / WORK_FOLDER).glob("*.range.json"):
        path.write_text("{")
    deep(root / "train" / "a" / "0.png", [40_000, 0])  # changed meanwhile, and the range with it
    report = build(plan_of(root, **settings), tmp_path / "out")
    assert report.kept_shards == 0 and report.index.encoder["range"] == 65535
    build(plan_of(root, **settings), tmp_path / "anew")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "anew")


def test_an_image_that_changes_between_measuring_and_storing_is_named(tmp_path):
    root = many(tmp_path / "images")
    settings = {"encoding": EIGHT, "shard_size": 3}
    with pytest.raises(Interrupted):
        build(plan_of(root, **settings), tmp_path / "out", progress=after(1))
    for path in root.rglob("*.png"):
        deep(path, [2048, 0])
    with pytest.raises(ValueError, match=r"\.png: it has the value 2048, larger than the 2047.*start again"):
        build(plan_of(root, **settings), tmp_path / "out")


def test_the_content_of_the_index_is_json_of_the_range(tmp_path):
    root = twelve_bits(tmp_path / "images")
    build(plan_of(root, encoding=EIGHT), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "index.json").read_text())["encoder"]["range"] == 4095


# ---- what training sees


def test_batches_of_12_bits_are_normalised_by_12_bits(tmp_path):
    root = twelve_bits(tmp_path / "images")
    build(plan_of(root), tmp_path / "out")
    index = load_index(tmp_path / "out")
    by_16 = ShardDataset([source(index)], None, lambda image: image, 1, 0)
    assert by_16.pixel_max == 4095
    by_8 = ShardDataset([source(index)], None, lambda image: image, 1, 0, depth=8)
    assert by_8.pixel_max == 255
    for row in range(4):
        deeper, flat = (data.__getitems__([row])["image"][0, 0, 0].tolist() for data in (by_16, by_8))
        assert max(deeper) in range(2997, 3001)
        assert flat == [(TWELVE | {2999: 187, 2998: 187, 2997: 187})[value] for value in deeper]


def test_sources_of_several_ranges_are_scaled_to_the_widest(tmp_path):
    for name, top in (("ten", 1023), ("twelve", 4095)):
        deep(tmp_path / name / "train" / "a" / "1.png", [0, 1, 512, top])
        build(plan_of(tmp_path / name), tmp_path / f"{name}-shards")
    opened = [source(load_index(tmp_path / f"{name}-shards")) for name in ("ten", "twelve")]
    data = ShardDataset(opened, None, lambda image: image, 1, 0)
    assert data.pixel_max == 4095
    images = data.__getitems__([0, 1])["image"][:, 0, 0]
    assert images.dtype == torch.uint16
    assert images.tolist() == [[0, 4, 2050, 4095], [0, 1, 512, 4095]]  # 4095 * 512 / 1023 = 2049.501
    narrow = ShardDataset(opened[1:], None, lambda image: image, 1, 0, pixel_max=1023)  # validated on twelve bits
    assert narrow.__getitems__([0])["image"][0, 0, 0].tolist() == [0, 0, 128, 1023]


def test_a_pretraining_run_normalises_by_the_range_of_its_shards(tmp_path):
    from scaletransfer.engine.assemble import pixel_max

    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=6, valid=2, laterals=False, suffix=".png")
    for number, record in enumerate(open_source("chexpert", root)):
        deep(root / record.image, np.random.default_rng(number).integers(0, 4000, 12))
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    assert pixel_max(dataset([source(load_index(tmp_path / "shards"))], batch=2)) == 4095


def test_files_are_looked_at_for_their_range(tmp_path):
    root = twelve_bits(tmp_path / "images")
    opened = open_source("image_folder", root)
    index = from_records(opened, SALT)
    assert (index.image.bit_depth, index.image.pixel_max, index.image.white(16)) == (16, 4095, 4095)
    assert index.image.white(8) == 255
    data = ShardDataset([source(index)], None, lambda image: image, 1, 0, depth=8)
    assert data.__getitems__([0])["image"][0, 0, 0].tolist() == [0, 0, 1, 1, 2, 62, 127, 128, 187]
    # with one colour image it is a colour set of 8 bits, and the others still have their range
    draw_image(root / "train" / "a" / "colour.png", 1, mode="RGB")
    mixed = from_records(open_source("image_folder", root), SALT)
    assert (mixed.image.channels, mixed.image.bit_depth, mixed.image.pixel_max) == (3, 8, 255)
    assert mixed.image.deep_white == 4095
    data = ShardDataset([source(mixed)], None, lambda image: image, 3, 0, depth=8)
    assert data.__getitems__([0])["image"][0, 2, 0].tolist() == [0, 0, 1, 1, 2, 62, 127, 128, 187]


def test_a_file_beyond_the_range_of_those_looked_at_is_named(tmp_path):
    root = twelve_bits(tmp_path / "images")
    opened = open_source("image_folder", root)
    records = list(opened)
    info = probe_images(root, records, probes=1)
    assert info.pixel_max == 4095
    deep(root / records[3].image, [5000, 0])
    index = from_records(opened, SALT, image=info)
    with pytest.raises(
        ValueError, match=r"1 of 6 images cannot be read: .*it has the value 5000, but .* 4095 is white"
    ):
        check_images(
            [source(index, "train"), source(index, "valid")],
            [np.arange(4), np.arange(2)],
            channels=1,
            depth=16,
            workers=0,
        )


def test_8_bit_files_of_a_12_bit_set_get_its_white():
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8)).save(buffer, "PNG")
    data = buffer.getvalue()
    assert decode(data, 1, 16, deep_white=4095, white=4095)[0, 0].tolist() == [0, 16, 2056, 4095]  # 4095 / 255 = 16.06
    assert decode(data, 1, 16)[0, 0].tolist() == [0, 257, 128 * 257, 65535]
    assert decode(data, 1, 8, deep_white=4095)[0, 0].tolist() == [0, 1, 128, 255]
