"""Pixels on their way into a shard, as arrays: ordinary JPEGs decoded, everything scaled by area and encoded.

One filter for every image and bit depth: the mean over the area of the original that a new pixel covers
(OpenCV's INTER_AREA).  It is well-defined, never leaves the range of the values and needs a third of the time of
Pillow's antialiased filters.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, features

from scaletransfer.pixel_range import WHITE16

_ROWS = 256  # rows that are compared at a time: three planes of them stay in the processor's cache
_JPEG_SIDE = 65500  # of libjpeg
_MAY_TURN = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # keys of what Pillow calls info
# EXIF 2.32, section 4.6.4 (Orientation) -> what makes the picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own where processes share the cores."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def scaled_size(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) of a picture whose short side has become `short`."""
    side = min(width, height)
    return max(1, round(width * short / side)), max(1, round(height * short / side))


def is_ordinary_jpeg(picture: Image.Image) -> bool:
    """Whether an opened file is an upright JPEG in grey or in red, green and blue; MPO is what Pillow calls JPEGs of
    stereo cameras."""
    return picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB") and orientation(picture) == 1


def jpeg_pixels(data: bytes, picture: Image.Image, short: int = 0) -> NDArray[np.uint8] | None:
    """The pixels of an ordinary JPEG, uint8 [H, W] or [H, W, 3] (RGB); None where Pillow has to decide.

    picture: the same file opened by Pillow, which has refused sizes that cannot be.  short: the short side that the
    picture will be scaled to, 0 for none.  Decoding then leaves out what that cannot show: it gives half, a quarter or
    an eighth of both sides (rounded up), the smallest that is at least twice as large as what comes out in the end.
    The whole file is read all the same, and the library's warnings count: None for a file that is cut off or damaged.
    """
    width, height = picture.size
    factor = reduction(width, height, short)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if picture.mode == "L" else "RGB",
            min_height=-(-height // factor) if factor > 1 else 0,
            min_width=-(-width // factor) if factor > 1 else 0,
            strict=True,
        )
    except ValueError:
        return None  # also where it is only doubtful: Pillow takes some damage, and names the reason where not
    if pixels.shape[:2] != (-(-height // factor), -(-width // factor)):
        return None  # a few pixels in all, of which another reduction gives as many
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def reduction(width: int, height: int, short: int) -> int:
    """By what the sides of a JPEG are divided in decoding: 8, 4, 2 or 1.

    Other scales of the library (3/8, 5/8, ...) are slower than the whole picture and far less exact.
    """
    sides = tuple(zip((width, height), scaled_size(width, height, short), strict=True)) if short else ()
    for factor in (8, 4, 2):
        # The second condition: `scaled` leaves rounding to OpenCV, which fails for sides of a few pixels alone.
        if (
            sides
            and min(width, height) >= 2 * short * factor
            and all(round(-(-side // factor) * (new * factor / side)) == new for side, new in sides)
        ):
            return factor
    return 1


def scaled(pixels: NDArray[Any], original: tuple[int, int], short: int) -> NDArray[Any]:
    """The picture with the short side `short`: uint8 or uint16, [H, W] or [H, W, 3] as it was.

    original: (width, height) of the whole picture, of which `pixels` may be a reduction by `jpeg_pixels`.
    """
    width, height = scaled_size(*original, short)
    factor = 1 if pixels.shape[1::-1] == original else reduction(*original, short)
    if factor == 1:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    # The last column of a reduction stands for fewer pixels than the others.  With sizes alone the picture would be
    # squeezed by that (a third of a pixel, 38 dB); with exact factors it isn't, and the size comes out by rounding.
    fx, fy = width * factor / original[0], height * factor / original[1]
    small = cv2.resize(pixels, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)
    assert small.shape[:2] == (height, width)
    return small


def is_grey(pixels: NDArray[Any]) -> bool:
    """Whether the three channels of [H, W, 3 or 4] are equal everywhere."""
    few = pixels[::16, ::16]  # a colour picture shows it in a few pixels
    if not (np.array_equal(few[..., 0], few[..., 1]) and np.array_equal(few[..., 0], few[..., 2])):
        return False
    for start in range(0, len(pixels), _ROWS):
        red, green, blue = (cv2.extractChannel(pixels[start : start + _ROWS], channel) for channel in range(3))
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            return False
    return True


def encoded(pixels: NDArray[Any], extension: str, quality: int, declared: int = 0) -> bytes:
    """An image file of the format `extension` that holds the pixels and nothing else.

    pixels: uint8 [H, W] or [H, W, 3], for png uint16 [H, W] too.  quality: of jpg and webp.  declared: the white that
    a 16-bit PNG says it has, 0 for none.
    """
    if extension == "jpg":
        if max(pixels.shape) > _JPEG_SIDE:
            raise ValueError(f"it has more than {_JPEG_SIDE} pixels a side, which JPEG cannot hold: give --size")
        # Not simplejpeg: below quality 96 its encoder takes a coarser transform, 0.3 dB worse at 1 % more bytes.
        # These are Pillow's bytes, colour at half the resolution.
        picture = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        done, stored = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done
        return stored.tobytes()
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": False} if extension == "png" else {"quality": quality}
    if extension == "png" and 0 < declared < WHITE16:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(b"sBIT", bytes([declared.bit_length()]))
    Image.fromarray(pixels).save(buffer, "PNG" if extension == "png" else "WEBP", **options)
    return buffer.getvalue()


def libraries(extension: str, *, scales: bool) -> dict[str, Any]:
    """What the index says of the libraries that decide about the bytes of re-encoded images of the format `extension`.

    simplejpeg holds a libjpeg-turbo of its own, of which it does not tell the version: its own stands for that.
    """
    if extension == "jpg":
        found = re.search(r"JPEG:.*\(ver (\S+)\)", cv2.getBuildInformation())
        entry = {
            "name": "opencv",
            "version": cv2.__version__,
            "library": f"libjpeg_turbo {found[1] if found else 'unknown'}",
        }
    else:
        library = {"png": "zlib", "webp": "webp"}[extension]
        entry = {"name": "pillow", "version": PIL.__version__, "library": f"{library} {_version(library)}"}
    # what is no ordinary JPEG is decoded by Pillow
    pillow = f"pillow {PIL.__version__} (libjpeg_turbo {_version('libjpeg_turbo')}, webp {_version('webp')})"
    entry["decoder"] = f"simplejpeg {simplejpeg.__version__}, {pillow}"
    return entry | ({"resize": f"opencv {cv2.__version__} INTER_AREA"} if scales else {})


def _version(library: str) -> str:
    return features.version(library) or "unknown"


def orientation(picture: Image.Image) -> int:
    """EXIF's number, 1 (upright) to 8; 1 where the file says none, or nothing that can be read."""
    if picture.format == "TIFF" or not picture.info.keys() & _MAY_TURN:  # Pillow turns TIFF itself
        return 1
    try:
        number = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:
        return 1  # Pillow raises SyntaxError, struct.error, ValueError, ... on broken EXIF
    return number if isinstance(number, int) and number in _UPRIGHT else 1


def upright(picture: Image.Image) -> Image.Image:
    """A decoded picture the way EXIF says it is looked at: what is encoded anew has no EXIF to say so."""
    turn = _UPRIGHT.get(orientation(picture))
    return picture if turn is None else picture.transpose(turn)
