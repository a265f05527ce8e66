"""What a model's body says of images: its features after the last norm and ReLU, averaged over the image.

    scaletransfer features MODEL DATA --out F.npz

MODEL is an exported model or a fine-tuning run; DATA a folder of images (one folder a class, with or without split
folders, or just images), or shards. F.npz holds features (float32 [n, C]), key and split (text [n]), and where they are
known image (the file), label (int64 [n], or float32 [n, L] with NaN for unknown) and label_names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from scaletransfer.cli import CommandParser
from scaletransfer.files import lack_of_space_named
from scaletransfer.labels import LabelPolicy
from scaletransfer.model_images import look, open_data, open_ready, pooled


def features(
    model: str | Path, data: str | Path, *, split: str | None = None, batch: int = 32, workers: int = 4
) -> dict[str, NDArray[Any]]:
    """The arrays of the file, by their names. split: None takes all, one after the other.

    Raises ValueError: a model whose file does not say how images are prepared, unreadable images, no such split.
    """
    ready = open_ready(Path(model), ("transform",))
    policy = LabelPolicy(**ready.card["policy"]) if ready.card.get("policy") else LabelPolicy()
    target, labelled = open_data(data, policy)
    if split is not None and split not in target.index.splits:
        raise ValueError(f"{target.index.where} has no split {split!r}, only {', '.join(target.index.splits)}")
    columns: dict[str, list[Any]] = {"features": [], "key": [], "split": [], "image": [], "label": []}
    for part in [split] if split is not None else list(target.index.splits):
        table, shards = target.index.table(part), target.index.splits[part].shards
        with torch.inference_mode(), tqdm(total=len(table), unit="img", disable=None) as bar:
            for seen in look(ready, target, part, batch=batch, workers=workers):
                columns["features"].append(pooled(ready.network, seen.images).cpu().numpy())
                columns["key"].append(np.array(target.index.keys(part, seen.rows)))
                columns["split"].append(np.array([part] * len(seen.rows)))
                if target.index.in_memory:
                    columns["image"].append(np.array([shards[int(n)].file for n in table["shard"][seen.rows]]))
                if labelled:
                    columns["label"].append(target.source(part).targets(seen.rows))
                bar.update(len(seen.rows))
    found = {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    return {**found, "label_names": np.array(target.names)} if labelled else found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(
        prog="scaletransfer features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported model folder, or a fine-tuning run")
    parser.add_argument("data", metavar="DATA", help="a folder of images, or shards")
    parser.add_argument("--out", type=Path, required=True, metavar="F.npz", help="file to write")
    parser.add_argument("--split", help="train, valid or test (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read and decode (default 4)")
    options = parser.parse_args(argv)
    for name, least in (("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}: give {least} or more")
    if options.out.suffix != ".npz":
        raise ValueError(f"--out {options.out}: give a file that ends in .npz")
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
    found = features(options.model, options.data, split=options.split, batch=options.batch, workers=options.workers)
    temporary = options.out.with_name(f".{options.out.name}.tmp")
    try:
        with lack_of_space_named(options.out.absolute().parent), temporary.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        os.replace(temporary, options.out)
    finally:
        temporary.unlink(missing_ok=True)
    rows, width = found["features"].shape
    what = f", {len(found['label_names'])} label names" if "label" in found else ", no labels"
    print(f"{options.out}: {rows} images of {width} features{what}")
    return 0
