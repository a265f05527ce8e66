"""Pictures that look the same: candidates by a perceptual hash, confirmed on thumbnails.

The hash is that of pHash (signs of the low frequencies of a discrete cosine transform,
https://www.phash.org/docs/design.html) with two changes.  Thresholds are the means over all pictures of the check, not
the median of one picture's coefficients: radiographs share their coarse form and would get nearly one hash.  And its
192 bits are cut into bands, so that pictures with one band in common are found by sorting and no pair of two different
bands is ever looked at (locality-sensitive hashing; Leskovec et al., Mining of Massive Datasets, section 3.4).  Two
pictures whose hashes differ in fewer bits than there are bands always share one.

Radiographs look alike, so a hash proves nothing: a pair counts only if the thumbnails' details agree as well.  A few
thousand pictures are all compared with each other and need no hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

THUMB = 32
"""Side of a thumbnail in pixels."""
BITS = 192
MAX_DISTANCE = 40
"""Bits that may differ between two candidates.  Of copies 24 did (brightness x 1.2, which clips), else 14 at most."""
MIN_LIKENESS = 0.97
MIN_DETAIL = 0.95
"""Correlation of thumbnails, and of what is left of them after a blur of one pixel.  Among the 2 million pairs of
2,000 different drawn X-rays, several of each patient, the largest are 0.991 and 0.90; among the 200 million pairs of
20,000, 0.94 (two smooth laterals).  Of 5,200 copies (JPEG of quality 60 and 30, scaled to 64 pixels up to twice the
size, brightness 0.8 to 1.2, contrast, gamma) the smallest are 0.983 and 0.968."""
NEIGHBOURS = 1024
"""Members of one band's bucket that a picture is compared with at most, the nearest in order of the hash."""

_ALL_PAIRS = 4096
_SHORT_BANDS = 1 << 16
_CHUNK = 1 << 14


class Alike(NamedTuple):
    """Pairs of pictures that look the same."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    likeness: NDArray[np.float64]
    """The smaller of the two correlations, MIN_DETAIL to 1."""
    crowded: int
    """Pictures that share a band with more than NEIGHBOURS others, so that not all of those were compared."""


def alike_pairs(thumbs: NDArray[np.uint8]) -> Alike:
    """Pairs (first < second) among thumbnails, uint8 [n, THUMB, THUMB], none of them constant.

    Takes about n log n time where pictures differ: 20 s for a million, one core.  Memory is 0.3 kB a picture besides
    `thumbs`, which may be mapped from a file, and 16 bytes a pair.
    """
    crowded = np.zeros(len(thumbs), dtype=bool)
    candidates = _every_pair if len(thumbs) <= _ALL_PAIRS else _similar_pairs
    one, two = np.divmod(candidates(thumbs, crowded), max(1, len(thumbs)))
    likeness = confirm(thumbs, one, two)
    keep = likeness > 0
    return Alike(one[keep], two[keep], likeness[keep], int(np.count_nonzero(crowded)))


def _every_pair(thumbs: NDArray[np.uint8], crowded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of all pairs those whose details nearly agree, as first * n + second.  No picture is crowded."""
    details = _standardised(_details(np.asarray(thumbs, np.float32))).reshape(len(thumbs), THUMB**2)
    pairs = [np.zeros(0, np.int64)]
    for start in range(0, len(thumbs), 512):
        block = details[start : start + 512]
        one, two = np.nonzero(block @ details[start:].T >= (MIN_DETAIL - 0.01) * details.shape[1])
        pairs.append(((one + start) * len(thumbs) + two + start)[one < two])
    return np.concatenate(pairs)


def _similar_pairs(thumbs: NDArray[np.uint8], crowded: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs with a band in common and hashes that differ little, as first * n + second; marks crowded pictures."""
    words = hashes(thumbs)
    # Short bands find more altered copies and give more candidates, which a large set cannot pay for.
    width = 16 if len(words) < _SHORT_BANDS else 24
    pairs = [np.zeros(0, np.int64)]
    for bits in _bands(words, width):
        for one, two in _bucket_pairs(bits, words, crowded):
            near = np.bitwise_count(words[one] ^ words[two]).sum(axis=1) <= MAX_DISTANCE
            one, two = one[near], two[near]
            pairs.append(np.minimum(one, two) * len(words) + np.maximum(one, two))
    return np.unique(np.concatenate(pairs))


def hashes(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Perceptual hashes, uint64 [n, BITS / 64], comparable within one call only (see the module)."""
    rows, columns = np.meshgrid(np.arange(THUMB), np.arange(THUMB), indexing="ij")
    # the lowest frequencies but for the mean, by their sum, so that neighbours differ in direction
    order = np.argsort(((rows + columns) * THUMB + rows).ravel(), kind="stable")[1 : BITS + 1]
    values = np.empty((len(thumbs), BITS), np.float32)
    for start in range(0, len(thumbs), _CHUNK):
        part = _standardised(np.asarray(thumbs[start : start + _CHUNK], np.float32))
        values[start : start + len(part)] = dctn(part, axes=(1, 2), norm="ortho").reshape(len(part), -1)[:, order]
    # not the median: where half of the pictures are nearly one, it would be that one's value, and its bits chance
    return np.packbits(values > values.mean(axis=0), axis=1).view(np.uint64).reshape(len(thumbs), BITS // 64)


def confirm(thumbs: NDArray[np.uint8], first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Likeness of pairs of thumbnails, float64: the smaller of both correlations, 0 where either is too small."""
    likeness = np.zeros(len(first))
    for start in range(0, len(first), _CHUNK):
        here = slice(start, start + _CHUNK)
        one = np.asarray(thumbs[first[here]], np.float32)
        two = np.asarray(thumbs[second[here]], np.float32)
        whole = (_standardised(one) * _standardised(two)).mean(axis=(1, 2))
        detail = (_standardised(_details(one)) * _standardised(_details(two))).mean(axis=(1, 2))
        same = (whole >= MIN_LIKENESS) & (detail >= MIN_DETAIL)
        likeness[here] = np.where(same, np.minimum(whole, detail), 0.0)
    return np.minimum(likeness, 1.0)


def _details(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    return pictures - gaussian_filter(pictures, (0, 1, 1))


def _standardised(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each picture with mean 0 and standard deviation 1 (0 where it is constant)."""
    centred = pictures - pictures.mean(axis=(1, 2), keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=(1, 2), keepdims=True))
    return centred / np.maximum(spread, 1e-6)


def _bands(words: NDArray[np.uint64], width: int) -> Iterator[NDArray[np.int64]]:
    """Bits j, j + n, j + 2n, ... of every hash as one number, for each of the n bands: each has high and low
    frequencies."""
    bits = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1)
    number = BITS // width
    weights = 1 << np.arange(width, dtype=np.int64)
    for band in range(number):
        yield bits[:, band::number].astype(np.int64) @ weights


def _bucket_pairs(
    band: NDArray[np.int64], words: NDArray[np.uint64], crowded: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of pictures with the same value of a band, as arrays (first, second); marks those in crowded buckets."""
    order = np.lexsort((words[:, 0], band)).astype(np.int64)
    values = band[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[starts, len(values)])
    end = np.repeat(starts + sizes, sizes)
    crowded[order[np.repeat(sizes > NEIGHBOURS, sizes)]] = True
    place = np.arange(len(values))
    for step in range(1, min(int(sizes.max(initial=0)), NEIGHBOURS + 1)):
        place = place[place + step < end[place]]
        yield order[place], order[place + step]
