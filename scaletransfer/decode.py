"""The bytes of one image file -> an integer tensor, whatever kind of file it is; or one reason why not.

JPEG goes through simplejpeg (libjpeg-turbo): it gives the same pixels as Pillow's decoder in less time, releases the
interpreter's lock, and can decode at a part of the size.  Everything else, and a JPEG with something special about it,
goes through Pillow.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from scaletransfer.dicom import is_dicom, read_dicom, read_header
from scaletransfer.pixel_range import WHITE16, declared_white
from scaletransfer.shard_image import READ_FORMATS
from scaletransfer.shard_pixels import is_ordinary_jpeg, orientation, upright

_GREY_MODES = ("1", "L", "LA", "La")
_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
_PASSED = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}) - {0xE1}
"""Markers of segments that change nothing here: tables, comments, and what applications add but for EXIF and XMP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Bits and whites of what ``decode`` gives, see there."""

    depth: int = 8
    deep_white: int = WHITE16
    white: int = WHITE16


class PlainJpeg(NamedTuple):
    """What the header of an ordinary JPEG says."""

    height: int
    width: int
    height_at: int
    """Offset of the two bytes of the height."""
    rows_at_once: int
    """Rows of a block of all components; 0 where the file is not one scan from top to bottom."""
    colour: bool


def decode_at(
    data: bytes | memoryview,
    channels: int,
    how: Decoding,
    scale: int = 1,
    plain: PlainJpeg | None = None,
    memory: np.ndarray | None = None,
    rows: int | None = None,
) -> np.ndarray:
    """``decode`` as an array [H, W] (channels 1) or [H, W, 3]; at 1 / scale of the size where that is a plain JPEG.

    scale: 1, 2, 4 or 8; above 1 only where ``plain_jpeg`` is not None.  A pixel at 1 / scale stands for scale x
    scale pixels; sides are rounded up.  plain: ``plain_jpeg``, where it is at hand.  memory: uint8, of the size of
    the whole result, which may be put there; only where ``plain_jpeg`` is not None.  rows: no more than the first so
    many rows of the result are wanted, and the bytes are known to be whole: what lies below may be left out, and damage
    may pass unseen.  Otherwise damaged data has the reasons of ``decode``.
    """
    if how.depth == 8:
        plain = plain or plain_jpeg(data)
        if plain is not None:
            upper = None if rows is None else _upper(data, plain, rows * scale, scale)
            file, height = upper or (data, plain.height)
            try:
                # libjpeg-turbo takes the smallest of its scales that is at least as large: exactly this one
                pixels = simplejpeg.decode_jpeg(
                    file,
                    "GRAY" if channels == 1 else "RGB",
                    min_height=-(-height // scale),
                    min_width=-(-plain.width // scale),
                    buffer=memory,
                    strict=upper is None,  # the rest of the file is there, of which the header knows nothing any more
                )
            except ValueError:
                pixels = None  # Pillow has the last word
            if pixels is not None:
                return pixels[..., 0] if channels == 1 else pixels
    picture = decode(bytes(data), channels, how.depth, how.deep_white, how.white).numpy()
    if scale > 1:  # Pillow accepted what simplejpeg did not: reduced to what was asked for
        height, width = picture.shape[1] // scale, picture.shape[2] // scale
        blocks = picture[:, : height * scale, : width * scale].reshape(channels, height, scale, width, scale)
        picture = blocks.mean(axis=(2, 4)).round().astype(picture.dtype)
    return picture[0] if channels == 1 else np.ascontiguousarray(np.moveaxis(picture, 0, -1))


def _upper(data: bytes | memoryview, plain: PlainJpeg, rows: int, scale: int) -> tuple[bytearray, int] | None:
    """The file with a smaller height in its header, and that height: at least ``rows``, and all of them as before.

    A sequential scan holds the picture from top to bottom, so a decoder that is told of fewer rows reads fewer bytes.
    None where that leaves nothing out, or where the file does not end as it should.
    """
    if not plain.rows_at_once or data[-2:] != b"\xff\xd9":
        return None
    # chroma that has fewer rows than luma is interpolated from the rows below, too
    needed = rows + 2 * scale if plain.colour else rows
    height = -(-needed // plain.rows_at_once) * plain.rows_at_once
    if height >= plain.height:
        return None
    changed = bytearray(data)
    struct.pack_into(">H", changed, plain.height_at, height)
    return changed, height


def decode(data: bytes, channels: int, depth: int = 8, deep_white: int = WHITE16, white: int = WHITE16) -> Tensor:
    """The upright picture in the image file `data`: uint8 (depth 8) or uint16 (depth 16) [channels, H, W].

    JPEG, PNG, WebP, BMP, TIFF, GIF and PPM/PGM of 1 to 16 bits a channel; of an animation, the first frame.
    DICOM of one grey picture (`dicom.read_dicom`).
    EXIF orientation is applied.  Transparency is dropped without a background, as Pillow's `convert("RGB")` does:
    pixels behind it show the colour that the file has for them.  Embedded colour profiles are not applied.

    channels: 1 gives grey (ITU-R 601-2 luma; of a JPEG its own luma plane), 3 gives RGB, grey repeated.
    depth, deep_white, white: a value becomes round(value * new / old), half up.  `old` is what stands for white in
    the file: 255 of 8 bits, of 16 bits what it declares itself (`pixel_range.declared_white`; 65535 of DICOM), else
    `deep_white`.  `new` is 255, or with depth 16 `white`.  So by default 8-bit values become value * 257, 16-bit
    values round(value / 257).  Of 16-bit colour (PNG, TIFF) and of 16-bit grey with transparency Pillow keeps the
    upper 8 bits.

    Raises ValueError with a reason that names no file: empty, broken, truncated, of an unknown kind, of pixels that
    are no 8- or 16-bit values or larger than `deep_white`, claiming more than twice `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (179 million), or DICOM where pydicom is missing.
    """
    assert channels in (1, 3) and depth in (8, 16)
    if is_dicom(data):
        shown = torch.from_numpy(read_dicom(data))[None]
        return _fit(shown, channels, depth, WHITE16, white)
    # Opening a file in Pillow costs as much as decoding a thumbnail: ordinary JPEGs go without.
    picture = None if plain_jpeg(data) else _open(data)
    pixels = None
    if picture is None or is_ordinary_jpeg(picture):
        try:
            array = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
            pixels = torch.from_numpy(array).movedim(-1, 0).contiguous()
        except ValueError:
            # Pillow has the last word, as it has in make_shards; it also knows the better reasons.
            pixels = None
    if pixels is None:
        pixels = _by_pillow(picture or _open(data), channels)
    if pixels.dtype == torch.uint16:
        deep_white = declared_white(data, pixels.numpy()) or _checked(pixels, deep_white)
    return _fit(pixels, channels, depth, deep_white, white)


def image_size(data_or_head: bytes) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from the header of an image file.

    The first 64 KiB are enough for nearly every file; TIFF may keep its header at the end, and WebP is always
    needed whole.  Raises ValueError with a reason that names no file where the header is not (all) there.
    """
    if is_dicom(data_or_head):
        return read_header(data_or_head)[:2]
    picture = _open(data_or_head)
    width, height = picture.size
    # of a PNG that says how it is turned behind its pixels, height and width come out the other way round
    return (width, height) if orientation(picture) >= 5 else (height, width)


def plain_jpeg(data: bytes | memoryview) -> PlainJpeg | None:
    """Sides of a JPEG of 8-bit grey or colour without EXIF or XMP and of a possible size; None for all else.

    Segments as in ITU-T T.81, annex B; anything out of the ordinary is None.
    """
    if data[:2] != b"\xff\xd8":
        return None
    at, found, last = 2, None, len(data) - 10
    while at <= last:
        start, marker, length = _SEGMENT.unpack_from(data, at)
        if start != 0xFF:
            return None
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended and progressive frames
            bits, height, width, components = _FRAME.unpack_from(data, at + 4)
            if bits != 8 or not 0 < height * width <= _most_pixels() or components not in (1, 3):
                return None
            block = 8 * max((rows & 15 for rows in data[at + 11 : at + 10 + 3 * components : 3]), default=0)
            found = PlainJpeg(height, width, at + 5, block if marker != 0xC2 else 0, components == 3)
        elif marker == 0xDA:  # start of the first scan
            if found is not None and data[at + 4] != (3 if found.colour else 1):
                return found._replace(rows_at_once=0)  # a scan for each component
            return found
        elif marker not in _PASSED:
            return None
        at += 2 + length
    return None


def _most_pixels() -> int:
    """Pillow's limit, above which it calls a file a decompression bomb."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 2**62


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    with _reasons():
        Image.init()  # once: `formats` may name plugins only after they are loaded
        return Image.open(io.BytesIO(data), formats=READ_FORMATS)


def _by_pillow(picture: Image.Image, channels: int) -> Tensor:
    """uint8 or uint16, [1, H, W] or [3, H, W]."""
    with _reasons():
        if channels == 1:
            picture.draft("L", None)  # a JPEG's own luma plane, as torchvision gives it
        picture.load()
        picture = upright(picture)
        integers = picture.mode == "F" or picture.mode.startswith("I")
        mode = "L" if picture.mode in _GREY_MODES else "RGB"
        if not integers and picture.mode != mode:
            picture = picture.convert(mode)
        array = np.array(picture)
    if integers:
        return _integers(array)
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)


def _integers(values: np.ndarray) -> Tensor:
    """uint16 [1, H, W] of what Pillow calls I, I;16, I;16B or F; ValueError for other values than 16-bit integers."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are not 8- or 16-bit values; save it as PNG with 8 or 16 bits")
    return torch.from_numpy(values.astype(np.uint16))[None]


def _checked(pixels: Tensor, deep_white: int) -> int:
    """`deep_white`; ValueError where a value is larger, since the whole picture would be too bright."""
    if deep_white < WHITE16 and (largest := int(pixels.numpy().max(initial=0))) > deep_white:
        raise ValueError(
            f"it has the value {largest}, but in the other images of its set {deep_white} is white; shards of the set "
            "have the range of all its images"
        )
    return deep_white


def _fit(pixels: Tensor, channels: int, depth: int, deep_white: int, white: int) -> Tensor:
    """Any uint8 or uint16 [1 or 3, H, W] -> the asked-for number of channels and bits.

    deep_white: of uint16 pixels; white: of the result with depth 16.
    """
    if channels == 1 and len(pixels) == 3:
        # Pillow's conversion to "L" in its own fixed-point numbers, so that both ways give the same.
        wide = pixels.to(torch.int64)
        luma = (wide[:1] * 19595 + wide[1:2] * 38470 + wide[2:] * 7471 + 0x8000) >> 16
        pixels = luma.to(pixels.dtype)
    old = 255 if pixels.dtype == torch.uint8 else deep_white
    new, dtype = (255, torch.uint8) if depth == 8 else (white, torch.uint16)
    if pixels.dtype != dtype or old != new:
        wide = pixels.to(torch.int64)
        pixels = ((wide * (2 * new) + old) // (2 * old)).to(dtype)
    return pixels.expand(3, -1, -1).contiguous() if channels == 3 and len(pixels) == 1 else pixels


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises inside comes out as a ValueError with a reason."""
    try:
        with warnings.catch_warnings():
            # Half of the limit of pixels gives a warning only, and such radiographs exist.
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError:
        raise ValueError("it is not an image of a known format, or its header is cut off") from None
    except Image.DecompressionBombError:
        raise ValueError("it claims more pixels than can be real") from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files.
        text = " ".join(str(error).split())
        truncated = isinstance(error, EOFError) or "truncated" in text.lower()
        raise ValueError("it is truncated" if truncated else f"it is broken: {text or type(error).__name__}") from None
