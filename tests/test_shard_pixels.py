"""Pixels of stored images: scaled decoding against the whole picture, damage, grey, orientation, one filter."""

from __future__ import annotations

import io
import random

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaletransfer import shard_image, shard_pixels
from scaletransfer.shard_image import Encoding, UnusableImage, prepare
from scaletransfer.shard_pixels import encoded, is_grey, reduction, scaled, scaled_size
from scaletransfer.synthetic_render import render


def radiograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A drawn chest, with the grain that films have."""
    seeds = ((seed,), (seed, 1), (seed, 2))
    patient, study, image = seeds
    options = {"effects": {}, "findings": {}, "view": "PA", "sex": "Male", "age": 50}
    return render(**options, size=(height, width), patient_seed=patient, study_seed=study, image_seed=image)


def jpeg(pixels: np.ndarray, quality: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(opened(data))


def colour(height: int, width: int) -> np.ndarray:
    grey = radiograph(height, width)
    return np.stack([grey, grey // 2 + 60, 255 - grey], axis=-1)


# ---- the same picture as by decoding all of it


@settings(max_examples=40, deadline=None)
@given(st.integers(150, 420), st.integers(150, 420), st.integers(24, 150), st.booleans())
def test_scaled_decoding_gives_what_the_whole_picture_gives(height, width, short, in_colour):
    """Sides that 8 does not divide included: without care for them this would be 38 dB."""
    short = min(short, min(height, width) - 1)
    data = jpeg(colour(height, width) if in_colour else radiograph(height, width))
    whole = simplejpeg.decode_jpeg(data, "RGB" if in_colour else "GRAY")
    size = scaled_size(width, height, short)
    wanted = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    decoded = shard_pixels.jpeg_pixels(data, opened(data), short)
    factor = reduction(width, height, short)
    assert decoded.shape[:2] == (-(-height // factor), -(-width // factor))
    assert factor == 1 or min(decoded.shape[:2]) >= 2 * short
    found = scaled(decoded, (width, height), short)
    assert found.shape == wanted.shape
    if factor == 1:
        assert np.array_equal(found, wanted)
    else:
        assert cv2.PSNR(found, wanted) > 40


@pytest.mark.parametrize("size", [(2048, 1664), (2049, 1665), (2047, 1671)])
@pytest.mark.parametrize("short", [512, 416, 256, 224, 104])
def test_of_radiographs_it_differs_by_less_than_50_db(size, short):
    data = jpeg(radiograph(*size), quality=80)
    width, height = size[::-1]
    assert reduction(width, height, short) == {512: 1, 416: 2 if size[1] >= 1664 else 1, 256: 2, 224: 2, 104: 8}[short]
    whole = simplejpeg.decode_jpeg(data, "GRAY")
    wanted = cv2.resize(whole, scaled_size(width, height, short), interpolation=cv2.INTER_AREA)
    found = scaled(shard_pixels.jpeg_pixels(data, opened(data), short), (width, height), short)
    assert cv2.PSNR(found, wanted) > 50


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_a_reduction_leaves_twice_the_size_and_rounds_to_it(width, height, short):
    factor = reduction(width, height, short)
    assert factor in (1, 2, 4, 8)
    if factor > 1:
        assert min(-(-width // factor), -(-height // factor)) >= 2 * short
        for side, new in zip((width, height), scaled_size(width, height, short), strict=True):
            assert round(-(-side // factor) * (new * factor / side)) == new


def test_small_pictures_of_every_shape():
    """OpenCV rounds the size of scaled-down reductions itself."""
    rng = np.random.default_rng(0)
    for width, height in ((16, 25), (17, 23), (31, 16), (16, 16), (100, 17), (9, 1), (1, 40), (33, 65)):
        data = jpeg(rng.integers(0, 256, (height, width), dtype=np.uint8))
        for short in (1, 2, 3):
            made = prepare(data, "jpg", Encoding(size=short))
            if min(width, height) > short:
                assert opened(made.data).size == scaled_size(width, height, short)


def test_every_kind_of_image_is_scaled_by_the_same_filter():
    grey = radiograph(150, 131)
    wanted = cv2.resize(grey, scaled_size(131, 150, 64), interpolation=cv2.INTER_AREA)
    for kind in ("PNG", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, kind)
        made = prepare(buffer.getvalue(), "png", Encoding(size=64, encode="png"))
        assert np.array_equal(pixels_of(made.data), wanted)
        assert (made.channels, made.bit_depth, made.pixel_max) == (1, 8, int(wanted.max()))
    deep = grey.astype(np.uint16) * 16 + 3
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    made = prepare(buffer.getvalue(), "png", Encoding(size=64))
    exact = cv2.resize(deep.astype(np.float64), scaled_size(131, 150, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(pixels_of(made.data).astype(float) - exact).max() <= 0.51
    assert made.bit_depth == 16 and made.pixel_max <= 4095


@pytest.mark.parametrize(
    ("kind", "mode", "channels", "depth"),
    [
        ("PNG", "1", 1, 8),
        ("PNG", "LA", 1, 8),
        ("PNG", "P", 3, 8),
        ("PNG", "RGBA", 3, 8),
        ("JPEG", "CMYK", 3, 8),
        ("TIFF", "I;16B", 1, 16),
        ("WEBP", "RGB", 3, 8),
    ],
)
def test_unusual_kinds_are_scaled_too(kind, mode, channels, depth):
    whole = Image.fromarray(colour(150, 131) if channels == 3 else radiograph(150, 131))
    if mode == "I;16B":
        whole = Image.fromarray(radiograph(150, 131).astype(">u2") * 16)
    buffer = io.BytesIO()
    (whole if whole.mode == mode else whole.convert(mode)).save(buffer, kind)
    original = opened(buffer.getvalue())
    assert original.mode == mode
    made = prepare(buffer.getvalue(), "png", Encoding(size=40, encode="png"))
    assert (made.channels, made.bit_depth) == (channels, depth)
    found = opened(made.data)
    assert found.mode == ("I;16" if depth == 16 else "RGB" if channels == 3 else "L")
    plain = original.convert("I") if depth == 16 else original.convert(found.mode)
    wanted = cv2.resize(np.asarray(plain).astype(np.float64), found.size, interpolation=cv2.INTER_AREA)
    assert found.size == scaled_size(131, 150, 40) and np.abs(np.asarray(found) - wanted).max() <= 0.51


# ---- damage


@pytest.mark.parametrize("kind", ["grey", "colour", "progressive", "restart"])
def test_damage_is_judged_as_it_is_in_the_whole_picture(kind):
    """Scaled decoding leaves out of a quarantine nothing that Pillow's complete decoding puts into it."""
    picture = radiograph(420, 380)
    options = {"progressive": {"progressive": True}, "restart": {"restart_marker_blocks": 8}}.get(kind, {})
    whole = jpeg(colour(420, 380) if kind == "colour" else picture, quality=85, **options)
    draw = random.Random(kind)
    refused = 0
    for number in range(80):
        data = bytearray(whole)
        if number < 20:
            data = data[: draw.randrange(1, len(data))]
        else:
            for _ in range(draw.choice((1, 1, 5))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        reason = pillow_says(bytes(data))
        refused += reason is not None
        for encoding in (Encoding(), Encoding(size=300), Encoding(size=60), Encoding(size=20)):
            assert judged(bytes(data), encoding) == reason
    assert refused >= 20


def pillow_says(data: bytes) -> str | None:
    try:
        picture = shard_image.read_picture(data)
    except UnusableImage as reason:
        return str(reason)
    assert picture.size
    return None


def judged(data: bytes, encoding: Encoding) -> str | None:
    try:
        prepare(data, "jpg", encoding)
    except UnusableImage as reason:
        return str(reason)
    return None


def test_a_file_that_pillow_alone_takes_is_scaled_from_its_pixels():
    whole = jpeg(radiograph(300, 280))
    doubtful = whole[:-2] + b"\0" * 40 + whole[-2:]  # bytes between the last pixel and the end: a warning
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(doubtful, "GRAY")
    wanted = cv2.resize(pixels_of(doubtful), scaled_size(280, 300, 40), interpolation=cv2.INTER_AREA)
    made = prepare(doubtful, "jpg", Encoding(size=40, quality=95))
    assert cv2.PSNR(pixels_of(made.data), wanted) > 38
    assert prepare(doubtful, "jpg", Encoding()).data == doubtful


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("decoded")

    data = jpeg(radiograph(200, 180))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 180 // 2 - 1)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    for encoding in (Encoding(), Encoding(size=16)):
        with pytest.raises(UnusableImage, match="decompression bomb"):
            prepare(data, "jpg", encoding)


def test_ordinary_jpegs_never_reach_pillows_decoder(monkeypatch):
    def never(self):
        raise AssertionError("decoded by Pillow")

    from PIL import JpegImagePlugin

    data = {"grey": jpeg(radiograph(200, 180)), "colour": jpeg(colour(200, 180))}
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", never)
    for encoding in (Encoding(), Encoding(size=24), Encoding(size=150)):
        assert prepare(data["grey"], "jpg", encoding).channels == 1
        assert prepare(data["colour"], "jpg", encoding).channels == 3


# ---- what is stored


def test_kept_bytes_and_what_is_seen_in_them():
    grey = np.minimum(radiograph(120, 110), 200)
    for picture, channels in ((grey, 1), (colour(120, 110), 3), (np.stack([grey] * 3, axis=-1), 1)):
        data = jpeg(picture)
        made = prepare(data, "jpg", Encoding())
        assert made.data == data and (made.channels, made.bit_depth) == (channels, 8)
        assert made.pixel_max == pixels_of(data).max()


def test_grey_in_colour_files_is_stored_as_grey():
    grey = radiograph(120, 110)
    data = jpeg(np.stack([grey] * 3, axis=-1))
    made = prepare(data, "jpg", Encoding(size=60))
    assert made.channels == 1 and opened(made.data).mode == "L"
    marked = np.stack([grey] * 3, axis=-1)
    marked[40:44, 50:54] = (250, 10, 10)
    made = prepare(jpeg(marked), "jpg", Encoding(size=20))
    assert made.channels == 3 and opened(made.data).mode == "RGB"


def test_is_grey():
    pixels = np.repeat(np.random.default_rng(0).integers(0, 256, (700, 90, 1), dtype=np.uint8), 4, axis=2)
    pixels[..., 3] = 7  # transparency says nothing
    assert is_grey(pixels) and is_grey(pixels[..., :3])
    for place in ((0, 0, 1), (699, 89, 2), (257, 3, 0)):
        changed = pixels.copy()
        changed[place] ^= 1
        assert not is_grey(changed)


@pytest.mark.parametrize("quality", [50, 80, 95, 100])
def test_size_and_quality_are_those_of_pillow(quality):
    """The same bytes where both hold the same release of libjpeg-turbo."""
    for picture in (radiograph(300, 280), colour(300, 280)):
        ours, theirs = encoded(picture, "jpg", quality), jpeg(picture, quality)
        assert 0.99 < len(ours) / len(theirs) < 1.01
        assert abs(cv2.PSNR(pixels_of(ours), picture) - cv2.PSNR(pixels_of(theirs), picture)) < 0.05
        assert opened(ours).quantization == opened(theirs).quantization
        assert opened(ours).layer == opened(theirs).layer


def test_jpeg_has_a_largest_side():
    with pytest.raises(ValueError, match="more than 65500 pixels a side"):
        encoded(np.zeros((1, 65501), np.uint8), "jpg", 90)


@pytest.mark.parametrize("number", range(1, 9))
def test_what_is_encoded_anew_stands_upright(number):
    """EXIF does not come along, so the pixels are turned."""
    pixels = np.zeros((90, 120), np.uint8)
    pixels[:30, :40] = 240  # the light corner is where row and column 0 are
    exif = Image.Exif()
    exif[0x0112] = number
    data = jpeg(pixels, exif=exif)
    made = pixels_of(prepare(data, "jpg", Encoding(size=45)).data)
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[number]
    assert made.shape == ((45, 60) if number < 5 else (60, 45))
    rows, columns = (slice(0, 10) if top else slice(-10, None)), (slice(0, 10) if left else slice(-10, None))
    assert made[rows, columns].min() > 200 and made.mean() < 60
    assert prepare(data, "jpg", Encoding()).data == data


def test_broken_exif_does_not_cost_the_picture():
    data = jpeg(radiograph(90, 80), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert min(opened(prepare(data, "jpg", Encoding(size=20)).data).size) == 20


def test_the_encoder_names_what_decides_about_bytes():
    entry = Encoding(size=20, quality=90).describe("jpg")
    assert (entry["name"], entry["version"], entry["quality"]) == ("opencv", cv2.__version__, 90)
    assert entry["library"].startswith("libjpeg_turbo ") and "unknown" not in entry["library"]
    assert entry["resize"] == f"opencv {cv2.__version__} INTER_AREA"
    assert f"simplejpeg {simplejpeg.__version__}" in entry["decoder"] and "pillow" in entry["decoder"]
    png = Encoding(encode="png").describe("png")
    assert png["name"] == "pillow" and "zlib" in png["library"] and "resize" not in png and "quality" not in png
    assert Encoding().describe("jpg") == {"name": "original"}


def test_threads_of_opencv_change_no_byte():
    data = jpeg(colour(700, 600))
    before = cv2.getNumThreads()
    made = set()
    try:
        for threads in (0, 1, 4):
            cv2.setNumThreads(threads)
            made.add(prepare(data, "jpg", Encoding(size=100)).data)
    finally:
        cv2.setNumThreads(before)
    assert len(made) == 1
