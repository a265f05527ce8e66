"""The command check-data: what it prints and writes, refuses, reuses, and keeps to itself."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers_check_data import Pictures, drawing, encoded, rows_of
from helpers_data import SALT
from PIL import Image, ImageEnhance, ImageOps

from scaletransfer import image_features, keys
from scaletransfer.check_data import check_data, main
from scaletransfer.cli import COMMANDS, run_command
from scaletransfer.index import load_index

FILES = {"report.txt", "images.csv", "labels.csv", "patients.csv", "duplicates.csv", "pixels.csv", "pixel_summary.csv"}


def run(out, *argv) -> int:
    return run_command(main, [*map(str, argv), "--out", str(out), "--workers", "1"])


def verdict(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture
def clean(tmp_path):
    """A set of two splits that share nothing."""
    source = Pictures(tmp_path / "clean", ("Edema", "Effusion"))
    for number in range(12):
        split = "train" if number < 8 else "valid"
        labels = (1, -1) if number % 2 else (0, -2)
        source.add(drawing(number), split=split, patient=f"P{number}", labels=labels, view="PA")
    return source.shards(tmp_path / "shards" / "clean")


def test_a_clean_set(clean, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, clean) == 0
    text = (out / "report.txt").read_text()
    assert text in capsys.readouterr().out and {path.name for path in out.iterdir()} == FILES | {
        "contact-clean.png",
        "cache",
    }
    assert verdict(text).startswith("verdict: nothing is shared that must not be; 3 warnings")
    assert "clean/train: labels not known of any image: Effusion" in text
    assert "refused: none" in text and "PA 8" in text
    assert rows_of(out / "images.csv")[0] == {
        "set": "clean",
        "split": "train",
        "role": "pre-training",
        "images": "8",
        "looked_at": "8",
        "patients": "8",
        "left_out": "0",
        "views": "PA 8",
    }
    assert rows_of(out / "labels.csv")[1] == {
        "set": "clean",
        "split": "train",
        "label": "Effusion",
        "positive": "0",
        "negative": "0",
        "uncertain": "4",
        "unknown": "4",
    }
    assert rows_of(out / "duplicates.csv") == rows_of(out / "patients.csv") == rows_of(out / "pixels.csv") == []
    with Image.open(out / "contact-clean.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000


def test_no_identifier_is_written(clean, tmp_path, capsys):
    out = tmp_path / "out"
    source = Pictures(tmp_path / "other")
    source.add(drawing(3), patient="P11")
    target = source.shards(tmp_path / "shards" / "other")
    assert run(out, clean, "--targets", target) == 1
    assert len(rows_of(out / "duplicates.csv")) == 1 and len(rows_of(out / "patients.csv")) == 2
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"secret-" not in written and b"P11" not in written and "secret-" not in capsys.readouterr().out


def altered(picture: Image.Image, how: str) -> tuple[bytes, str]:
    """(bytes, kind under which it must be found) of a copy."""
    small = picture.resize((64, 56), Image.Resampling.BILINEAR)
    return {
        "same file": lambda: (encoded(picture), "bytes"),
        "encoded again": lambda: (encoded(picture, compress_level=1), "pixels"),
        "in three channels": lambda: (encoded(picture.convert("RGB")), "pixels"),
        "JPEG": lambda: (encoded(picture, "jpg", quality=60), "alike"),
        "smaller": lambda: (encoded(small, "jpg", quality=90), "alike"),
        "darker": lambda: (encoded(ImageEnhance.Brightness(picture).enhance(0.85), "jpg", quality=75), "alike"),
        "all of it": lambda: (encoded(ImageEnhance.Brightness(small).enhance(0.9), "jpg", quality=60), "alike"),
    }[how]()


@pytest.mark.parametrize(
    "how", ["same file", "encoded again", "in three channels", "JPEG", "smaller", "darker", "all of it"]
)
def test_a_planted_copy_in_a_targets_test_set(clean, tmp_path, how):
    data, kind = altered(drawing(5), how)
    source = Pictures(tmp_path / "target", ("no", "yes"), label_kind="classes", name="target")
    suffix = "jpg" if data[:2] == b"\xff\xd8" else "png"
    for number in range(4):
        source.add(encoded(drawing(100 + number), suffix), split="train", labels=number % 2, suffix=suffix)
    planted = keys.key("target", source.add(data, split="test", suffix=suffix), SALT)
    out = tmp_path / "out"
    assert run(out, clean, "--targets", source.shards(tmp_path / "shards" / "target")) == 1
    [found] = rows_of(out / "duplicates.csv")
    original = keys.key("pictures", "secret-clean-5.png", SALT)
    assert (found["relation"], found["kind"]) == ("refused", kind)
    assert [found[name] for name in ("set_a", "split_a", "key_a")] == ["clean", "train", original]
    assert [found[name] for name in ("set_b", "split_b", "key_b")] == ["target", "test", planted]
    assert float(found["likeness"]) == 1 if kind != "alike" else float(found["likeness"]) > 0.95
    text = (out / "report.txt").read_text()
    assert f"1 image in clean/train and in target/test (1 {kind})" in text and "REFUSED, 1 finding" in verdict(text)


def test_copies_inside_a_split_are_counted_only(tmp_path):
    source = Pictures(tmp_path / "s")
    for number in range(6):
        source.add(drawing(number))
    source.add(drawing(2))
    source.add(encoded(drawing(2), compress_level=0))
    source.add(ImageEnhance.Brightness(drawing(4)).enhance(0.9))
    out = tmp_path / "out"
    assert run(out, source.shards(tmp_path / "shards" / "s")) == 0
    assert rows_of(out / "duplicates.csv") == []
    assert "s/train: 2 surplus copies and 1 pairs of pictures that look the same" in (out / "report.txt").read_text()


def test_copies_across_splits_of_one_set_are_refused_and_black_images_are_no_copies(tmp_path):
    source = Pictures(tmp_path / "s")
    for number in range(6):
        source.add(drawing(number), split="train")
        source.add(Image.new("L", (96, 80)), split="valid" if number % 2 else "train")
    for _ in range(3):
        source.add(drawing(3), split="test")
    out = tmp_path / "out"
    assert run(out, source.shards(tmp_path / "shards" / "s")) == 1
    found = rows_of(out / "duplicates.csv")
    assert len(found) == 3 and {(row["split_a"], row["split_b"]) for row in found} == {("train", "test")}
    text = (out / "report.txt").read_text()
    assert "1 image in s/train and in s/test (3 bytes)" in text and "6 empty of 15 images" in text
    assert "s/test: 2 surplus copies" in text


def test_two_sources_at_once_and_a_folder_with_both_roles(clean, tmp_path, capsys):
    """Sets that train together may share a split; a set of pre-training and a target nothing."""
    source = Pictures(tmp_path / "more", ("Edema",))
    for number in (0, 1, 50, 51):
        source.add(drawing(number), split="train")
    more = source.shards(tmp_path / "shards" / "more")
    out = tmp_path / "out"
    assert run(out, clean, more) == 0
    assert [row["relation"] for row in rows_of(out / "duplicates.csv")] == ["allowed", "allowed"]
    assert "2 images in clean/train and in more/train (2 bytes)" in (out / "report.txt").read_text()
    assert run(out, clean, "--targets", more) == 1
    assert run(out, clean, "--targets", clean) == 0, "a folder that is both is one set"
    assert "pre-training and target" in (out / "report.txt").read_text()
    copied = tmp_path / "elsewhere" / "clean"
    shutil.copytree(clean, copied)
    assert run(out, clean, copied) == 0, "the same split of two sets that train together"
    assert {"contact-clean.png", "contact-clean-2.png"} <= {path.name for path in out.iterdir()}
    capsys.readouterr()


def test_a_second_call_reads_no_image(clean, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(out, clean) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def read_again(*_):
        raise AssertionError("an image was read again")

    monkeypatch.setattr(image_features, "features_of", read_again)
    assert run(out, clean) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == first
    monkeypatch.undo()
    [kept] = (out / "cache").glob("*-train-*.npy")
    kept.write_bytes(kept.read_bytes()[:500])
    assert run(out, clean) == 0 and kept.stat().st_size > 500, "a cache that was cut off is made again"
    assert (out / "report.txt").read_bytes() == first["report.txt"]


def test_an_interrupted_call_goes_on_where_it_was(clean, tmp_path, monkeypatch):
    real, done = image_features._features_of_batch, []

    def failing(batch):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch)
        return real(batch)

    monkeypatch.setattr(image_features, "_BETWEEN_FLUSHES", 1)
    monkeypatch.setattr(image_features, "_features_of_batch", failing)
    assert run(tmp_path / "out", clean) == 130
    before = sum(len(batch.rows) for batch in done)
    monkeypatch.setattr(image_features, "_features_of_batch", lambda batch: (done.append(batch), real(batch))[1])
    assert run(tmp_path / "out", clean) == 0
    assert before == 6 and sum(len(batch.rows) for batch in done) == 12


def test_several_processes_give_the_same(clean, tmp_path):
    one = check_data([clean], cache=tmp_path / "one", workers=1)
    two = check_data([clean], cache=tmp_path / "two", workers=2)
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.features.tobytes() == b.features.tobytes() and len(a.features) == len(a.table)


def test_a_sample_is_called_a_sample(clean, tmp_path):
    out = tmp_path / "out"
    assert run(out, clean, "--max-images", 3) == 0
    text = (out / "report.txt").read_text()
    assert "A SAMPLE: at most 3 images of each split" in text and "in the sample" in verdict(text)
    assert [row["looked_at"] for row in rows_of(out / "images.csv")] == ["3", "3"]
    assert [row["negative"] for row in rows_of(out / "labels.csv")] == ["4", "0", "2", "0"], "labels are of all images"


def test_an_image_that_cannot_be_read_is_refused(clean, tmp_path):
    index = load_index(clean)
    row = index.table("train")[0]
    with open(index.path("train", int(row["shard"])), "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["size"])))
    out = tmp_path / "out"
    assert run(out, clean) == 1
    [found] = rows_of(out / "pixels.csv")
    assert found["key"] == index.keys("train", [0])[0] and found["problem"].startswith("unreadable: not an image")
    assert "1 image of clean cannot be read" in (out / "report.txt").read_text()


def test_errors_are_one_sentence(clean, tmp_path, capsys):
    def refused(*argv, status=2) -> str:
        assert run_command(main, [str(part) for part in argv]) == status
        [line] = capsys.readouterr().err.strip().splitlines()
        return line

    out = ("--out", tmp_path / "out")
    assert "index.json does not exist" in refused(tmp_path / "nothing", *out)
    assert "--max-images is 0; it must be at least 1" in refused(clean, "--max-images", 0, *out)
    assert "--workers is 0" in refused(clean, "--workers", 0, *out)
    assert "did you mean --targets" in refused(clean, "--target", clean, *out)
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in refused(clean, "--out", tmp_path / "file")
    index = load_index(clean)
    row = index.table("valid")[1]
    end = -(-(int(row["offset"]) + int(row["size"])) // 512) * 512
    with open(index.path("valid", int(row["shard"])), "r+b") as file:
        file.seek(end)
        file.write(b"x" * 512)
    assert f"has no label at byte {end}, behind its image" in refused(clean, "--workers", 1, *out)


def test_12_bit_values_among_16_bit_ones(tmp_path):
    """Alone they have a white of their own (4095); beside others they look black to a network, and are flagged."""
    source = Pictures(tmp_path / "deep")
    for number in range(4):
        source.add(Image.fromarray(np.asarray(drawing(number), np.uint16) * 16))
    out = tmp_path / "out"
    assert run(out, source.shards(tmp_path / "shards" / "alone")) == 0 and rows_of(out / "pixels.csv") == []
    assert float(rows_of(out / "pixel_summary.csv")[0]["maximum p100"]) == pytest.approx(255 * 16 / 4095, abs=1e-4)
    for number in range(4, 6):
        source.add(Image.fromarray(np.asarray(drawing(number), np.uint16) * 257))
    assert run(out, source.shards(tmp_path / "shards" / "mixed")) == 0
    flagged = rows_of(out / "pixels.csv")
    assert len(flagged) == 4 and all(row["problem"].startswith("crushed: ") for row in flagged)
    assert "4 of 6 images use a small part of the range" in (out / "report.txt").read_text()


def test_inverted_images_come_first_on_the_sheet(xrays, tmp_path):
    source = Pictures(tmp_path / "x")
    for number, (picture, view) in enumerate(xrays):
        source.add(ImageOps.invert(picture) if number in (3, 20) else picture, view=view)
    out = tmp_path / "out"
    assert run(out, source.shards(tmp_path / "shards" / "x")) == 0
    flagged = rows_of(out / "pixels.csv")
    wanted = {keys.key("pictures", f"secret-x-{number}.png", SALT) for number in (3, 20)}
    assert {row["key"] for row in flagged} == wanted and all("inverted" in row["problem"] for row in flagged)
    assert f"x: 2 inverted of {len(xrays)} images" in (out / "report.txt").read_text()
    with Image.open(out / "contact-x.png") as sheet:
        red = [sheet.getpixel((8 + column * 184, 60)) == (176, 0, 32) for column in range(4)]
    assert red == [True, True, False, False]


def test_it_is_a_command_and_needs_no_torch(tmp_path):
    assert COMMANDS["check-data"].target == "scaletransfer.check_data:main"
    program = "import scaletransfer.check_data, sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.fixture(scope="module")
def xrays(tmp_path_factory):
    from helpers_check_data import drawn_xrays

    return drawn_xrays(tmp_path_factory.mktemp("xrays"), 60)
