"""A tiny ImageNet-21k: a tar a synset, as it is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from official.imagenet1k import draw, put, tar

WNIDS = ("n00004475", "n00005787", "n00006024", "n00006484", "n00007846")


def write_imagenet21k(root: Path, *, seed: int = 0, classes: int = 5, per_class: int = 6, kind: str = "tars") -> Path:
    """kind: tars, folders, or whole (fall11_whole.tar, the tar of these tars)."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    packed = {}
    for wnid in WNIDS[:classes]:
        files = {f"{wnid}_{i}.JPEG": draw(rng) for i in rng.permutation(20_000)[:per_class]}
        packed[f"{wnid}.tar"] = tar(files)
        if kind == "folders":
            put(root / wnid, files)
    if kind == "tars":
        put(root, packed)
    elif kind == "whole":
        (root / "fall11_whole.tar").write_bytes(tar(packed))
    return root
