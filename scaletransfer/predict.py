"""What a model sees on images: a table of label names and probabilities, and pictures of where it looks.

    scaletransfer predict MODEL IMAGES... [--out F.csv] [--top K] [--explain DIR]

MODEL is an exported model or a fine-tuning run, IMAGES are files and folders. Images are prepared as in evaluation.
Probabilities are a softmax over the classes, or of a multi-label model a sigmoid for each label. --explain writes a
Grad-CAM picture for each image and finding: all labels of a multi-label model, else the first class; with --top the
first K.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scaletransfer.cli import CommandParser
from scaletransfer.explain import heat, need_grad_cam, overlay
from scaletransfer.files import lack_of_space_named, write_atomically
from scaletransfer.model_images import Ready, Seen, files_target, find_files, look, open_ready
from scaletransfer.transfer.predictions import WIDE
from scaletransfer.transfer.scores import probabilities

_TOP_OF_MANY = 5
_EXPLAINED_AT_ONCE = 4
"""Images of one backward pass, which keeps all activations."""


def table(ready: Ready, files: Sequence[Path], p: np.ndarray, top: int | None) -> Iterator[list[Any]]:
    """Header and rows for probabilities [n, L] of the files: ``image, [predicted,] p:<label>, ...``, or the ``top``
    labels as ``image, label_1, p_1, ...``, largest first (5 where a multi-class model has more than 200 classes)."""
    names, single = ready.names, ready.card["task"] == "multiclass"
    if top is None and single and len(names) > WIDE:
        top = _TOP_OF_MANY
    if top is None:
        yield ["image", *(["predicted"] if single else []), *(f"p:{name}" for name in names)]
    else:
        yield ["image", *(f"{what}_{rank}" for rank in range(1, top + 1) for what in ("label", "p"))]
    for file, row in zip(files, p, strict=True):
        if top is None:
            yield [file, *([names[int(row.argmax())]] if single else []), *(f"{value:.6g}" for value in row)]
        else:
            best = first(row, top)
            yield [file, *(cell for number in best for cell in (names[number], f"{row[number]:.6g}"))]


def first(row: np.ndarray, count: int) -> list[int]:
    """The outputs with the largest probabilities, largest first."""
    return [int(number) for number in np.argsort(-row, kind="stable")[:count]]


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    *,
    top: int | None = None,
    explain: str | Path | None = None,
    batch: int = 32,
    workers: int = 4,
) -> tuple[list[list[Any]], list[Path]]:
    """(header and rows of the table, pictures that were written to the folder ``explain``).

    Raises ValueError: a model whose file does not say its task or how images are prepared, images that cannot be read,
    --explain without the package grad-cam.
    """
    if explain is not None:
        need_grad_cam()
    ready = open_ready(Path(model), ("task", "transform"))
    outputs = len(ready.names)
    if top is not None and top > outputs:
        raise ValueError(f"--top is {top}, but {ready.path} has {outputs} labels")
    files = find_files([Path(image) for image in images])
    target = files_target(files)
    order = {row: files[row] for row in range(len(files))}
    rows: dict[int, np.ndarray] = {}
    written: list[Path] = []
    for seen in look(ready, target, "test", batch=batch, workers=workers):
        with torch.inference_mode():
            logits = ready.network(seen.images).float().cpu().numpy()
        if not np.isfinite(logits).all():
            raise ValueError(f"{ready.path} gives logits that are not finite: its weights are damaged")
        p = probabilities(logits, ready.card["task"])
        rows |= dict(zip(seen.rows.tolist(), p, strict=True))
        if explain is not None:
            written += _explain(ready, seen, p, order, Path(explain), top)
    found = np.stack([rows[number] for number in range(len(files))])
    return list(table(ready, files, found, top)), written


def _explain(
    ready: Ready, seen: Seen, p: np.ndarray, files: dict[int, Path], folder: Path, top: int | None
) -> list[Path]:
    """Write the pictures of a batch; which those are."""
    count = top or (1 if ready.card["task"] == "multiclass" else len(ready.names))
    chosen = [first(row, count) for row in p]
    written = []
    for start in range(0, len(chosen), _EXPLAINED_AT_ONCE):
        part = slice(start, start + _EXPLAINED_AT_ONCE)
        maps = heat(ready.network, seen.images[part], chosen[part])
        for pixels, row, best, heated in zip(seen.pixels[part], seen.rows[part], chosen[part], maps, strict=True):
            for number, one in zip(best, heated, strict=True):
                path = folder / f"{_unique(files, int(row))}_{plain(ready.names[number])}.png"
                with lack_of_space_named(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(overlay(pixels, seen.white, one)).save(path)
                written.append(path)
    return written


def _unique(files: dict[int, Path], row: int) -> str:
    """The file's name without its suffix, with its folders where others are called so too."""
    own = files[row]
    if sum(file.stem == own.stem for file in files.values()) == 1:
        return plain(own.stem)
    return f"{plain('_'.join(own.parent.parts[-2:]))}_{plain(own.stem)}_{own.suffix[1:]}_{row + 1}"


def plain(name: str) -> str:
    """A label or file name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(
        prog="scaletransfer predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model folder, or a fine-tuning run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files and folders")
    parser.add_argument("--out", type=Path, metavar="F.csv", help="write the table there (default: to the terminal)")
    parser.add_argument("--top", type=int, metavar="K", help="the K most probable labels only")
    parser.add_argument("--explain", type=Path, metavar="DIR", help="write Grad-CAM pictures there")
    parser.add_argument("--batch", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read and decode (default 4)")
    options = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    for name, least in (("batch", 1), ("workers", 0), ("top", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}: give {least} or more")
    if options.explain is not None and options.explain.exists() and not options.explain.is_dir():
        raise ValueError(f"--explain {options.explain} is a file: give a folder")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise ValueError(f"--out {options.out}: give a file in a folder that is there")
    rows, written = predict(
        options.model,
        options.images,
        top=options.top,
        explain=options.explain,
        batch=options.batch,
        workers=options.workers,
    )
    if options.out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    else:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with lack_of_space_named(options.out.absolute().parent):
            write_atomically(options.out, text.getvalue().encode("utf-8"))
        print(f"{options.out}: {len(rows) - 1} images")
    if options.explain is not None:
        print(f"{options.explain}: {len(written)} Grad-CAM pictures", file=sys.stderr)
    return 0
