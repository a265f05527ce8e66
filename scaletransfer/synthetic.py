"""`scaletransfer synthetic chexpert`: a folder in the official CheXpert layout with drawn pictures, to try
things on.

Rows are those of the real table where it is installed, so that views, missing labels and patients are as they
are; the pictures are drawn (`synthetic_render`) and show what the labels say.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from scaletransfer.cli import CommandParser
from scaletransfer.synthetic_findings import CHEXPERT_EFFECTS
from scaletransfer.synthetic_render import render
from scaletransfer.synthetic_rows import HEADER, Row, choose, draw_rows, known, read_rows, real_table, truth

# Fewer rows don't hold both splits, a lateral image and a handful of findings.
MIN_ROWS = 20
JPEG_QUALITY = 90
_BATCH = 16


@dataclass(frozen=True, slots=True)
class _Picture:
    """What a worker needs to draw one file."""

    path: str
    row: Row
    findings: dict[str, float]


def synthetic_chexpert(
    out: Path, *, rows: int, seed: int, size: int = 320, workers: int = 1, table: str = "auto"
) -> dict[str, object]:
    """Make the folder `out` with train.csv, valid.csv and `rows` pictures in all.

    size: about the short side in pixels. table: "real" takes whole patients of the table in the installed
    torchxrayvision, "drawn" draws them, "auto" takes the real one if it is there. The same arguments,
    whatever `workers`, give the same bytes.

    Returns {"rows": the table used ("real" or "drawn"), "train": images, "valid": images, "train_patients":
    n, "valid_patients": n}. Raises ValueError for options out of range and an `out` that exists and isn't
    empty; then and after any failure nothing is left behind.
    """
    _check(out, rows=rows, seed=seed, size=size, workers=workers)
    used, pool = _rows(table, rows, seed)
    train, valid = choose(pool, rows, np.random.default_rng((seed, 3)))
    # The official small set has its own folder name in the paths; every other folder is called like the large
    # one.
    folder = out.name if out.name == "CheXpert-v1.0-small" else "CheXpert-v1.0"
    tables: dict[str, list[Row]] = {"train": train, "valid": []}
    pictures = [_Picture(_file("train", row), row, truth(row, seed)) for row in train]
    for row in valid:
        present = truth(row, seed)
        tables["valid"].append(known(row, present))
        pictures.append(_Picture(_file("valid", row), row, present))
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp makes private folders
        for split, chosen in tables.items():
            with open(draft / f"{split}.csv", "w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(HEADER)
                writer.writerows(row.cells(folder, split) for row in chosen)
        for parent in sorted({os.path.dirname(picture.path) for picture in pictures}):
            os.makedirs(draft / parent, exist_ok=True)
        _draw_all(draft, pictures, seed=seed, size=size, workers=workers)
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft)
        raise
    people = {f"{split}_patients": len({row.patient for row in chosen}) for split, chosen in tables.items()}
    return {"rows": used, "train": len(train), "valid": len(valid), **people}


def main(argv: Sequence[str]) -> int:
    """The command: `argv` is what follows `scaletransfer synthetic`. Returns 0; user errors are
    ValueErrors."""
    parser = CommandParser(
        prog="scaletransfer synthetic",
        description="Draw a data set in an official layout, for trying the project without any data.",
    )
    parser.add_argument("source", choices=["chexpert"], help="whose layout")
    parser.add_argument("--rows", type=int, required=True, help="images in all; a tenth of them is for validation")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, such as datasets/CheXpert-v1.0")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (default: 0)")
    parser.add_argument("--size", type=int, default=320, help="about the short side in pixels (default: 320)")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: one a core, at most 8)")
    parser.add_argument(
        "--table",
        choices=["auto", "real", "drawn"],
        default="auto",
        help="take patients of the real table in the installed torchxrayvision, or draw them (default: auto)",
    )
    args = parser.parse_args(argv)
    done = synthetic_chexpert(
        args.out, rows=args.rows, seed=args.seed, size=args.size, workers=args.workers, table=args.table
    )
    kind = "rows of the real table (torchxrayvision)" if done["rows"] == "real" else "drawn rows"
    print(
        f"{args.out}: {done['train']} training images of {done['train_patients']} patients, {done['valid']} "
        f"validation images of {done['valid_patients']} patients, from {kind}; the pictures are drawn."
    )
    return 0


def _check(out: Path, *, rows: int, seed: int, size: int, workers: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "isn't empty" if out.is_dir() else "is a file"
        raise ValueError(f"{out} {what}; give a new folder by --out, or remove it first.")
    for name, value, low, high in (
        ("rows", rows, MIN_ROWS, None),
        ("seed", seed, 0, None),
        ("size", size, 64, 4096),
        ("workers", workers, 1, None),
    ):
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"--{name} is {value}; it must be {limits}.")


def _rows(table: str, count: int, seed: int) -> tuple[str, list[Row]]:
    """(which table, rows to choose from)."""
    if table not in ("auto", "real", "drawn"):
        raise ValueError(f"--table is {table!r}; it must be auto, real or drawn.")
    file = real_table() if table != "drawn" else None
    if file is None:
        if table == "real":
            raise ValueError("The real table needs the package torchxrayvision; install it or use --table drawn.")
        # Many more than needed, so that rare findings can be chosen.
        return "drawn", draw_rows(np.random.default_rng((seed, 6)), max(20_000, 2 * count))
    rows = read_rows(file)
    if count > len(rows):
        raise ValueError(f"--rows is {count} and the real table has {len(rows)}; ask for fewer or use --table drawn.")
    return "real", rows


def _file(split: str, row: Row) -> str:
    return f"{split}/patient{row.patient:05d}/study{row.study}/{row.file}"


def _draw_all(folder: Path, pictures: Sequence[_Picture], *, seed: int, size: int, workers: int) -> None:
    batches = [list(batch) for batch in _batched(pictures)]
    with tqdm(total=len(pictures), unit="images", desc="drawing") as bar:
        if workers == 1 or len(batches) == 1:
            for batch in batches:
                bar.update(_draw(folder, batch, seed, size))
            return
        # spawn: a fork of a process with threads (torch, BLAS) may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(batches)), mp_context=context) as pool:
            repeat = itertools.repeat
            for count in pool.map(_draw, repeat(folder), batches, repeat(seed), repeat(size)):
                bar.update(count)


def _batched(pictures: Sequence[_Picture]) -> Iterable[Sequence[_Picture]]:
    for start in range(0, len(pictures), _BATCH):
        yield pictures[start : start + _BATCH]


def _draw(folder: Path, pictures: Sequence[_Picture], seed: int, size: int) -> int:
    """Draw and write some pictures; everything about a picture comes from the seed and its row."""
    for picture in pictures:
        row = picture.row
        image = (row.patient, row.study, zlib.crc32(row.file.encode()))
        pixels = render(
            effects=CHEXPERT_EFFECTS,
            findings=picture.findings,
            view=row.view,
            sex=row.sex,
            age=row.age,
            size=_size(np.random.default_rng((seed, 5, *image)), size),
            patient_seed=(seed, 0, row.patient),
            study_seed=(seed, 1, row.patient, row.study),
            image_seed=(seed, 2, *image),
        )
        Image.fromarray(pixels).save(folder / picture.path, "JPEG", quality=JPEG_QUALITY)
    return len(pictures)


def _size(rng: np.random.Generator, short: int) -> tuple[int, int]:
    """(height, width): films come in many sizes, a little more often wide than tall."""
    low = max(48, round(short * rng.uniform(0.92, 1.12)))
    high = round(low * rng.uniform(1.0, 1.25))
    return (low, high) if rng.uniform() < 0.6 else (high, low)


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
