"""A tiny CIFAR-100 in the official form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from official.cifar10 import draw_rows, pickle2, store

FINE, COARSE = 100, 20


def write_cifar100(root: Path, *, seed: int = 0, train: int = 200, test: int = 100, archive: bool = True) -> Path:
    """`train` and `test` images; returns what --root takes. Class names are not the official ones."""
    rng = np.random.default_rng(seed)
    files = {}
    for name, label, rows in (("train", "training batch 1 of 1", train), ("test", "testing batch 1 of 1", test)):
        fine = [row % FINE for row in range(rows)]
        entries = {
            "filenames": [f"fine{number:02d}_s_{rng.integers(2000):06d}.png" for number in fine],
            "batch_label": label,
            "fine_labels": fine,
            "coarse_labels": [number * 7 % COARSE for number in fine],
            "data": draw_rows(rng, rows),
        }
        files[name] = pickle2(entries)
    fine_names = [f"fine {number:02d}" for number in range(FINE)]
    coarse_names = [f"coarse {number:02d}" for number in range(COARSE)]
    files["meta"] = pickle2({"fine_label_names": fine_names, "coarse_label_names": coarse_names})
    return store(root, "cifar-100-python", "cifar-100-python.tar.gz", files, archive)
