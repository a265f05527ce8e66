"""Every kind of image file becomes the picture that Pillow shows, upright; whatever is broken becomes one sentence."""

from __future__ import annotations

import io
import multiprocessing
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import ndimage

from scaletransfer import decode as module
from scaletransfer.decode import Decoding, decode, decode_at, image_size


def _picture(channels: int, height: int = 48, width: int = 64) -> Image.Image:
    noise = np.random.default_rng(channels).random((height, width, channels))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
    pixels = ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


GREY, COLOUR = _picture(1), _picture(3)
DEEP = Image.fromarray(np.random.default_rng(3).integers(0, 65536, (48, 64), dtype=np.uint16))
LOSSLESS = {"WEBP": {"lossless": True}}


def _in_mode(mode: str) -> Image.Image:
    if mode in ("RGBA", "LA"):
        picture = (COLOUR if mode == "RGBA" else GREY).copy()
        picture.putalpha(GREY.rotate(180))
        return picture
    return (GREY if mode in ("1", "L") else COLOUR).convert(mode)


def _file(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def _by_pillow(data: bytes, channels: int) -> np.ndarray:
    """[channels, H, W] as integers, by Pillow alone."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"), dtype=np.int64)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)


def _png(values: np.ndarray, colour_type: int, chunks: dict[bytes, bytes] | None = None) -> bytes:
    """A 16-bit PNG (W3C PNG, section 11) of kinds that Pillow cannot write: [H, W, c] uint16."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    extra = b"".join(chunk(name, content) for name, content in (chunks or {}).items())
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


CASES = {
    "JPEG": ("1", "L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "WEBP": ("L", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in CASES.items() for mode in modes])
def test_pixels_are_those_of_pillow(kind: str, mode: str) -> None:
    data = _file(_in_mode(mode), kind, **LOSSLESS.get(kind, {}))
    for channels in (1, 3):
        pixels = decode(data, channels)
        assert pixels.dtype == torch.uint8 and pixels.shape == (channels, 48, 64)
        # One level where grey is made of colour: Pillow rounds palettes and JPEG's luma differently.
        tolerance = 1 if channels == 1 else 0
        assert abs(pixels.numpy().astype(int) - _by_pillow(data, channels)).max() <= tolerance
        deep = decode(data, channels, 16)
        assert deep.dtype == torch.uint16 and torch.equal(deep.to(torch.int32), pixels.to(torch.int32) * 257)
    assert image_size(data) == (48, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_orientation_is_applied(kind: str, mode: str, orientation: int) -> None:
    data = _file(_in_mode(mode), kind, exif=_turned(orientation))
    for channels in (1, 3):
        wanted = _by_pillow(data, channels)
        assert wanted.shape[1:] == ((48, 64) if orientation < 5 else (64, 48))
        pixels = decode(data, channels).numpy().astype(int)
        assert pixels.shape == wanted.shape and abs(pixels - wanted).max() <= (channels == 1)
    # Before the pixels of a PNG or JPEG, EXIF is part of the header.
    assert image_size(data) == image_size(data[: len(data) // 2]) == wanted.shape[1:]


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_orientation_of_tiff_webp_and_xmp(orientation: int) -> None:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    late = _file(COLOUR, "PNG", exif=_turned(orientation))
    start = late.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(late[start : start + 4], "big")
    late = late[:start] + late[stop:-12] + late[start:stop] + late[-12:]  # the EXIF chunk after the pixels
    for data in (
        _file(COLOUR, "TIFF", exif=_turned(orientation)),
        _file(COLOUR, "WEBP", exif=_turned(orientation), lossless=True),
        _file(COLOUR, "JPEG", xmp=xmp),
        late,
    ):
        assert np.array_equal(decode(data, 3).numpy(), _by_pillow(data, 3))
        assert np.array_equal(decode(data, 3).shape[1:], (48, 64) if orientation == 3 else (64, 48))
    deep = _file(DEEP, "TIFF", exif=_turned(orientation))
    assert np.array_equal(decode(deep, 1, 16)[0].numpy(), np.asarray(ImageOps.exif_transpose(_opened(deep))))


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = _file(COLOUR, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert np.array_equal(decode(data, 3).numpy(), np.moveaxis(np.asarray(_opened(data)), -1, 0))
    assert image_size(data) == (48, 64)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey(kind: str) -> None:
    data, wanted = _file(DEEP, kind), np.asarray(DEEP)
    assert np.array_equal(decode(data, 1, 16)[0].numpy(), wanted)
    assert np.array_equal(decode(data, 1)[0].numpy(), np.round(wanted / 257))
    assert np.array_equal(decode(data, 3, 16).numpy(), np.stack([wanted] * 3))


def test_16_bit_grey_in_either_byte_order_and_its_extremes() -> None:
    values = np.array([[0, 128, 129, 256, 257, 65406, 65407, 65535]], dtype=np.uint16)
    big = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    for picture in (big, Image.fromarray(values)):
        data = _file(picture, "TIFF")
        assert decode(data, 1)[0, 0].tolist() == [0, 0, 1, 1, 1, 254, 255, 255]
        assert np.array_equal(decode(data, 1, 16)[0].numpy(), values)


def test_16_bit_colour_and_transparency() -> None:
    """Pillow keeps the upper eight bits: at most one level beside the rounded value."""
    for channels, colour_type in ((3, 2), (4, 6), (2, 4)):
        values = np.random.default_rng(channels).integers(0, 65536, (12, 9, channels), dtype=np.uint16)
        pixels = decode(_png(values, colour_type), 3).numpy().astype(int)
        colours = values[..., : 3 if channels > 2 else 1]
        assert abs(pixels - np.moveaxis(np.broadcast_to(colours // 256, (12, 9, 3)), -1, 0)).max() == 0
        assert abs(pixels - np.moveaxis(np.broadcast_to(colours / 257, (12, 9, 3)), -1, 0)).max() <= 1


def test_transparency_is_dropped_and_gamma_is_left_alone() -> None:
    see_through = _in_mode("RGBA")
    opaque = np.moveaxis(np.asarray(see_through)[..., :3], -1, 0)
    assert np.array_equal(decode(_file(see_through, "PNG"), 3).numpy(), opaque)
    palette = COLOUR.convert("P", palette=Image.Palette.ADAPTIVE)
    wanted = np.moveaxis(np.asarray(palette.convert("RGB")), -1, 0)
    for transparency in (3, bytes(range(200))):
        assert np.array_equal(decode(_file(palette, "PNG", transparency=transparency), 3).numpy(), wanted)
    values = np.asarray(COLOUR).astype(np.uint16) * 257
    plain, gamma = _png(values, 2), _png(values, 2, {b"gAMA": struct.pack(">I", 45455)})
    assert torch.equal(decode(plain, 1), decode(gamma, 1))


def test_adobe_cmyk_has_the_colours_of_its_picture() -> None:
    """Adobe's CMYK JPEGs hold inverted values; read the other way round, white would be black."""
    white = Image.new("RGB", (16, 16), (250, 240, 10)).convert("CMYK")
    data = _file(white, "JPEG", quality=95)
    assert b"Adobe" in data
    assert abs(decode(data, 3)[:, 8, 8].float() - torch.tensor([250.0, 240.0, 10.0])).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    second = Image.new("RGB", COLOUR.size, (255, 0, 0))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _file(COLOUR, kind, save_all=True, append_images=[second], **options)
    assert _opened(data).n_frames == 2
    assert np.array_equal(decode(data, 3).numpy(), _by_pillow(data, 3))
    assert abs(decode(data, 3).numpy().astype(int) - np.moveaxis(np.asarray(COLOUR), -1, 0)).mean() < 8


def test_simplejpeg_and_pillow_agree_bit_for_bit(monkeypatch) -> None:
    """Which of them decodes a JPEG depends on its EXIF: no picture may look different for it."""
    saturated = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    files = [
        _file(picture, "JPEG", quality=quality, progressive=progressive, subsampling=subsampling)
        for picture in (saturated, COLOUR, GREY)
        for quality, progressive, subsampling in ((75, False, 2), (95, True, 0), (30, False, 1))
    ]
    files.append(_file(COLOUR, "JPEG", keep_rgb=True))
    assert all(
        (plain := module.plain_jpeg(data)) and plain[:2] == (image.height, image.width)
        for data in files
        for image in [Image.open(io.BytesIO(data))]
    )
    fast = [decode(data, channels) for data in files for channels in (1, 3)]

    def refuse(*_, **__):
        raise ValueError("not this one")

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", refuse)
    assert all(
        torch.equal(one, other)
        for one, other in zip(fast, [decode(data, c) for data in files for c in (1, 3)], strict=True)
    )


def test_ordinary_jpegs_do_not_go_through_pillow(monkeypatch) -> None:
    monkeypatch.setattr(module, "_by_pillow", None)
    for data in (_file(GREY, "JPEG"), _file(COLOUR, "JPEG", exif=_turned(1)), _file(COLOUR, "JPEG", dpi=(300, 300))):
        assert decode(data, 3).shape == (3, 48, 64)
    with pytest.raises(TypeError):
        decode(_file(COLOUR, "JPEG", exif=_turned(2)), 3)


# ---- what is refused


def _refused(data: bytes, channels: int = 3) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        decode(data, channels)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 200 and " at 0x" not in text
    return text


def test_reasons() -> None:
    jpeg, png = _file(COLOUR, "JPEG"), _file(COLOUR, "PNG")
    assert _refused(b"") == "the file is empty"
    assert "not an image of a known format" in _refused(b"\x80\x04 this is no picture")
    assert "truncated" in _refused(jpeg[: len(jpeg) // 2]) and "truncated" in _refused(png[: len(png) // 2])
    assert "broken" in _refused(png[:200] + bytes([png[200] ^ 1]) + png[201:])
    assert "8- or 16-bit values" in _refused(_file(GREY.convert("F"), "TIFF"))
    assert "8- or 16-bit values" in _refused(_file(Image.fromarray(np.full((3, 3), 70000, np.int32)), "TIFF"))
    assert "known format" in _refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="the file is empty"):
        image_size(b"")
    with pytest.raises(ValueError, match=r"truncated|cut off"):
        image_size(png[:20])


def test_decompression_bombs_are_refused_before_memory_is_asked_for(monkeypatch) -> None:
    jpeg = _file(COLOUR, "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    huge = jpeg[: frame + 5] + struct.pack(">HH", 65000, 65000) + jpeg[frame + 9 :]
    large = _png(np.zeros((1, 1, 1), np.uint16), 0)
    header = struct.pack(">II", 200_000, 200_000) + large[24:29]
    bomb = large[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + large[33:]
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", None)
    for data in (huge, bomb):
        assert "more pixels than can be real" in _refused(data)
        with pytest.raises(ValueError, match="more pixels than can be real"):
            image_size(data)


FILES = {
    "jpeg": _file(COLOUR, "JPEG"),
    "progressive": _file(COLOUR, "JPEG", progressive=True),
    "exif": _file(GREY, "JPEG", exif=_turned(6)),
    "cmyk": _file(COLOUR.convert("CMYK"), "JPEG"),
    "png": _file(COLOUR, "PNG"),
    "deep": _file(DEEP, "PNG"),
    "palette": _file(COLOUR.convert("P"), "PNG", transparency=bytes(range(200))),
    "webp": _file(COLOUR, "WEBP"),
    "bmp": _file(COLOUR, "BMP"),
    "tiff": _file(DEEP, "TIFF"),
    "lzw": _file(COLOUR, "TIFF", compression="tiff_lzw"),
    "gif": _file(COLOUR.convert("P"), "GIF"),
    "ppm": _file(COLOUR, "PPM"),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_damaged_files_are_refused_or_read_and_nothing_else(name: str) -> None:
    """Cut off, and with bytes changed: a tensor of the right kind or a ValueError."""

    @settings(max_examples=60, deadline=None)
    @given(cut=st.integers(0, len(FILES[name])), changes=st.dictionaries(st.integers(0, 4000), st.integers(0, 255)))
    def check(cut: int, changes: dict[int, int]) -> None:
        data = bytearray(FILES[name])
        for place, value in changes.items():
            data[place % len(data)] = value
        for damaged in (bytes(data), FILES[name][:cut]):
            for channels, depth in ((1, 8), (3, 16)):
                try:
                    pixels = decode(damaged, channels, depth)
                except ValueError as error:
                    assert str(error) and "\n" not in str(error)
                    continue
                assert pixels.dtype == (torch.uint8 if depth == 8 else torch.uint16)
                assert pixels.shape == (channels, *image_size(damaged))

    check()


def test_a_wrong_byte_in_a_png_does_not_end_the_process() -> None:
    """As it does in torchvision 0.29.1: in a process of its own, so that the other tests would go on."""

    def read() -> None:
        data = bytearray(FILES["png"])
        data[len(data) // 2] ^= 1
        assert "broken" in _refused(bytes(data))

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(60)
    assert process.exitcode == 0


# ---- at a part of the size


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("picture", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_part_of_the_size_is_the_mean_of_blocks(picture: Image.Image, scale: int) -> None:
    """Against full decode and the mean of each block: an inverse DCT of fewer coefficients is nearly that."""
    large = picture.resize((37 * 16 + 3, 29 * 16 + 5), Image.Resampling.BICUBIC)
    data = _file(large, "JPEG", quality=95)
    for channels in (1, 3):
        whole = decode(data, channels).numpy().astype(np.float64)
        small = decode_at(data, channels, Decoding(), scale)
        height, width = -(-large.height // scale), -(-large.width // scale)
        assert small.dtype == np.uint8 and small.shape == ((height, width) if channels == 1 else (height, width, 3))
        rows, columns = large.height // scale, large.width // scale
        blocks = whole[:, : rows * scale, : columns * scale].reshape(channels, rows, scale, columns, scale)
        found = small[None] if channels == 1 else np.moveaxis(small, -1, 0)
        error = np.square(blocks.mean(axis=(2, 4)) - found[:, :rows, :columns]).mean()
        assert 10 * np.log10(255**2 / error) > 45


def test_a_part_of_the_size_where_pillow_has_the_last_word(monkeypatch) -> None:
    data = _file(COLOUR.resize((640, 480)), "JPEG", quality=95)
    fast = [decode_at(data, channels, Decoding(), 4).astype(int) for channels in (1, 3)]

    def refuse(*_, **__):
        raise ValueError("not this one")

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", refuse)
    for quick, channels in zip(fast, (1, 3), strict=True):
        slow = decode_at(data, channels, Decoding(), 4)
        assert slow.shape == quick.shape and np.abs(slow - quick).mean() < 1


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("cut", [0.3, 0.7, 0.99])
def test_a_truncated_jpeg_is_noticed_at_every_scale(scale: int, cut: float) -> None:
    data = _file(COLOUR.resize((640, 480)), "JPEG", quality=95)
    with pytest.raises(ValueError, match="truncated"):
        decode_at(data[: int(cut * len(data))], 3, Decoding(), scale)
