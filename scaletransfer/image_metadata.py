"""Take what is no picture out of an image file without touching its pixels: a kept file may name a patient.

EXIF, XMP, IPTC, comments and text go; what decoding needs (tables, palettes, gamma, colour profiles, significant bits)
stays, and of EXIF the orientation.  Formats: ITU-T T.81 annex B (JPEG), PNG third edition section 5, the WebP container
specification (RIFF).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import ExifTags, Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs"}
_PNG_KEPT |= {b"cICP", b"acTL", b"fcTL", b"fdAT"}
_WEBP_DROPPED = {b"EXIF", b"XMP "}
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04  # flags of the chunk VP8X
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def without_metadata(data: bytes) -> bytes:
    """The same picture without EXIF (but for its orientation), XMP, comments, text and whatever follows its end.

    data: a JPEG, PNG or WebP that decodes; `data` itself where there is nothing to take out, and for other formats.
    Raises ValueError where the parts of the file can't be told apart.
    """
    if data.startswith(b"\xff\xd8"):
        parts = _jpeg(data)
    elif data.startswith(_PNG):
        parts = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        parts = _webp(data)
    else:
        return data
    clean = b"".join(parts)
    return data if clean == data else clean


def _minimal_exif(data: bytes) -> bytes:
    """EXIF that says the orientation alone (a TIFF header and one entry), "" where there is none to say."""
    with Image.open(io.BytesIO(data)) as picture:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:
        return b""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\x00\x00")


def _jpeg(data: bytes) -> Iterator[bytes]:
    yield data[:2]
    at, exif_done = 2, False
    while True:
        if data[at : at + 1] != b"\xff" or at + 2 > len(data):
            raise ValueError("its JPEG segments can't be told apart")
        while data[at + 1 : at + 2] == b"\xff":  # fill bytes may precede a marker
            at += 1
        marker = data[at + 1]
        if marker == 0xD9:
            yield data[at : at + 2]
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if marker == 0xE1 and not exif_done:
            exif_done = True
            exif = _minimal_exif(data)
            if exif:
                exif = b"Exif\x00\x00" + exif
                yield b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        plain = marker in (0xE0, 0xEE) or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\x00"))
        if plain or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield data[at:end]
        at = end
        if marker == 0xDA:  # compressed pixels follow, up to the next marker
            found = _NEXT_MARKER.search(data, at)
            if found is None:  # decoders put up with a missing end
                yield data[at:]
                return
            yield data[at : found.start()]
            at = found.start()


def _png(data: bytes) -> Iterator[bytes]:
    yield _PNG
    at = len(_PNG)
    exif: bytes | None = None
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"eXIf" and exif is None:
            exif = _minimal_exif(data)
            if exif:
                yield struct.pack(">I", len(exif)) + kind + exif + struct.pack(">I", zlib.crc32(kind + exif))
        if kind in _PNG_KEPT:
            yield data[at:end]
        if kind == b"IEND":
            return
        at = end
    raise ValueError("its PNG chunks can't be told apart")


def _webp(data: bytes) -> Iterator[bytes]:
    chunks = []
    at, stop = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= stop:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    exif = _minimal_exif(data) if any(kind == b"EXIF" for kind, _ in chunks) else b""
    kept = [(kind, body) for kind, body in chunks if kind not in _WEBP_DROPPED]
    if exif:
        kept.append((b"EXIF", exif))
    if kept and kept[0][0] == b"VP8X":
        flags = kept[0][1][0] & ~(_WEBP_XMP | (0 if exif else _WEBP_EXIF))
        kept[0] = (b"VP8X", bytes([flags]) + kept[0][1][1:])
    body = b"".join(kind + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for kind, part in kept)
    yield b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
