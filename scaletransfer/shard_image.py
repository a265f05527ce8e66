"""One image on its way into a shard: verified by decoding it completely, scaled or re-encoded if asked to."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import PIL
from PIL import Image, UnidentifiedImageError, features

# Pillow can also start Ghostscript for EPS and more; data sets of images need none of that.  MPO, the JPEG
# of stereo cameras, opens as JPEG and then calls itself MPO.
READ_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
KEPT_EXTENSIONS = ("jpg", "png", "webp")
ENCODERS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}

# Pillow's mode -> (mode of a re-encoded image, channels, bits a channel).  What isn't here is quarantined.
MODES = {
    "1": ("L", 1, 8),
    "L": ("L", 1, 8),
    "LA": ("L", 1, 8),
    "I;16": ("I;16", 1, 16),
    "I;16B": ("I;16", 1, 16),
    "P": ("RGB", 3, 8),
    "RGB": ("RGB", 3, 8),
    "RGBA": ("RGB", 3, 8),
    "CMYK": ("RGB", 3, 8),
    "YCbCr": ("RGB", 3, 8),
}


class UnusableImage(Exception):
    """An image that goes into quarantine; the message is the reason, without path and identifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What happens to an image's bytes."""

    size: int = 0
    """Short side in pixels to scale down to (antialiased); 0 keeps the size.  Images are never enlarged."""
    encode: str = ""
    """Extension of the format to write, jpg or png; "" keeps the format of the file."""
    quality: int = 95
    """JPEG quality of images that are re-encoded."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"--size is {self.size}; give the short side in pixels, or 0 to keep the size")
        if self.encode not in ("", "jpg", "png"):
            raise ValueError(f"--encode is {self.encode!r}; give jpg or png, or leave it out")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; give a number from 1 to 100")

    def describe(self, extension: str) -> dict[str, Any]:
        """The entry `encoder` of the index: whatever changes the bytes of images."""
        if not self.size and not self.encode:
            return {"name": "original"}
        library = {"jpg": "libjpeg_turbo", "png": "zlib", "webp": "webp"}[extension]
        entry: dict[str, Any] = {
            "name": "pillow",
            "version": PIL.__version__,
            "library": f"{library} {features.version(library) or 'unknown'}",
            "size": self.size,
        }
        return entry | ({"quality": self.quality} if extension != "png" else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The bytes that go into the shard, and what was seen in them."""

    data: bytes
    channels: int
    bit_depth: int
    pixel_max: int


def prepare(data: bytes, extension: str, encoding: Encoding) -> Prepared:
    """Verify the image file `data` by decoding it completely, and give the bytes to store under `extension`.

    The bytes stay as they are unless `encoding` scales this image or asks for another format than its own.
    Grey stays grey; 16-bit grey stays 16-bit.  Raises UnusableImage with the reason for an image that is
    empty, broken, truncated, of an unknown kind or suspiciously large, ValueError if 16 bits should go into
    a JPEG.
    """
    picture = _decode(data)
    if picture.mode not in MODES:
        raise UnusableImage(f"pixel format {picture.mode} is not supported")
    mode, channels, depth = MODES[picture.mode]
    short = min(picture.size)
    scaled = bool(encoding.size) and short > encoding.size
    target = ENCODERS[extension]
    is_target = picture.format == target or (target == "JPEG" and picture.format == "MPO")
    if scaled or (encoding.encode and not is_target):
        if depth == 16 and extension == "jpg":
            raise ValueError("an image has 16 bits a pixel and JPEG holds 8: give --encode png")
        picture = _convert(picture, mode)
        if scaled:
            width, height = (max(1, round(side * encoding.size / short)) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        data = _encode(picture, target, encoding.quality)
    return Prepared(data=data, channels=channels, bit_depth=depth, pixel_max=_maximum(picture, depth))


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise UnusableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            # Half of the limit gives a warning only, and such radiographs exist.
            warnings.simplefilter("ignore")
            Image.init()  # once: `formats` may name plugins only after they are loaded
            picture = Image.open(io.BytesIO(data), formats=READ_FORMATS)
            picture.load()
    except UnidentifiedImageError:
        raise UnusableImage("the file is not an image of a known format") from None
    except Image.DecompressionBombError:
        raise UnusableImage("the image claims more pixels than can be real (decompression bomb)") from None
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files.
        # Only the kind is kept: messages hold memory addresses and would make the index differ between runs.
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = "truncated" if truncated else f"cannot be decoded ({type(error).__name__})"
        raise UnusableImage(f"the image is {what}" if truncated else f"the image {what}") from None
    return picture


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode == "I;16B":
        return picture.convert("I").convert("I;16")
    return picture.convert(mode)


def _encode(picture: Image.Image, target: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    # Text, EXIF and profiles of the original are left behind: they may name a patient.
    options: dict[str, Any] = {"optimize": False} if target == "PNG" else {"quality": quality}
    clean = Image.new(picture.mode, picture.size)
    clean.paste(picture)
    clean.save(buffer, target, **options)
    return buffer.getvalue()


def _maximum(picture: Image.Image, depth: int) -> int:
    extrema = picture.getextrema()
    if isinstance(extrema[0], tuple):
        return max(int(high) for _, high in extrema)  # type: ignore[misc]
    high = int(extrema[1])  # type: ignore[arg-type]
    # mode 1 counts white as 255 in Pillow; a palette's largest index says nothing about its colours
    return 255 if picture.mode in ("P", "1") else min(high, 2**depth - 1)
