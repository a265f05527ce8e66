"""Tiny data sets in the official layouts, by source name, and shards made of them."""

from __future__ import annotations

import importlib
from pathlib import Path

from helpers_data import make_chexpert

from scaletransfer import make_shards

NAMES = ("chexpert", "mimic", "nih", "padchest", "imagenet1k", "imagenet21k", "cifar10", "cifar100")
NAMES += ("flowers", "pets", "covidx", "tuberculosis")
ALL_VIEWS = "PA,AP,AP Supine,L,COSTAL"


def write(name: str, folder: Path) -> Path:
    """The data set `name` below `folder`; returns what --root takes."""
    if name == "chexpert":
        return make_chexpert(folder / "CheXpert-v1.0", rows=40, valid=10)
    writer = getattr(importlib.import_module(f"official.{name}"), f"write_{name}")
    folder.mkdir(parents=True, exist_ok=True)
    return Path(writer(folder))


def shards(name: str, root: Path, out: Path, *options: str) -> Path:
    """Shards of an official folder through the command."""
    assert make_shards.main([name, "--root", str(root), "--out", str(out), *options]) == 0
    return out
