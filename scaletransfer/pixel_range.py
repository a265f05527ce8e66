"""Which value stands for white in a picture of 16 bits a pixel: seldom the largest that 16 bits can hold.

Radiographs of 10 or 12 significant bits lie in files of 16.  Divided by 65535 they would be nearly black; as 8 bits
they would have 16 levels of grey left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WHITE16 = 65535
_PNG = b"\x89PNG\r\n\x1a\n"


def full_range(largest: int) -> int:
    """2^b - 1, with b the bits that `largest` needs: 3000 -> 4095.  At least 1."""
    return max(1, (1 << largest.bit_length()) - 1)


def declared_white(data: bytes, values: NDArray[Any]) -> int:
    """The white that the file `data` of 16-bit grey declares for its pixels `values`, or 0 where it declares none.

    PNG's chunk sBIT names the significant bits (https://www.w3.org/TR/png/#11sBIT).  By the standard such values are
    stretched to the full 16 bits, so that white is 65535; files of X-ray tools also hold them as they are, and then
    white is 2^bits - 1.  Those are told apart by their values: none is larger, and some use the low bits, which
    stretching leaves empty in values that small.
    """
    bits = significant_bits(data)
    if not 0 < bits < 16:
        return WHITE16 if bits == 16 else 0
    largest = int(values.max(initial=0))
    if largest == 0:
        return 0
    as_they_are = largest < 1 << bits and bool((values & ((1 << (16 - bits)) - 1)).any())
    return (1 << bits) - 1 if as_they_are else WHITE16


def significant_bits(data: bytes) -> int:
    """Of the grey of a PNG, from its chunk sBIT; 0 where there is none or the file is something else."""
    at = len(_PNG)
    if data[:at] != _PNG:
        return 0
    while at + 12 <= len(data):  # a chunk: length, name, content, checksum
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name == b"sBIT":
            return data[at + 8] if length in (1, 2) else 0
        if name in (b"IDAT", b"IEND"):
            return 0
        at += 12 + length
    return 0


def rescaled(values: NDArray[Any], white: int, new: int) -> NDArray[np.int64]:
    """round(value * new / white) of integers 0..65535, half up, in integers; at most `new`."""
    wide = values.astype(np.int64)
    return np.minimum((wide * (2 * new) + white) // (2 * white), new)
