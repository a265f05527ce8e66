"""Metadata goes, pixels and orientation stay, and a file without any is not touched."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from scaletransfer.decode import decode
from scaletransfer.image_metadata import without_metadata

SECRET = "Doe^Jane 1931-02-03"


def picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 17)
    return Image.fromarray(values).convert(mode)


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int = 1) -> Image.Exif:
    made = Image.Exif()
    made[ExifTags.Base.Artist] = SECRET
    made[ExifTags.Base.DateTime] = "2014:09:15 10:11:12"
    made[ExifTags.Base.Orientation] = orientation
    return made


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True, "comment": SECRET}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_exif_goes_but_for_the_orientation(kind, options, orientation):
    data = saved(kind, exif=exif(orientation), **options)
    assert SECRET.encode() in data and b"2014:09:15" in data
    clean = without_metadata(data)
    assert SECRET.encode() not in clean and b"2014:09:15" not in clean
    assert decode(clean, 3).equal(decode(data, 3))
    with Image.open(io.BytesIO(clean)) as opened:
        found = dict(opened.getexif())
    assert found == ({ExifTags.Base.Orientation: orientation} if orientation > 1 else {})
    assert without_metadata(clean) == clean


def test_text_xmp_and_what_follows_the_end():
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", SECRET)
    text.add_itxt("Comment", SECRET)
    text.add_text("Description", SECRET, zip=True)
    for data in (
        saved("PNG", pnginfo=text, icc_profile=b"profile"),
        saved("PNG", "I;16", pnginfo=text),
        saved("JPEG", xmp=SECRET.encode(), comment=SECRET),
        saved("WEBP", xmp=SECRET.encode()),
        saved("JPEG") + SECRET.encode(),
        saved("PNG") + SECRET.encode(),
    ):
        clean = without_metadata(data)
        assert len(clean) < len(data) and SECRET.encode() not in clean
        with Image.open(io.BytesIO(clean)) as a, Image.open(io.BytesIO(data)) as b:
            assert a.mode == b.mode and a.size == b.size and np.array_equal(np.asarray(a), np.asarray(b))
            assert not getattr(a, "text", {})
            assert a.info.get("icc_profile") == b.info.get("icc_profile")


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True, "restart_marker_blocks": 3}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"icc_profile": b"x" * 70_000}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "I;16", {}),
        ("PNG", "RGBA", {"dpi": (300, 300)}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"icc_profile": b"profile"}),
        ("BMP", "RGB", {}),
    ],
)
def test_a_file_without_metadata_is_the_same_object(kind, mode, options):
    data = saved(kind, mode, **options)
    assert without_metadata(data) is data


@given(st.binary(max_size=40), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_broken_files_raise_nothing_but_value_error(noise, kind):
    data = saved(kind)
    for broken in (data[: len(data) // 2], data[:4] + noise, data[:20] + noise + data[20 + len(noise) :]):
        try:
            assert isinstance(without_metadata(broken), bytes)
        except ValueError:
            continue
