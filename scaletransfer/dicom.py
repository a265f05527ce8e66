"""A DICOM file of one grey picture -> its pixels as they are meant to be shown; or one reason why not.

Needs pydicom (extra `dicom`), which is imported where a file is read.  Of the file only what describes the pixels is
kept: names and dates of its header are dropped while it is read, and no reason quotes the file.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MAGIC = slice(128, 132)  # PS3.10, section 7.1: "DICM" after a preamble of 128 bytes
HEAD = 132
"""Bytes that `is_dicom` needs."""
# Whatever is inflated has no limit in pydicom 3.0, and nobody compresses radiographs so.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_SIZE = ("Rows", "Columns", "BitsStored")
_TAGS = (
    *_SIZE,
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "HighBit", "PixelRepresentation"),
    *("NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "LUTDescriptor"),
    *("LUTData", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelData"),
)


class DicomError(ValueError):
    """A file that cannot be used; the message is the reason and says nothing that stands in the file."""


class PydicomMissing(ValueError):
    """Says how to install it."""


def is_dicom(head: bytes) -> bool:
    """Whether a file with these first bytes (HEAD or more) is DICOM, whatever its name."""
    return head[_MAGIC] == b"DICM"


def require_pydicom() -> Any:
    """The module pydicom; PydicomMissing where it is not installed."""
    try:
        import pydicom.pixels
    except ImportError:
        raise PydicomMissing("DICOM files need pydicom: pip install scaletransfer[dicom]") from None
    # A message of it may quote the whole header.
    logging.getLogger("pydicom").disabled = True
    return pydicom


def read_header(head: bytes) -> tuple[int, int, int]:
    """(rows, columns, bits of a pixel as `read_dicom` gives it: 8 or 16) of a DICOM file or of its beginning.

    Raises what `read_dicom` raises, for what the header alone shows.
    """
    pydicom = require_pydicom()
    _check_inflated(head)
    with _reasons():
        header = pydicom.dcmread(io.BytesIO(head), force=False, stop_before_pixels=True, specific_tags=list(_SIZE))
        # what was read is understood only when it is asked for
        rows, columns, stored = (_number(header, name) for name in _SIZE)
        _check_size(rows, columns)
    return rows, columns, 8 if stored <= 8 else 16


def read_dicom(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The picture, [rows, columns]: uint16 with 65535 for white, or uint8 with 255 where 8 bits or fewer are stored.

    Modality LUT or rescale, then VOI LUT or window (the first of several; LINEAR, LINEAR_EXACT or SIGMOID), then
    MONOCHROME1 turned into MONOCHROME2: DICOM PS3.3, C.11.1, C.11.2 and C.7.6.3.1.2
    (https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.11.html).  Without a window the whole
    range of the stored bits (or of the modality LUT) becomes the range of the result.  Values are rounded half up.

    Raises DicomError with the reason: colour, several frames, no pixels, a compression for which no decoder is
    installed, values that contradict each other, more pixels than Pillow's limit; PydicomMissing.
    """
    pydicom = require_pydicom()
    _check_inflated(data)
    with _reasons():
        dataset = pydicom.dcmread(io.BytesIO(data), force=False, specific_tags=list(_TAGS))
        stored = _check(pydicom, dataset)
        # pydicom clears or extends the sign over bits that are not stored
        values = np.asarray(pydicom.pixels.pixel_array(dataset, raw=True)).astype(np.int64)
        top = 255 if stored <= 8 else 65535
        shown = _shown(pydicom, dataset, values, stored, top)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            shown = top - shown
    return shown.astype(np.uint8) if top == 255 else shown.astype(np.uint16)


def _check(pydicom: Any, dataset: Any) -> int:
    """Bits stored; DicomError for a file that holds anything but one grey picture of a possible size."""
    frames = dataset.get("NumberOfFrames")
    if frames not in (None, "", 1):
        raise DicomError("it is a DICOM file with several frames")
    _check_size(_number(dataset, "Rows"), _number(dataset, "Columns"))
    grey = str(dataset.get("PhotometricInterpretation", "")) in ("MONOCHROME1", "MONOCHROME2")
    if dataset.get("SamplesPerPixel", 1) != 1 or not grey:
        raise DicomError("it is a DICOM file in colour, or of an unknown photometric interpretation")
    allocated, stored = _number(dataset, "BitsAllocated"), _number(dataset, "BitsStored")
    sign = dataset.get("PixelRepresentation")
    if allocated not in (8, 16) or stored > allocated or dataset.get("HighBit") != stored - 1 or sign not in (0, 1):
        raise DicomError("it is a DICOM file with an unknown form of pixels (bits allocated, bits stored, high bit)")
    if not dataset.get("PixelData"):
        raise DicomError("it is a DICOM file without pixel data")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        raise DicomError("it is a DICOM file of an unknown transfer syntax") from None
    if not decoder.is_available:
        raise DicomError(f"it is a DICOM file compressed as {syntax.name}, for which no decoder is installed")
    if not syntax.is_compressed:
        expected, found = dataset.Rows * dataset.Columns * allocated // 8, len(dataset.PixelData)
        if found < expected:
            raise DicomError("it is a DICOM file that is truncated")
        if found > expected + 1:  # one byte may make the length even
            raise DicomError("it is a DICOM file with more pixel data than its size says")
    return stored


def _check_inflated(data: bytes) -> None:
    if _DEFLATED in data:
        raise DicomError("it is a DICOM file in the deflated form, which is not read")


def _check_size(rows: int, columns: int) -> None:
    """DicomError above the limit at which Pillow calls a file a decompression bomb."""
    if Image.MAX_IMAGE_PIXELS and rows * columns > 2 * Image.MAX_IMAGE_PIXELS:
        raise DicomError("it is a DICOM file that claims more pixels than can be real")


def _number(dataset: Any, name: str) -> int:
    value = dataset.get(name)
    if not isinstance(value, int) or value < 1:
        raise DicomError(f"it is a DICOM file without {name}, or its header is cut off")
    return value


def _shown(pydicom: Any, dataset: Any, values: NDArray[np.int64], stored: int, top: int) -> NDArray[np.int64]:
    """Stored values -> 0..top, before MONOCHROME1 is turned."""
    low = -(1 << (stored - 1)) if dataset.PixelRepresentation else 0
    high = low + (1 << stored) - 1
    slope, intercept = 1.0, 0.0
    if dataset.get("ModalityLUTSequence"):
        values, high = _look_up(dataset.ModalityLUTSequence[0], values)
        low = 0
    elif (pair := _pair(dataset, "RescaleSlope", "RescaleIntercept", float)) is not None:
        slope, intercept = pair
        if slope == 0:
            raise DicomError("it is a DICOM file whose rescale slope is 0")
    if dataset.get("VOILUTSequence"):
        rescaled = np.clip(np.floor(values * slope + intercept + 0.5), -(1 << 20), 1 << 20).astype(np.int64)
        values, high = _look_up(dataset.VOILUTSequence[0], rescaled)
        return _stretched(values, 0, high, top)
    window = _pair(dataset, "WindowCenter", "WindowWidth", _first)
    if window is None:
        # a rescale with a positive slope changes nothing of where a value stands between the lowest and the highest
        stretched = _stretched(values, low, high, top)
        return stretched if slope > 0 else top - stretched
    return _windowed(pydicom, values * slope + intercept, window, dataset.get("VOILUTFunction"), top)


def _windowed(pydicom: Any, values: Any, window: tuple[float, float], function: Any, top: int) -> NDArray[np.int64]:
    """Values after rescale, by the window, to 0..top."""
    view = pydicom.Dataset()
    view.WindowCenter, view.WindowWidth = window
    view.VOILUTFunction = function or "LINEAR"
    # pydicom's result spans the range of the stored bits: these are the bits of our result
    view.PhotometricInterpretation, view.PixelRepresentation, view.BitsStored = "MONOCHROME2", 0, top.bit_length()
    try:
        with np.errstate(over="ignore"):  # exp of a value far below a sigmoid's window: 1 / (1 + inf) is the 0 we want
            shown = pydicom.pixels.apply_windowing(values, view)
    except ValueError:
        raise DicomError("it is a DICOM file whose window or VOI LUT function has no meaning") from None
    return np.floor(shown + 0.5).astype(np.int64)


def _look_up(item: Any, values: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Values by a modality or VOI LUT (PS3.3, C.11.1.1 and C.11.2.1.1), and the largest value it can give.

    Not pydicom's: its apply_voi (3.0.2) takes places in a table of 8-bit entries modulo 256.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 1 << 16
    if not 8 <= bits <= 16:
        raise DicomError("it is a DICOM file with a lookup table of an unknown form")
    content = item.LUTData
    if not isinstance(content, bytes):
        content = np.atleast_1d(np.asarray(content)).astype(np.uint16).astype("<u2").tobytes()
    # 8-bit entries stand in bytes or, against the letter of the standard, in words (C.11.2.1.1)
    words = len(content) >= 2 * entries
    if not words and (bits > 8 or len(content) < entries):
        raise DicomError("it is a DICOM file with a lookup table that is cut off")
    table = np.frombuffer(content, "<u2" if words else "u1", entries).astype(np.int64)
    if table.max() >= 1 << bits:
        raise DicomError("it is a DICOM file with a lookup table whose entries are larger than it says")
    return table[np.clip(values - first, 0, entries - 1)], (1 << bits) - 1


def _stretched(values: NDArray[np.int64], low: int, high: int, top: int) -> NDArray[np.int64]:
    """low..high -> 0..top, rounded half up in integers."""
    return (2 * (values - low) * top + (high - low)) // (2 * (high - low))


def _pair(dataset: Any, one: str, other: str, read: Callable[[Any], float]) -> tuple[float, float] | None:
    """Two numbers that only mean something together; None where the file has neither."""
    found = [dataset.get(name) for name in (one, other)]
    given = [value is not None and value != "" and value != [] for value in found]
    if not any(given):
        return None
    if not all(given):
        raise DicomError(f"it is a DICOM file with only one of {one} and {other}")
    try:
        first, second = (read(value) for value in found)
    except (TypeError, ValueError, IndexError):
        first = second = math.nan
    if not (math.isfinite(first) and math.isfinite(second)):
        raise DicomError(f"it is a DICOM file whose {one} or {other} is no number")
    return first, second


def _first(value: Any) -> float:
    """Of one number or several, the first."""
    return float(value if isinstance(value, int | float | str) else value[0])


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever pydicom raises comes out as a reason without a word of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DicomError, MemoryError):
        raise
    except Exception as error:
        # pydicom raises InvalidDicomError, EOFError, ValueError, struct.error, RecursionError, ...; its messages
        # quote the header
        raise DicomError(f"it is a DICOM file that is broken ({type(error).__name__})") from None
