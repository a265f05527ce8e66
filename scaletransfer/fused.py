"""Decoding and geometry of an image in one go: what is cut out, turned, scaled and flipped is resampled once.

The pipelines of ``transforms`` say the same with torchvision's operations, one after the other; they remain the way for
everything unusual, and the tests compare the two. Where they differ:

- A JPEG of which the used part still has at least twice the wanted side when it is decoded at 1/2, 1/4 or 1/8 is
  decoded at that scale, by the inverse DCT of fewer coefficients. Other scales that the library offers are slower and
  visibly worse.
- Of a JPEG that is known to be undamaged, rows below the last one that is used are not decoded. This changes no pixel.
- What has n times the wanted side is first reduced to 1/n, each pixel the mean of its block (n a multiple of that part,
  so that the result is the same without it). The rest, a ratio below 2, is one bilinear resampling: at most four
  neighbours, where Pillow and torchvision widen the filter with the ratio. Evaluation of X-rays that have less than
  twice the wanted side takes the mean over the exact area instead.

Nothing here draws: ``uniforms`` are numbers in [0, 1) that belong to the sample's position (``order.sample_uniforms``).
Every function may run in several threads; cv2 and simplejpeg release the interpreter's lock. What lies between the
steps is in memory that a thread uses again: new pages for each image would cost a tenth of its time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import cv2
import numpy as np

from scaletransfer.decode import Decoding, decode_at, plain_jpeg
from scaletransfer.transforms import DEEP_COLOUR, XRAY, AugmentProtocol, TransformOptions, kind_refusal

SCALES = (8, 4, 2)
"""Parts of the size at which a JPEG is decoded; see https://libjpeg-turbo.org, tjscalingfactor."""
_TRIES = 10
_AREA = (0.08, 1.0)
_RATIO = (math.log(3 / 4), math.log(4 / 3))
Uniforms = Sequence[float]


class Geometry(Protocol):
    """One resampling of a decoded image."""

    @property
    def size(self) -> int: ...
    @property
    def draws(self) -> int:
        """How many of the uniforms it uses: the first ones."""
        ...

    def used(self, height: int, width: int, uniforms: Uniforms) -> Box:
        """The part of an image of these sides, in pixels, that the result is taken from."""
        ...

    def resample(self, part: np.ndarray, box: Box, uniforms: Uniforms, out: np.ndarray) -> None:
        """``part`` [h, w] or [h, w, 3] -> ``out`` [size, size] or [size, size, 3], in place.

        box: the exact place, in pixels of ``part``, of what was asked for; in a scaled image it has fractions.
        """
        ...


class Box(NamedTuple):
    """A part of an image: where its first row and column begin, its sides."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Bytes of an image file -> integer pixels of one size, written where they are wanted.

    Args:
        geometry: what is cut out and how it is resampled. channels: 1 or 3.
    """

    geometry: Geometry
    channels: int

    @property
    def size(self) -> int:
        """Height and width of what comes out."""
        return self.geometry.size

    def __call__(
        self, data: bytes | memoryview, how: Decoding, uniforms: Uniforms, out: np.ndarray, *, whole: bool = False
    ) -> None:
        """Fill ``out`` [channels, size, size], uint8 or for ``how.depth`` 16 uint16, C-contiguous.

        whole: these bytes are known to be undamaged, so that the end of the file need not be read for it.

        Raises:
            ValueError: a reason that names no file, see ``decode``.
        """
        if how.depth == 16 and self.channels == 3:
            raise ValueError(DEEP_COLOUR)
        plain = plain_jpeg(data) if how.depth == 8 else None
        if plain is not None:
            box = self.geometry.used(plain.height, plain.width, uniforms)
            scale = part_of = self._scale(box)
            height, width = -(-plain.height // scale), -(-plain.width // scale)
            memory = _memory("decoded", (height, width, self.channels), np.uint8)
            rows = _rows(box, scale)[1] if whole else None
            pixels = decode_at(data, self.channels, how, scale, plain, memory, rows)
        else:
            pixels = decode_at(data, self.channels, how)
            height, width = pixels.shape[:2]
            box = self.geometry.used(height, width, uniforms)
            part_of, scale = self._scale(box), 1
        part, exact = _cut(pixels, box, scale)
        # whole blocks of what is decoded at that part, also where it was not
        block, ratio = part_of * self.size, part_of // scale
        down, across = max(1, int(box.height // block)), max(1, int(box.width // block))
        part, exact = _reduced(part, exact, down * ratio, across * ratio)
        if self.channels == 1:
            self.geometry.resample(part, exact, uniforms, out[0])
            return
        colours = _memory("colours", (self.size, self.size, 3), out.dtype)
        self.geometry.resample(part, exact, uniforms, colours)
        cv2.split(colours, list(out))

    def _scale(self, box: Box) -> int:
        """The part of its size, as a divisor, that is enough for this box."""
        parts = min(box.height, box.width) / (2 * self.size)
        return 1 if parts < SCALES[-1] else next(s for s in SCALES if parts >= s)


def build_fused(
    kind: str, train: bool, size: int, protocol: AugmentProtocol = "corrected", options: TransformOptions | None = None
) -> Fused | None:
    """The fused form of ``transforms.build_transform`` with the same arguments; None where there is none.

    There is none with RandAugment, and none for evaluation of natural images, which is torchvision's to the pixel.
    Raises ValueError as ``build_transform`` does.
    """
    options = options or TransformOptions()
    refusal = kind_refusal(kind, size, protocol, options)
    if refusal:
        raise ValueError(refusal)
    if kind == "xray":
        if not train:
            return Fused(geometry=CentreSquare(size=size), channels=1)
        values = {
            name: default if getattr(options, name) is None else getattr(options, name)
            for name, default in XRAY[protocol].items()
        }
        return Fused(geometry=SquareAffine(size=size, **values), channels=1)
    if not train or options.randaugment:
        return None
    return Fused(geometry=RandomCrop(size=size, flip=0.5 if options.flip is None else options.flip), channels=3)


@dataclass(frozen=True, kw_only=True)
class CentreSquare:
    """The centre square (odd rests lose the pixel at the end)."""

    size: int
    draws: ClassVar[int] = 0

    def used(self, height: int, width: int, uniforms: Uniforms) -> Box:
        side = min(height, width)
        return Box((height - side) // 2, (width - side) // 2, side, side)

    def resample(self, part: np.ndarray, box: Box, uniforms: Uniforms, out: np.ndarray) -> None:
        if box == Box(0, 0, *part.shape[:2]):
            shrinks = cv2.INTER_AREA if part.shape[0] > self.size else cv2.INTER_LINEAR
            _in_place(cv2.resize, part, (self.size, self.size), out, interpolation=shrinks)
        else:
            _warp(part, box, (1.0, 0.0, 0.0, 1.0), (0.0, 0.0), out, cv2.BORDER_REFLECT)


@dataclass(frozen=True, kw_only=True)
class SquareAffine:
    """The centre square; zoom, rotation, shift and flip as `transforms.ReflectedAffine` has them."""

    size: int
    shift: float
    rotation: float
    scale: tuple[float, float]
    flip: float
    draws: ClassVar[int] = 5

    used = CentreSquare.used

    def resample(self, part: np.ndarray, box: Box, uniforms: Uniforms, out: np.ndarray) -> None:
        low, high = self.scale
        angle = math.radians((2 * uniforms[0] - 1) * self.rotation)
        zoom = low + (high - low) * uniforms[1]
        cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
        mirror = -1.0 if uniforms[4] < self.flip else 1.0
        shift = tuple((2 * u - 1) * self.shift * self.size for u in uniforms[2:4])
        _warp(part, box, (mirror * cosine, mirror * sine, -sine, cosine), shift, out, cv2.BORDER_REFLECT)


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A random part of random proportions, and a flip: torchvision's RandomResizedCrop with its defaults.

    After ten draws that do not fit, the largest centre part of an allowed proportion is taken.
    """

    size: int
    flip: float
    draws: ClassVar[int] = 3 + 2 * _TRIES

    def used(self, height: int, width: int, uniforms: Uniforms) -> Box:
        area = height * width
        for number in range(_TRIES):
            part = area * (_AREA[0] + (_AREA[1] - _AREA[0]) * uniforms[3 + 2 * number])
            ratio = math.exp(_RATIO[0] + (_RATIO[1] - _RATIO[0]) * uniforms[4 + 2 * number])
            w, h = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(uniforms[0] * (height - h + 1)), int(uniforms[1] * (width - w + 1)), h, w)
        low, high = 3 / 4, 4 / 3
        w = min(width, max(1, round(height * high))) if width / height > high else width
        h = min(height, max(1, round(width / low))) if width / height < low else height
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def resample(self, part: np.ndarray, box: Box, uniforms: Uniforms, out: np.ndarray) -> None:
        turned = uniforms[2] < self.flip
        if box != Box(0, 0, *part.shape[:2]):
            _warp(part, box, (-1.0 if turned else 1.0, 0.0, 0.0, 1.0), (0.0, 0.0), out, cv2.BORDER_REPLICATE)
            return
        straight = _memory("straight", out.shape, out.dtype) if turned else out
        _in_place(cv2.resize, part, (self.size, self.size), straight, interpolation=cv2.INTER_LINEAR)
        if turned:
            _in_place(cv2.flip, straight, 1, out)


def _cut(pixels: np.ndarray, box: Box, scale: int) -> tuple[np.ndarray, Box]:
    """The part of an image that was decoded at 1 / scale, by whole pixels, and where in it the asked-for part lies."""
    first_row, last_row = _rows(box, scale)
    first_column = round(box.left / scale)
    last_column = max(first_column + 1, round((box.left + box.width) / scale))
    part = pixels[first_row:last_row, first_column:last_column]
    top, left = box.top / scale - first_row, box.left / scale - first_column
    return part, Box(top, left, box.height / scale, box.width / scale)


def _rows(box: Box, scale: int) -> tuple[int, int]:
    """First row and the one after the last of a box in an image that was decoded at 1 / scale."""
    first = round(box.top / scale)
    return first, max(first + 1, round((box.top + box.height) / scale))


def _reduced(part: np.ndarray, box: Box, down: int, across: int) -> tuple[np.ndarray, Box]:
    """The mean of blocks of down x across pixels, where that is more than one pixel, and the box in it."""
    if down == across == 1:
        return part, box
    rows, columns = part.shape[0] // down, part.shape[1] // across
    # what is left over is less than a block, and is cut on both sides alike
    top, left = (part.shape[0] - rows * down) // 2, (part.shape[1] - columns * across) // 2
    even = part[top : top + rows * down, left : left + columns * across]
    small = _memory("reduced", (rows, columns, *part.shape[2:]), part.dtype)
    _in_place(cv2.resize, even, (columns, rows), small, interpolation=cv2.INTER_AREA)
    return small, Box((box.top - top) / down, (box.left - left) / across, box.height / down, box.width / across)


def _warp(
    part: np.ndarray,
    box: Box,
    matrix: tuple[float, float, float, float],
    shift: tuple[float, ...],
    out: np.ndarray,
    border: int,
) -> None:
    """One bilinear resampling of the box to ``out``: new offset from the centre, minus shift, times matrix, is the old.

    matrix: xx, xy, yx, yy in units of ``out``; shift: x and y in pixels of ``out``.
    """
    size = out.shape[0]
    across, down = box.width / size, box.height / size
    xx, xy, yx, yy = matrix[0] * across, matrix[1] * across, matrix[2] * down, matrix[3] * down
    # Pixel i reaches from i to i + 1; cv2 counts from its centre.
    x, y = 0.5 - size / 2 - shift[0], 0.5 - size / 2 - shift[1]
    middle_x, middle_y = box.left + box.width / 2 - 0.5, box.top + box.height / 2 - 0.5
    first_x, first_y = middle_x + xx * x + xy * y, middle_y + yx * x + yy * y
    # cv2 is half again as fast where it need not think of the border: what lies beyond it is laid out before
    last = size - 1
    left = max(0, 1 - math.floor(first_x + last * (min(0.0, xx) + min(0.0, xy))))
    top = max(0, 1 - math.floor(first_y + last * (min(0.0, yx) + min(0.0, yy))))
    right = max(0, math.ceil(first_x + last * (max(0.0, xx) + max(0.0, xy))) + 2 - part.shape[1])
    bottom = max(0, math.ceil(first_y + last * (max(0.0, yx) + max(0.0, yy))) + 2 - part.shape[0])
    if left or top or right or bottom:
        shape = (part.shape[0] + top + bottom, part.shape[1] + left + right, *part.shape[2:])
        wide = _memory("wide", shape, part.dtype)
        result = cv2.copyMakeBorder(part, top, bottom, left, right, border, wide)
        assert np.shares_memory(result, wide), "cv2 wrote elsewhere"
        part, first_x, first_y = wide, first_x + left, first_y + top
    affine = np.array([[xx, xy, first_x], [yx, yy, first_y]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    _in_place(cv2.warpAffine, part, affine, (size, size), out, flags=how, borderMode=cv2.BORDER_CONSTANT)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}
        self.last: dict[str, np.ndarray] = {}


_scratch = _Scratch()


def _memory(name: str, shape: tuple[int, ...], dtype: np.dtype[Any] | type[np.generic]) -> np.ndarray:
    """An array without content, in memory of this thread that the next call with this name uses again."""
    last = _scratch.last.get(name)
    if last is not None and last.shape == shape and last.dtype == dtype:
        return last
    size = math.prod(shape) * np.dtype(dtype).itemsize
    held = _scratch.held.get(name)
    # much too large is no good either: one huge image must not hold its memory for ever
    if held is None or held.nbytes < size or held.nbytes > max(1 << 22, 8 * size):
        held = _scratch.held[name] = np.empty(size + size // 4, np.uint8)
    last = _scratch.last[name] = held[:size].view(dtype).reshape(shape)
    return last


def _in_place(function: Callable[..., np.ndarray], *arguments: object, **options: object) -> None:
    """Call a function of cv2 whose last argument is where the result goes.

    cv2 makes another array, without a word, where this one has not the right type or strides.
    """
    wanted = arguments[-1]
    assert isinstance(wanted, np.ndarray)
    result = function(*arguments[:-1], wanted, **options)
    assert result is wanted or np.shares_memory(result, wanted), "cv2 wrote elsewhere"
