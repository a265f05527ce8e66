"""A tiny tuberculosis set in the layout of the Kaggle archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_tuberculosis(root: Path, *, seed: int = 0, china: int = 20, montgomery: int = 14, side: int = 40) -> Path:
    """Write both sets into `root`, with the readings beside the images, and return it.

    china, montgomery: images, one a patient, half of them with tuberculosis (the higher numbers, as officially). side:
    of the images in pixels, 0 for empty files. China's are of mixed modes, as officially.
    """
    rng = np.random.default_rng(seed)
    sets = (
        ("ChinaSet_AllFiles/ChinaSet_AllFiles", "CHNCXR", china),
        ("Montgomery/MontgomerySet", "MCUCXR", montgomery),
    )
    for folder, prefix, count in sets:
        (root / folder / "CXR_png").mkdir(parents=True)
        (root / folder / "ClinicalReadings").mkdir()
        for number in range(1, count + 1):
            ill = int(number > count // 2)
            name = f"{prefix}_{number:04d}_{ill}"
            (root / folder / "ClinicalReadings" / f"{name}.txt").write_text("Patient's Sex: F\nnormal\n")
            path = root / folder / "CXR_png" / f"{name}.png"
            if not side:
                path.touch()
                continue
            shape = (side, side + 2, 3) if prefix == "CHNCXR" and number % 4 else (side, side + 2)
            Image.fromarray((rng.integers(0, 150, shape) + 100 * ill).astype(np.uint8)).save(path)
        (root / folder / "CXR_png" / "Thumbs.db").write_bytes(b"\0")
        (root / folder / "NLM-Readme.pdf").write_bytes(b"%PDF")
    return root
