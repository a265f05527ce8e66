"""One image on its way into a shard: verified by decoding it completely, scaled or re-encoded if asked to."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from scaletransfer.dicom import DicomError, is_dicom, read_dicom
from scaletransfer.image_metadata import without_metadata
from scaletransfer.pixel_range import WHITE16, declared_white, rescaled
from scaletransfer.shard_pixels import encoded, is_grey, is_ordinary_jpeg, jpeg_pixels, libraries, upright
from scaletransfer.shard_pixels import scaled as scaled_to

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
class Stored:
    """What the index of a folder of shards says of its images, which go into other shards."""

    size: int
    channels: int
    bit_depth: int
    pixel_max: int
    encoder: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What happens to an image's bytes."""

    size: int = 0
    """Short side in pixels to scale down to (by area); 0 keeps the size.  Images are never enlarged."""
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
    stored: Stored | None = None
    """Images come from shards.  Unless `size` or `encode` asks for others, their bytes are taken over and not decoded
    again."""

    @property
    def taken_over(self) -> Stored | None:
        """`stored` where images stay as they are in those shards."""
        return self.stored if self.stored and not self.encode and self.size == self.stored.size else None

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
        if self.taken_over:
            return dict(self.taken_over.encoder)
        if not self.size and not self.encode and not self.bit_depth:
            return {"name": "original"} | ({"metadata": "removed"} if self.private else {})
        entry: dict[str, Any] = libraries(extension, scales=bool(self.size)) | {"size": self.size}
        if self.bit_depth:
            entry |= {"bit_depth": self.bit_depth, "range": self.pixel_max}
        if self.stored:
            entry["before"] = dict(self.stored.encoder)
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
    known = encoding.taken_over
    if known:
        return Prepared(data=data, channels=known.channels, bit_depth=known.bit_depth, pixel_max=known.pixel_max)
    dicom = is_dicom(data)
    if dicom and not encoding.encode:
        raise UnusableImage("it is a DICOM file, which --encode png would convert")
    picture = read_picture(data, header=True)
    scaled = bool(encoding.size) and min(picture.size) > encoding.size
    target = ENCODERS[extension]
    is_target = picture.format == target or (target == "JPEG" and picture.format == "MPO")
    depth = MODES[picture.mode][2]
    reduced = depth == 16 and (encoding.bit_depth == 8 or (extension == "jpg" and dicom))
    changed = (
        scaled or reduced or (encoding.bit_depth == 8 and _is_deep_png(data)) or bool(encoding.encode and not is_target)
    )
    if changed and depth == 16 and extension == "jpg" and not reduced:
        _load(picture)  # a broken one is left out, whatever the options
        raise ValueError("an image has 16 bits a pixel and JPEG holds 8: give --encode png, or --bit-depth 8")
    original, declared = picture.size, 0
    pixels = jpeg_pixels(data, picture, encoding.size if scaled else 0) if is_ordinary_jpeg(picture) else None
    if pixels is None:
        _load(picture)
        declared = white_of(data, picture)
        if not changed:
            return _kept(data, picture, declared, encoding)
        picture = upright(picture)
        pixels, original = np.asarray(_convert(picture, MODES[picture.mode][0])), picture.size
    if not changed:
        return _kept(data, pixels, declared, encoding)
    if reduced:
        # before it is scaled: what becomes white is decided by the values of the file
        pixels, depth, declared = _eight_bits(pixels, declared, encoding.pixel_max), 8, 0
    if scaled:
        pixels = scaled_to(pixels, original, encoding.size)
    if pixels.ndim == 3 and is_grey(pixels):
        pixels = pixels[..., 0]  # some radiographs are stored as RGB or RGBA
    return Prepared(
        data=encoded(pixels, extension, encoding.quality, declared),
        channels=1 if pixels.ndim == 2 else 3,
        bit_depth=depth,
        pixel_max=declared or int(pixels.max(initial=0)),
    )


def _kept(data: bytes, seen: Image.Image | NDArray[np.uint8], declared: int, encoding: Encoding) -> Prepared:
    """An image that decodes (to `seen`) and whose bytes stay, but for metadata."""
    if encoding.private:
        try:
            data = without_metadata(data)
        except ValueError as reason:
            raise UnusableImage(f"its metadata can't be taken out: {reason}") from None
    if isinstance(seen, np.ndarray):
        channels, depth, largest = (1 if seen.ndim == 2 or is_grey(seen) else 3), 8, int(seen.max(initial=0))
    else:
        _, channels, depth = MODES[seen.mode]
        if channels == 3 and seen.mode in ("RGB", "RGBA") and is_grey(np.asarray(seen)):
            channels = 1
        largest = declared or _maximum(seen, depth)
    return Prepared(data=data, channels=channels, bit_depth=depth, pixel_max=largest)


def read_picture(data: bytes, *, header: bool = False) -> Image.Image:
    """The picture in an image file, of one of MODES; with `header` its mode and size alone are sure to be right.

    Raises UnusableImage with the reason, ValueError where pydicom is missing.
    """
    try:
        if is_dicom(data):
            return Image.fromarray(read_dicom(data))
    except DicomError as reason:
        raise UnusableImage(str(reason)) from None
    picture = _open(data)
    if not header:
        _load(picture)
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


def _open(data: bytes) -> Image.Image:
    if not data:
        raise UnusableImage("the file is empty")
    with _reasons():
        Image.init()  # once: `formats` may name plugins only after they are loaded
        return Image.open(io.BytesIO(data), formats=READ_FORMATS)


def _load(picture: Image.Image) -> None:
    """Decode all of an opened file; nothing is done where that has happened."""
    with _reasons():
        picture.load()
    if picture.mode not in MODES:
        raise UnusableImage(f"pixel format {picture.mode} is not supported")


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever Pillow raises inside comes out as UnusableImage with a reason."""
    try:
        with warnings.catch_warnings():
            # Half of the limit gives a warning only, and such radiographs exist.
            warnings.simplefilter("ignore")
            yield
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


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode == mode:
        return picture
    if picture.mode == "I;16B":
        return picture.convert("I").convert("I;16")
    return picture.convert(mode)


def _is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits a channel; Pillow gives the upper 8 of them where it is not plain grey."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def _eight_bits(values: NDArray[Any], declared: int, given: int) -> NDArray[np.uint8]:
    white = declared or given
    assert white, "the range has to be measured first"
    if values.max(initial=0) > white:
        raise ValueError(
            f"it has the value {values.max(initial=0)}, larger than the {white} that is to become white: give a "
            "larger --pixel-max, or leave it out; if the file was changed while shards were made, start again"
        )
    return rescaled(values, white, 255).astype(np.uint8)


def _maximum(picture: Image.Image, depth: int) -> int:
    extrema = picture.getextrema()
    if isinstance(extrema[0], tuple):
        return max(int(high) for _, high in extrema)  # type: ignore[misc]
    high = int(extrema[1])  # type: ignore[arg-type]
    # mode 1 counts white as 255 in Pillow; a palette's largest index says nothing about its colours
    return 255 if picture.mode in ("P", "1") else min(high, 2**depth - 1)
