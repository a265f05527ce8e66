"""torchvision's ImageFolder with its default loader (Pillow), RandomResizedCrop, flip, ToTensor; torch's DataLoader.

Settings: ``files`` (a folder a class), ``size``, ``batch``, ``workers`` (processes).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench.peers.protocol import Opened, Settings, serve, shape_of
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def opened(settings: Settings) -> Opened:
    """Epoch after epoch."""
    torch.set_num_threads(1)
    steps = [transforms.RandomResizedCrop(settings["size"]), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    workers = settings["workers"]
    loader = DataLoader(
        datasets.ImageFolder(settings["files"], transforms.Compose(steps)),
        settings["batch"],
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    last: list[torch.Tensor] = []

    def batches() -> Iterator[int]:
        while True:
            for images, _ in loader:
                last[:] = [images]
                yield len(images)

    return batches(), lambda: shape_of(last[0])


serve(opened)
