"""What is computed of each image, and which images are called empty, crushed or inverted."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from helpers_check_data import Pictures, drawing, drawn_xrays, encoded
from helpers_data import SALT
from PIL import Image, ImageOps

from scaletransfer import keys
from scaletransfer.check_data import check_data
from scaletransfer.duplicate_search import THUMB
from scaletransfer.image_features import FINE, UNREADABLE, features_of
from scaletransfer.pixel_check import INVERTED, upright


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_statistics_are_numpys(mode):
    rng = np.random.default_rng(0)
    shape = (41, 57, 3) if mode == "RGB" else (41, 57)
    white = 65535 if mode == "I;16" else 255
    values = rng.integers(0, white + 1, shape, dtype=np.uint16 if mode == "I;16" else np.uint8)
    data = encoded(Image.fromarray(values))
    found = features_of(data)
    assert found["state"] == FINE and (found["width"], found["height"]) == (57, 41)
    assert found["grey"] == (mode != "RGB") and found["bytes"] == hashlib.sha256(data).digest().rstrip(b"\0")
    channels = values.reshape(-1, 3) if mode == "RGB" else np.repeat(values.reshape(-1, 1), 3, axis=1)
    np.testing.assert_allclose(found["mean"], (channels / white).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["square"], ((channels / white) ** 2).mean(axis=0), rtol=1e-5)
    grey = np.asarray(Image.fromarray(values).convert("L")) if mode == "RGB" else values
    for name, share in (("low", 1), ("middle", 50), ("high", 99)):
        expected = np.percentile(grey, share, method="inverted_cdf") / white
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert found["levels"] == len(np.unique(grey))
    assert found["minimum"] == np.float32(grey.min() / white) and found["maximum"] == np.float32(grey.max() / white)


def test_equal_pixels_have_equal_hashes_whatever_the_file():
    picture = drawing(1)
    hashes = [
        features_of(data)["pixels"].item()
        for data in (
            encoded(picture),
            encoded(picture, compress_level=1),
            encoded(picture.convert("RGB")),
            encoded(picture.convert("LA")),
        )
    ]
    assert len(set(hashes)) == 1
    others = [
        drawing(2),
        picture.transpose(Image.Transpose.ROTATE_180),
        picture.resize((80, 96)),
        Image.new("L", (9, 9)),
    ]
    assert len({features_of(encoded(other))["pixels"].item() for other in others} | set(hashes)) == 5
    wide = Image.fromarray(np.zeros((4, 6), np.uint8))
    tall = Image.fromarray(np.zeros((6, 4), np.uint8))
    assert features_of(encoded(wide))["pixels"] != features_of(encoded(tall))["pixels"]


def test_a_turned_jpeg_is_made_upright():
    picture = drawing(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = features_of(encoded(picture.transpose(Image.Transpose.ROTATE_90), "jpg", quality=95, exif=exif))
    plain = features_of(encoded(picture, "jpg", quality=95))
    assert (turned["width"], turned["height"]) == picture.size
    assert np.corrcoef(turned["thumb"].ravel(), plain["thumb"].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("size", [(320, 400), (64, 64), (640, 800)])
def test_thumbnails_do_not_depend_on_size(size):
    picture = drawing(3, (333, 417))
    one = features_of(encoded(picture))["thumb"]
    two = features_of(encoded(picture.resize(size, Image.Resampling.BICUBIC)))["thumb"]
    assert one.shape == (THUMB, THUMB) and one.min() == 0 and one.max() == 255
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"nothing", b"not an image of a known format"),
        (b"", b"not an image of a known format"),
        (encoded(drawing(0))[:-300], b"cannot be decoded (OSError)"),
    ],
)
def test_broken_files_have_a_reason(data, problem):
    found = features_of(data)
    assert found["state"] == UNREADABLE and found["problem"] == problem


def checked(source: Pictures, tmp_path):
    return check_data([source.shards(tmp_path / "shards")], cache=tmp_path / "cache")


def test_empty_and_crushed_images_are_named(tmp_path):
    source = Pictures(tmp_path / "p")
    few = Image.fromarray((np.asarray(drawing(1)) // 64 * 64).astype(np.uint8))
    narrow = Image.fromarray((np.asarray(drawing(2)) // 10 + 40).astype(np.uint8))
    wanted = {}
    for picture, word in ((few, "crushed: 4 grey"), (narrow, "crushed: "), (Image.new("L", (50, 40), 7), "empty")):
        wanted[keys.key("pictures", source.add(picture), SALT)] = word
    for number in range(10, 16):
        source.add(drawing(number))
    check = checked(source, tmp_path)
    [report], [group] = check.pixels, check.groups
    flagged = {group.keys([position])[0]: word for position, word in report.flags[0].items()}
    assert flagged.keys() == wanted.keys() and all(flagged[key].startswith(word) for key, word in wanted.items())
    assert (report.summary["empty"], report.summary["crushed"], report.summary["inverted"]) == (1, 2, "")


def test_summary_weighs_images_alike(tmp_path):
    """A large dark and a small bright picture: the mean is that of the two means."""
    source = Pictures(tmp_path / "p")
    source.add(Image.fromarray(np.tile(np.array([0, 102], np.uint8), (100, 50))))
    source.add(Image.fromarray(np.tile(np.array([153, 255], np.uint8), (10, 5))))
    [report] = checked(source, tmp_path).pixels
    values = np.array([0, 0.4, 0.6, 1.0])
    assert report.summary["mean"] == f"{values.mean():.4f}" and report.summary["std"] == f"{values.std():.4f}"
    assert report.summary["images"] == 2 and report.summary["width p100"] == 100


@pytest.fixture(scope="module")
def xrays(tmp_path_factory):
    pictures = drawn_xrays(tmp_path_factory.mktemp("xrays"), 160)
    assert {view for _, view in pictures} >= {"PA", "AP", "L"}
    return pictures


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_inverted_xrays(xrays, share, tmp_path):
    """One in twenty, a mixture, or all of them: each is named, and no other."""
    source = Pictures(tmp_path / "p")
    chosen = set(np.random.default_rng(1).choice(len(xrays), round(share * len(xrays)), replace=False).tolist())
    wanted = set()
    for number, (picture, view) in enumerate(xrays):
        name = source.add(ImageOps.invert(picture) if number in chosen else picture, view=view)
        if number in chosen:
            wanted.add(keys.key("pictures", name, SALT))
    check = checked(source, tmp_path)
    [report], [group] = check.pixels, check.groups
    assert {group.keys([position])[0] for position in report.flags[0]} == wanted
    assert report.summary["inverted"] == len(wanted)
    assert any("the set as a whole" in note for note in report.notes) == (share == 1)


def test_colour_and_other_grey_pictures_are_not_called_inverted(tmp_path):
    source = Pictures(tmp_path / "grey")
    for number in range(40):
        source.add(drawing(number) if number % 2 else ImageOps.invert(drawing(number)))
    [report] = checked(source, tmp_path).pixels
    assert report.summary["inverted"] == "" and not report.flags[0] and not report.notes
    colour = Pictures(tmp_path / "colour")
    for number in range(6):
        colour.add(Image.merge("RGB", [drawing(number), drawing(number + 50), drawing(number + 100)]))
    check = check_data([colour.shards(tmp_path / "more")], cache=tmp_path / "cache")
    assert "inverted" not in check.pixels[0].summary and check.pixels[0].summary["grey"] == 0
    assert len(check.pixels[0].summary["mean"].split()) == 3


def test_one_film_alone_is_judged_by_what_a_chest_looks_like(xrays):
    picture = next(picture for picture, view in xrays if view == "AP")
    for film, sign in ((picture, 1), (ImageOps.invert(picture), -1)):
        likeness, _ = upright(features_of(encoded(film))["thumb"][None], "AP")
        assert sign * likeness[0] > -INVERTED
