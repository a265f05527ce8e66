"""What checks need of each image in shards: two hashes, a thumbnail, grey statistics; read once, kept in a cache.

An image is read with one `pread` together with its label member (for the patient's code), and decoded completely.
Decoding a JPEG at an eighth of its size would not pay: for 2,500 x 3,000 pixels it takes 17 ms instead of 20, and the
hash of the pixels, by which a re-encoded copy is found, needs all of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from scaletransfer.duplicate_search import THUMB
from scaletransfer.foreign_members import is_foreign
from scaletransfer.index import ShardIndex
from scaletransfer.pixel_range import WHITE16
from scaletransfer.shard_image import MODES, READ_FORMATS
from scaletransfer.shard_pool import die_with_parent

UNREAD, FINE, UNREADABLE = 0, 1, 2
"""Values of the field `state`."""

FEATURES = np.dtype(
    [
        ("state", "i1"),
        ("problem", "S48"),  # why it is unreadable
        ("bytes", "S32"),  # SHA-256 of the file; bytes that end in 0 lose it, which keeps equal and unequal as they are
        ("pixels", "S32"),  # SHA-256 of size and decoded pixels
        ("patient", "<u8"),  # the code of the label member, 0 for none
        ("grey", "?"),  # whether it shows no colour
        ("width", "<i4"),
        ("height", "<i4"),
        ("levels", "<i4"),  # distinct grey values
        # of the grey values as shares of white, which is 255 or, of 16 bits, what the set counts as white:
        ("minimum", "<f4"),
        ("low", "<f4"),  # percentile 1
        ("middle", "<f4"),  # the median
        ("high", "<f4"),  # percentile 99
        ("maximum", "<f4"),
        ("mean", "<f4", (3,)),  # by channel, three times the same where it is grey
        ("square", "<f4", (3,)),  # mean of the squares
        ("thumb", "u1", (THUMB, THUMB)),  # grey, stretched to 0..255
    ]
)

_VERSION = 1  # of FEATURES and how they are computed; part of the cache's file names
_BATCH = 64
_BETWEEN_FLUSHES = 8192
_LABEL_BYTES = 4096  # read with each image; a longer label member costs a second read
_QUANTILES = (0.01, 0.5, 0.99)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some images of one file; picklable."""

    path: str
    rows: list[int]
    places: list[tuple[int, int]]
    labels: bool
    white: int


def cached_features(
    index: ShardIndex,
    split: str,
    rows: NDArray[np.int64],
    cache: Path,
    *,
    workers: int = 1,
    progress: Callable[[int], object] = lambda images: None,
) -> NDArray[Any]:
    """Features (dtype FEATURES) of the table rows `rows` of a split, in their order.

    `cache` is a folder; its file for this index (by digest) and split is filled where it lacks rows, so a call that
    was interrupted goes on where it was.  If `rows` are all rows, the result is the file itself, mapped read-only.
    `workers`: processes that decode (1: this one).  `progress` gets a number of images as they are done.

    Raises ValueError where a label member cannot be read, OSError for a shard or cache that cannot.
    """
    table = index.table(split)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{index.digest[:16]}-{split}-{_VERSION}.npy"
    kept = _open_cache(path, len(table))
    missing = rows[kept["state"][rows] == UNREAD]
    progress(len(rows) - len(missing))
    since, done = 0, []
    for numbers, features in _compute(list(_batches(index, split, missing)), workers):
        states = features["state"].copy()
        features["state"] = UNREAD
        kept[numbers] = features
        done.append((numbers, states))
        since += len(numbers)
        progress(len(numbers))
        if since >= _BETWEEN_FLUSHES:
            _settle(kept, done)
            since, done = 0, []
    _settle(kept, done)
    everything = len(rows) == len(table) and bool(np.array_equal(rows, np.arange(len(table))))
    whole: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return whole if everything else whole[rows]


def features_of(data: bytes, white: int = WHITE16) -> NDArray[Any]:
    """Features of one image file, dtype FEATURES, shape (); `state` is UNREADABLE, with `problem`, for a bad one.

    white: the value that a network takes for white in 16-bit images (`ImageInfo.deep_white`).
    """
    found = np.zeros((), FEATURES)
    found["bytes"] = hashlib.sha256(data).digest()
    try:
        picture, grey = decode_picture(data)
    except ValueError as reason:
        found["problem"], found["state"] = str(reason).encode()[:48], UNREADABLE
        return found
    head = f"{picture.mode} {picture.width}x{picture.height}\n".encode()
    found["pixels"] = hashlib.sha256(head + picture.tobytes()).digest()
    found["width"], found["height"], found["grey"] = picture.width, picture.height, grey
    luma = picture if picture.mode in ("L", "I;16") else picture.convert("L")
    counts = _histogram(luma)
    levels = np.arange(len(counts)) / (255 if len(counts) == 256 else white)
    places = np.searchsorted(np.cumsum(counts), np.array(_QUANTILES) * counts.sum(), side="left")
    found["low"], found["middle"], found["high"] = levels[places]
    present = np.flatnonzero(counts)
    found["levels"], found["minimum"], found["maximum"] = len(present), levels[present[0]], levels[present[-1]]
    channels = [counts] * 3 if luma is picture else np.array(picture.histogram()).reshape(3, 256)
    for channel, its in enumerate(channels):
        found["mean"][channel] = its @ levels / its.sum()
        found["square"][channel] = its @ levels**2 / its.sum()
    found["thumb"] = _thumbnail(luma)
    found["state"] = FINE
    return found


def decode_picture(data: bytes) -> tuple[Image.Image, bool]:
    """(upright picture of the mode L, I;16 or RGB, whether it shows no colour) of an image file.

    Colour that is grey becomes L, transparency is dropped.  Raises ValueError with a short reason that names no file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half of Pillow's limit of pixels gives a warning only
            Image.init()
            picture: Image.Image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
            picture.load()
        mode, channels, _ = MODES[picture.mode]
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        kinds = {UnidentifiedImageError: "not an image of a known format", Image.DecompressionBombError: "too large"}
        raise ValueError(kinds.get(type(error), f"cannot be decoded ({type(error).__name__})")) from None
    picture = _upright(picture)
    if picture.mode == "I;16B":
        picture = picture.convert("I").convert("I;16")
    elif picture.mode != mode:
        picture = picture.convert(mode)
    if channels == 3:
        red, green, blue = (np.asarray(band) for band in picture.split())
        if np.array_equal(red, green) and np.array_equal(red, blue):
            return picture.getchannel(0), True
    return picture, channels == 1


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # broken EXIF must not cost the picture; it raises many kinds
        return picture


def _histogram(luma: Image.Image) -> NDArray[np.int64]:
    """Pixels of each value: int64 [256], or [65536] for 16 bits."""
    if luma.mode == "L":
        return np.array(luma.histogram(), dtype=np.int64)
    return np.bincount(np.asarray(luma).ravel(), minlength=65536)


def _thumbnail(luma: Image.Image) -> NDArray[np.uint8]:
    """uint8 [THUMB, THUMB], the picture squeezed to a square and stretched to 0..255; constant pictures give 0.

    Hamming's kernel weighs whole areas: the same picture at another size gives the same thumbnail (correlation 0.9999
    and more, measured), which Pillow's box does not (0.998).
    """
    small = luma.convert("F").resize((THUMB, THUMB), Image.Resampling.HAMMING, reducing_gap=3.0)
    values = np.asarray(small)
    low, high = values.min(), values.max()
    if high - low < 1e-3:
        return np.zeros((THUMB, THUMB), np.uint8)
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


def _batches(index: ShardIndex, split: str, rows: NDArray[np.int64]) -> Iterator[_Batch]:
    """Rows of a file together, in the order of its bytes."""
    table = index.table(split)
    labels = index.task == "multilabel" and not is_foreign(index.encoder)
    shards = table["shard"][rows]
    for shard in np.unique(shards):
        inside = rows[shards == shard]
        inside = inside[np.argsort(table["offset"][inside], kind="stable")]
        path = str(index.path(split, int(shard)))
        for start in range(0, len(inside), _BATCH):
            part = inside[start : start + _BATCH]
            places = list(zip(table["offset"][part].tolist(), table["size"][part].tolist(), strict=True))
            yield _Batch(path, part.tolist(), places, labels, index.image.deep_white)


def _compute(batches: Sequence[_Batch], workers: int) -> Iterator[tuple[list[int], NDArray[Any]]]:
    """(rows, features) of every batch, as they come."""
    if workers <= 1 or len(batches) <= 1:
        for batch in batches:
            yield batch.rows, _features_of_batch(batch)
        return
    context = multiprocessing.get_context("spawn")  # the parent may hold threads, whose locks a fork would copy
    waiting = iter(batches)
    with ProcessPoolExecutor(min(workers, len(batches)), context, initializer=die_with_parent) as pool:
        running: dict[Future[NDArray[Any]], _Batch] = {}
        try:
            while True:
                for batch in islice(waiting, 4 * workers - len(running)):
                    running[pool.submit(_features_of_batch, batch)] = batch
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future).rows, future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process was killed (out of memory?); run the same command again, with fewer --workers: it "
                "goes on where it was"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _features_of_batch(batch: _Batch) -> NDArray[Any]:
    found = np.zeros(len(batch.rows), FEATURES)
    descriptor = os.open(batch.path, os.O_RDONLY)
    try:
        for number, (offset, size) in enumerate(batch.places):
            padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            data = os.pread(descriptor, padded + _LABEL_BYTES if batch.labels else size, offset)
            if len(data) < size:
                raise ValueError(f"{batch.path} is truncated; copy it again")
            found[number] = features_of(data[:size], batch.white)
            if batch.labels:
                found[number]["patient"] = _patient(descriptor, batch.path, offset + padded, data[padded:])
    finally:
        os.close(descriptor)
    return found


def _patient(descriptor: int, path: str, offset: int, data: bytes) -> int:
    """The patient's code as a number, 0 for none, of the label member that begins with `data` at `offset`."""
    try:
        size = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape").size
        end = tarfile.BLOCKSIZE + size
        if end > len(data):
            data = os.pread(descriptor, end, offset)
        code = json.loads(data[tarfile.BLOCKSIZE : end])["patient"]
        return int(code, 16) if code else 0
    except (tarfile.HeaderError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} has no label at byte {offset}, behind its image; scaletransfer shards verify says what is wrong"
        ) from None


def _open_cache(path: Path, rows: int) -> Any:
    """The cache's array, mapped for writing; made anew if it is not there or not whole."""
    if path.exists():
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)  # unlike "r+" it does not lengthen a short file
            whole = found.dtype == FEATURES and found.shape == (rows,)
        except (ValueError, EOFError):
            whole = False
        if whole:
            return np.lib.format.open_memmap(path, mode="r+")
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    np.lib.format.open_memmap(draft, mode="w+", dtype=FEATURES, shape=(rows,)).flush()
    os.replace(draft, path)
    return np.lib.format.open_memmap(path, mode="r+")


def _settle(kept: Any, done: Sequence[tuple[list[int], NDArray[Any]]]) -> None:
    """Mark rows as read only after their values are on disk: a machine that fails must not leave half a row."""
    if done:
        kept.flush()
        for rows, states in done:
            kept["state"][rows] = states
        kept.flush()
