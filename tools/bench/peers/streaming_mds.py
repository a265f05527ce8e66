"""mosaicml-streaming: a folder of MDS shards made from the same tars, StreamingDataset with Pillow and torchvision's
transforms, and torch's DataLoader.

Settings: ``tars`` (paths), ``mds`` (folder, made where it is missing), ``augment`` (crop, affine, resized_crop),
``size``, ``batch``, ``workers`` (processes).
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench.peers.protocol import Opened, Settings, serve, shape_of
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader
from torchvision import transforms


class Images(StreamingDataset):
    """Image and class of each sample."""

    def __init__(self, steps: Any, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return self.steps(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


def make(tars: list[str], folder: Path) -> None:
    """The same image files, in MDS shards."""
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    with MDSWriter(out=str(unfinished), columns={"image": "bytes", "label": "int"}) as writer:
        for path in tars:
            with tarfile.open(path) as tar:
                image = b""
                for member in tar:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    if member.name.endswith(".jpg"):
                        image = stream.read()
                    else:
                        writer.write({"image": image, "label": int(stream.read())})
    unfinished.rename(folder)


def opened(settings: Settings) -> Opened:
    """Epoch after epoch."""
    torch.set_num_threads(1)
    folder = Path(settings["mds"])
    if not folder.exists():
        make(settings["tars"], folder)
    clean_stale_shared_memory()
    size, batch, workers = settings["size"], settings["batch"], settings["workers"]
    if settings["augment"] == "crop":
        steps: list[Any] = [transforms.RandomCrop(size)]
    elif settings["augment"] == "affine":
        bilinear = transforms.InterpolationMode.BILINEAR
        moved = transforms.RandomAffine(45, (0.15, 0.15), (0.9, 1.1), interpolation=bilinear)
        steps = [transforms.Resize(size), transforms.CenterCrop(size), moved]
    else:
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    chain = transforms.Compose([*steps, transforms.ToTensor()])
    data = Images(chain, local=str(folder), shuffle=True, batch_size=batch)
    loader: DataLoader[Any] = DataLoader(
        data, batch, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    last: list[torch.Tensor] = []

    def batches() -> Iterator[int]:
        while True:
            for images, _ in loader:
                last[:] = [images]
                yield len(images)

    return batches(), lambda: shape_of(last[0])


if __name__ == "__main__":
    serve(opened)
