"""Drawn pictures into files, by several processes, and the folder that appears only when all of it is there.

What every drawn data set has in common: `synthetic_chexpert` and `synthetic_folder` say which pictures.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from scaletransfer.synthetic_findings import Effect
from scaletransfer.synthetic_render import render

JPEG_QUALITY = 90
_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a worker needs to draw one file; see `synthetic_render.render` for all but `path`."""

    path: str
    """Relative to the data set's folder, with forward slashes."""
    findings: dict[str, float]
    view: str
    sex: str
    age: int
    size: tuple[int, int]
    patient_seed: tuple[int, ...]
    study_seed: tuple[int, ...]
    image_seed: tuple[int, ...]


def check_options(out: Path, limits: Mapping[str, tuple[int, int, int | None]]) -> None:
    """Raise ValueError for an `out` that exists and isn't an empty folder, and for an option out of range.

    limits: option without dashes -> (value, smallest, largest or None).
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "isn't empty" if out.is_dir() else "is a file"
        raise ValueError(f"{out} {what}; give a new folder by --out, or remove it first.")
    for name, (value, low, high) in limits.items():
        if value < low or (high is not None and value > high):
            text = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"--{name} is {value}; it must be {text}.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` in the end; after any failure nothing is left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp makes private folders
        yield draft
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft)
        raise


def draw_all(folder: Path, pictures: Sequence[Picture], effects: Mapping[str, Effect], workers: int) -> None:
    """Draw every picture into `folder`, as grey JPEG; the bytes are the same for any number of `workers`."""
    for parent in sorted({os.path.dirname(picture.path) for picture in pictures}):
        os.makedirs(folder / parent, exist_ok=True)
    batches = [list(batch) for batch in _batched(pictures)]
    with tqdm(total=len(pictures), unit="images", desc="drawing") as bar:
        if workers == 1 or len(batches) == 1:
            for batch in batches:
                bar.update(_draw(folder, batch, effects))
            return
        # spawn: a fork of a process with threads (torch, BLAS) may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(batches)), mp_context=context) as pool:
            repeat = itertools.repeat
            for count in pool.map(_draw, repeat(folder), batches, repeat(effects)):
                bar.update(count)


def film_size(rng: np.random.Generator, short: int) -> tuple[int, int]:
    """(height, width): films come in many sizes, a little more often wide than tall."""
    low = max(48, round(short * rng.uniform(0.92, 1.12)))
    high = round(low * rng.uniform(1.0, 1.25))
    return (low, high) if rng.uniform() < 0.6 else (high, low)


def _batched(pictures: Sequence[Picture]) -> Iterable[Sequence[Picture]]:
    for start in range(0, len(pictures), _BATCH):
        yield pictures[start : start + _BATCH]


def _draw(folder: Path, pictures: Sequence[Picture], effects: Mapping[str, Effect]) -> int:
    """Draw and write some pictures; everything about a picture comes from what it says itself."""
    for picture in pictures:
        pixels = render(
            effects=effects,
            findings=picture.findings,
            view=picture.view,
            sex=picture.sex,
            age=picture.age,
            size=picture.size,
            patient_seed=picture.patient_seed,
            study_seed=picture.study_seed,
            image_seed=picture.image_seed,
        )
        Image.fromarray(pixels).save(folder / picture.path, "JPEG", quality=JPEG_QUALITY)
    return len(pictures)
