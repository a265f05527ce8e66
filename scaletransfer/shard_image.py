"""One image on its way into a shard: verified by decoding it completely, scaled or re-encoded if asked to."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from scaletransfer.dicom import DicomError, is_dicom, read_dicom
from scaletransfer.image_metadata import without_metadata
from scaletransfer.pixel_range import WHITE16, declared_white, full_range, rescaled

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
    bit_depth: int = 0
    """8 turns images of 16 bits a pixel into 8; 0 keeps what an image has."""
    pixel_max: int = 0
    """With `bit_depth` 8, the value of 16-bit images that becomes 255; 0: to be measured (`shard_range`) before an
    image is prepared."""
    private: bool = False
    """Whether metadata (EXIF, comments, text) is taken out of images whose bytes are kept; re-encoded ones have
    none."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"--size is {self.size}; give the short side in pixels, or 0 to keep the size")
        if self.encode not in ("", "jpg", "png"):
            raise ValueError(f"--encode is {self.encode!r}; give jpg or png, or leave it out")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; give a number from 1 to 100")
        if self.bit_depth not in (0, 8):
            raise ValueError(f"--bit-depth is {self.bit_depth}; give 8, or keep")
        if not 0 <= self.pixel_max <= WHITE16:
            raise ValueError(f"--pixel-max is {self.pixel_max}; give the value of white, from 1 to {WHITE16}")
        if self.pixel_max and not self.bit_depth:
            raise ValueError("--pixel-max says which value becomes 255: give --bit-depth 8 with it")

    def describe(self, extension: str) -> dict[str, Any]:
        """The entry `encoder` of the index: whatever changes the bytes of images."""
        if not self.size and not self.encode and not self.bit_depth:
            return {"name": "original"} | ({"metadata": "removed"} if self.private else {})
        library = {"jpg": "libjpeg_turbo", "png": "zlib", "webp": "webp"}[extension]
        entry: dict[str, Any] = {
            "name": "pillow",
            "version": PIL.__version__,
            "library": f"{library} {features.version(library) or 'unknown'}",
            "size": self.size,
        }
        if self.bit_depth:
            entry |= {"bit_depth": self.bit_depth, "range": self.pixel_max}
        return entry | ({"quality": self.quality} if extension != "png" else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The bytes that go into the shard, and what was seen in them."""

    data: bytes
    channels: int
    bit_depth: int
    pixel_max: int
    """The largest value in it, or the white that its file declares: an sBIT chunk of PNG, DICOM."""


def prepare(data: bytes, extension: str, encoding: Encoding) -> Prepared:
    """Verify the image file `data` by decoding it completely, and give the bytes to store under `extension`.

    The bytes stay as they are unless `encoding` scales this image, takes it from 16 to 8 bits or asks for another
    format than its own; `encoding.private` takes their metadata out.
    Grey stays grey; 16-bit grey stays 16-bit unless `encoding.bit_depth` is 8.  Then
    value8 = round(value * 255 / white), half up, with the white that the file itself declares (`pixel_max` of the
    result) or else `encoding.pixel_max`.  DICOM is always re-encoded, for JPEG in 8 bits: nothing of its header is
    stored.

    Raises UnusableImage with the reason for an image that is empty, broken, truncated, of an unknown kind or
    suspiciously large; ValueError if 16 bits should go into a JPEG, a value is larger than `encoding.pixel_max`, or
    DICOM cannot be read without pydicom.
    """
    dicom = is_dicom(data)
    if dicom and not encoding.encode:
        raise UnusableImage("it is a DICOM file, which --encode png would convert")
    picture = read_picture(data)
    declared = white_of(data, picture)
    mode, channels, depth = MODES[picture.mode]
    if channels == 3 and _is_grey(picture):
        channels = 1  # some radiographs are stored as RGB or RGBA
    short = min(picture.size)
    scaled = bool(encoding.size) and short > encoding.size
    target = ENCODERS[extension]
    is_target = picture.format == target or (target == "JPEG" and picture.format == "MPO")
    reduced = depth == 16 and (encoding.bit_depth == 8 or (extension == "jpg" and dicom))
    if scaled or reduced or (encoding.bit_depth == 8 and _is_deep_png(data)) or (encoding.encode and not is_target):
        if depth == 16 and extension == "jpg" and not reduced:
            raise ValueError("an image has 16 bits a pixel and JPEG holds 8: give --encode png, or --bit-depth 8")
        picture = _convert(picture, mode)
        if reduced:
            # before it is scaled: what scaling adds at edges may not count as brighter than white
            picture, depth, declared = _eight_bits(picture, declared, encoding.pixel_max), 8, 0
        if scaled:
            width, height = (max(1, round(side * encoding.size / short)) for side in picture.size)
            picture = _scaled(picture, (width, height), declared)
        data = _encode(picture, target, encoding.quality, declared)
    elif encoding.private:
        try:
            data = without_metadata(data)
        except ValueError as reason:
            raise UnusableImage(f"its metadata can't be taken out: {reason}") from None
    return Prepared(data=data, channels=channels, bit_depth=depth, pixel_max=declared or _maximum(picture, depth))


def read_picture(data: bytes, *, header: bool = False) -> Image.Image:
    """The picture in an image file, of one of MODES; with `header` its mode and size alone are sure to be right.

    Raises UnusableImage with the reason, ValueError where pydicom is missing.
    """
    try:
        if is_dicom(data):
            return Image.fromarray(read_dicom(data))
    except DicomError as reason:
        raise UnusableImage(str(reason)) from None
    picture = _decode(data, header)
    if picture.mode not in MODES:
        raise UnusableImage(f"pixel format {picture.mode} is not supported")
    return picture


def largest_value(data: bytes) -> int:
    """The largest value of an image of 16 bits a pixel that declares no white; 0 for every other one.

    Raises UnusableImage as `prepare` does, so that an image that will be left out is not counted.
    """
    if is_dicom(data) or MODES[read_picture(data, header=True).mode][2] != 16:
        return 0
    picture = read_picture(data)
    return 0 if white_of(data, picture) else _maximum(picture, 16)


def white_of(data: bytes, picture: Image.Image) -> int:
    """The white that a file of 16-bit grey declares for its pixels; 0 where it declares none, or has 8 bits."""
    if MODES[picture.mode][2] != 16:
        return 0
    return WHITE16 if is_dicom(data) else declared_white(data, np.asarray(picture))


def _decode(data: bytes, header: bool) -> Image.Image:
    if not data:
        raise UnusableImage("the file is empty")
    try:
        with warnings.catch_warnings():
            # Half of the limit gives a warning only, and such radiographs exist.
            warnings.simplefilter("ignore")
            Image.init()  # once: `formats` may name plugins only after they are loaded
            picture = Image.open(io.BytesIO(data), formats=READ_FORMATS)
            if not header:
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


def _is_grey(picture: Image.Image) -> bool:
    """Whether the channels of a picture in RGB or RGBA are equal everywhere."""
    if picture.mode not in ("RGB", "RGBA"):
        return False
    pixels = np.asarray(picture)
    for step in (16, 1):  # a colour picture shows it in a few pixels
        red, green, blue = (pixels[::step, ::step, channel] for channel in range(3))
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            return False
    return True


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode == "I;16B":
        return picture.convert("I").convert("I;16")
    return picture.convert(mode)


def _is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits a channel; Pillow gives the upper 8 of them where it is not plain grey."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def _eight_bits(picture: Image.Image, declared: int, given: int) -> Image.Image:
    values = np.asarray(picture)
    white = declared or given
    assert white, "the range has to be measured first"
    if values.max(initial=0) > white:
        raise ValueError(
            f"it has the value {values.max(initial=0)}, larger than the {white} that is to become white: give a "
            "larger --pixel-max, or leave it out; if the file was changed while shards were made, start again"
        )
    return Image.fromarray(rescaled(values, white, 255).astype(np.uint8))


def _scaled(picture: Image.Image, size: tuple[int, int], declared: int) -> Image.Image:
    """Antialiased; what a Lanczos filter adds beside edges stays within the range of 16-bit values, as 8 bits do."""
    if picture.mode != "I;16":
        return picture.resize(size, Image.Resampling.LANCZOS)
    white = declared or full_range(_maximum(picture, 16))
    values = np.minimum(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)), white)
    return Image.fromarray(values.astype(np.uint16))


def _encode(picture: Image.Image, target: str, quality: int, declared: int) -> bytes:
    buffer = io.BytesIO()
    # Text, EXIF and profiles of the original are left behind: they may name a patient.
    options: dict[str, Any] = {"optimize": False} if target == "PNG" else {"quality": quality}
    if target == "PNG" and 0 < declared < WHITE16:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(b"sBIT", bytes([declared.bit_length()]))
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
