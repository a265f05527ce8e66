"""Images to measure with: drawn once, of the sizes and the weight that real ones have, and kept in a folder.

A radiograph is smooth shapes of all sizes plus grain, and so is what is drawn here; the share of grain is chosen so
that files come to the wanted number of bytes, on which decoding time depends. Nothing else about the pictures matters.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from scaletransfer.index import FORMAT_VERSION, load_index
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.shards import Encoding, build, plan_shards
from scaletransfer.sources import open_source

CLASSES = 4
_SEED = 2106_00116


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A set of drawn images. grain: what the search started from, and whether it hit `kilobytes`, is in made.json."""

    name: str
    images: int
    height: int
    width: int
    channels: int
    kilobytes: int
    quality: int
    short_side: int = 0
    """Of the shards; 0: the files as they are."""
    falloff: float = 1.8
    """How much weaker structure of half the size is: more in radiographs than in photographs."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """A set on the disk: ``files`` has a folder a class, ``shards`` what make_shards makes of them."""

    drawn: Drawn
    files: Path
    shards: Path
    tars: tuple[Path, ...]

    @property
    def images(self) -> int:
        return self.drawn.images

    def describe(self) -> str:
        """Number, size and bytes of the images, in a sentence."""
        sizes = load_index(self.shards).table("train")["size"]
        d = self.drawn
        kind = "grey" if d.channels == 1 else "colour"
        files = f"{d.images:,} drawn {kind} JPEGs of {d.width}x{d.height}"
        weight = sum(path.stat().st_size for path in self.files.rglob("*.jpg")) / d.images / 1000
        if not d.short_side:
            return f"{files}, {weight:.0f} KB each"
        return f"short side {d.short_side}, {sizes.mean() / 1000:.0f} KB each, from {files}, {weight:.0f} KB each"


def prepare(drawn: Drawn, folder: Path, say: Callable[[str], None], files: Data | None = None) -> Data:
    """The set in ``folder``, drawn unless it is there already. files: another set whose files are taken instead."""
    home = folder / drawn.name
    done = home / "made.json"
    wanted = {**asdict(drawn), "files": files.drawn.name if files else "", "format": FORMAT_VERSION}
    images = files.files if files else home / "files"
    if not done.exists() or json.loads(done.read_text()) != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        say(f"drawing {drawn.images} images for {drawn.name}")
        if not files:
            _draw_all(drawn, images)
        encoding = Encoding(size=drawn.short_side) if drawn.short_side else Encoding()
        plan = plan_shards(open_source("image_folder", images), PUBLIC_SALT, encoding=encoding)
        build(plan, home / "shards")
        done.write_text(json.dumps(wanted))
    tars = tuple(sorted((home / "shards").glob("train-*.tar")))
    return Data(drawn=drawn, files=images, shards=home / "shards", tars=tars)


def _draw_all(drawn: Drawn, folder: Path) -> None:
    grain = _grain(drawn)
    for number in range(drawn.images):
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(_smooth(drawn, number), drawn, number, grain))


def _grain(drawn: Drawn) -> float:
    """The deviation of the grain, in levels, with which the first image has the wanted number of bytes."""
    smooth, low, high = _smooth(drawn, 0), 0.0, 60.0
    for _ in range(12):
        middle = (low + high) / 2
        too_large = len(_encoded(smooth, drawn, 0, middle)) > drawn.kilobytes * 1000
        low, high = (low, middle) if too_large else (middle, high)
    return (low + high) / 2


def _smooth(drawn: Drawn, number: int) -> np.ndarray:
    """float32 [H, W, channels] around 128: noise of all sizes from the whole picture to four pixels."""
    rng = np.random.default_rng([_SEED, number])
    height, width = drawn.height, drawn.width
    total = np.zeros((height, width, drawn.channels), np.float32)
    size = float(min(height, width))
    strength = 40.0
    while size >= 4:
        grid = (max(2, round(height / size) + 1), max(2, round(width / size) + 1), drawn.channels)
        noise = rng.standard_normal(grid, dtype=np.float32)
        if drawn.channels == 3:
            noise = noise.mean(axis=2, keepdims=True) * 1.2 + 0.4 * noise  # channels of photographs go together
        total += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(total.shape)
        size, strength = size / 2, strength / drawn.falloff
    return total + 128


def _encoded(smooth: np.ndarray, drawn: Drawn, number: int, grain: float) -> bytes:
    """A JPEG of a picture with grain."""
    rng = np.random.default_rng([_SEED, number, 1])
    noise = rng.integers(-128, 128, smooth.shape, dtype=np.int16).astype(np.float32) * (grain / 74)
    pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, drawn.quality])
    assert done
    return bytes(data)
