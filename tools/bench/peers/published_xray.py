"""The published X-ray pipeline, written anew from what it does: cv2 reads every image whole and in colour, the three
channels are divided by 255 in double precision, one of them is cut square, resized over the area and normalised; then
one affine transformation with a mirrored border, a flip, and three equal channels of single precision.

cv2, numpy and torch's DataLoader over loose files. Settings: ``files`` (folder), ``size``, ``batch``,
``workers`` (processes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from bench.peers.protocol import Opened, Settings, serve, shape_of
from torch.utils.data import DataLoader, Dataset


class Published(Dataset[torch.Tensor]):
    """float32 [3, size, size] of each file."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> torch.Tensor:
        read = cv2.imread(str(self.files[number]))
        assert read is not None
        pixels: np.ndarray = (read / 255.0)[:, :, 0]
        height, width = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square: Any = pixels[top : top + side, left : left + side]
        small = cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_AREA).astype(np.float32)
        moved = self._moved((small - 0.5) / 0.5)
        return torch.from_numpy(moved[None] * np.ones((3, 1, 1), np.float32)).float()

    def _moved(self, pixels: np.ndarray) -> np.ndarray:
        """Shift up to 0.25, rotation up to 45 degrees, scale 0.9 to 1.1; a flip one time in two."""
        u = torch.rand(5).tolist()
        middle = (self.size - 1) / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), 45 * (2 * u[0] - 1), 0.9 + 0.2 * u[1])
        matrix[:, 2] += [(2 * u[2] - 1) * 0.25 * self.size, (2 * u[3] - 1) * 0.25 * self.size]
        moved = cv2.warpAffine(
            pixels, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        return np.ascontiguousarray(moved[:, ::-1]) if u[4] < 0.5 else moved


def opened(settings: Settings) -> Opened:
    """Epoch after epoch."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    files = sorted(Path(settings["files"]).rglob("*.jpg"))
    workers = settings["workers"]
    loader = DataLoader(
        Published(files, settings["size"]),
        settings["batch"],
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    last: list[torch.Tensor] = []

    def batches() -> Iterator[int]:
        while True:
            for images in loader:
                last[:] = [images]
                yield len(images)

    return batches(), lambda: shape_of(last[0])


serve(opened)
