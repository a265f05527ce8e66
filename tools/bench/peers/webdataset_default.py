"""webdataset as its documentation has it: WebDataset, shuffle, decode("pil"), to_tuple, map_tuple with torchvision's
transforms, and torch's DataLoader; or, with ``stages``, the stages that open_clip builds its training data from.

Settings: ``tars`` (paths), ``augment`` (crop, affine, resized_crop), ``size``, ``batch``, ``workers`` (processes),
``stages`` (false, true).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import webdataset as wds
from bench.peers.protocol import Opened, Settings, serve, shape_of
from torch.utils.data import DataLoader
from torchvision import transforms

SHUFFLED = 1000
"""Samples in the shuffle buffer, as in the documentation's example."""


def steps(augment: str, size: int) -> Any:
    """The transforms of one Pillow image; the result is float32 [3, size, size]."""
    if augment == "crop":
        chosen: list[Any] = [transforms.RandomCrop(size)]
    elif augment == "affine":
        bilinear = transforms.InterpolationMode.BILINEAR
        moved = transforms.RandomAffine(45, (0.15, 0.15), (0.9, 1.1), interpolation=bilinear)
        chosen = [transforms.Resize(size), transforms.CenterCrop(size), moved]
    else:
        chosen = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*chosen, transforms.ToTensor()])


def same(value: Any) -> Any:
    """The label as it is."""
    return value


def documented(settings: Settings) -> Any:
    """The pipeline of webdataset's documentation."""
    made = wds.WebDataset(settings["tars"], shardshuffle=100).shuffle(SHUFFLED).decode("pil").to_tuple("jpg", "cls")
    made = made.map_tuple(steps(settings["augment"], settings["size"]), same).batched(settings["batch"], partial=False)
    return DataLoader(made.repeat(), batch_size=None, num_workers=settings["workers"])


def open_clip_like(settings: Settings) -> Any:
    """The stages of open_clip's get_wds_dataset, with a class where it has a text."""
    made = wds.DataPipeline(
        wds.SimpleShardList(settings["tars"]),
        wds.shuffle(100, rng=random.Random(0)),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(SHUFFLED, initial=SHUFFLED),
        wds.select(has_both),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="cls"),
        wds.map_dict(image=steps(settings["augment"], settings["size"]), text=same),
        wds.to_tuple("image", "text"),
        wds.batched(settings["batch"], partial=False),
    )
    workers = settings["workers"]
    return wds.WebLoader(made.repeat(), batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def has_both(sample: dict[str, Any]) -> bool:
    """Whether a sample has an image and what belongs to it."""
    return "cls" in sample and any(name in sample for name in ("jpg", "png", "jpeg", "webp"))


def opened(settings: Settings) -> Opened:
    """The endless pipeline."""
    torch.set_num_threads(1)
    random.seed(0)
    loader = (open_clip_like if settings["stages"] else documented)(settings)
    last: list[torch.Tensor] = []

    def batches() -> Iterator[int]:
        for images, _ in loader:
            last[:] = [images]
            yield len(images)

    return batches(), lambda: shape_of(last[0])


serve(opened)
