"""Our loader as a measured program: the one place that knows how it is opened.

Settings: ``shards`` (folder) or ``files`` (a folder a class, read through an index in memory), ``kind`` (xray,
natural), ``augment`` (see `_transform`), ``size``, ``batch``, ``workers``, ``worker_kind`` (threads, processes; 0
workers: this process), ``seen`` (samples seen before the first batch). ``augment`` "read" reads images and decodes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import torch

from bench.peers.protocol import Opened, Settings, serve, shape_of
from scaletransfer.fused import Box, Fused, Uniforms, build_fused
from scaletransfer.index import ShardIndex, from_records, load_index
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.labels import LabelPolicy
from scaletransfer.loader import ShardDataset, Source, StepSampler, target_names
from scaletransfer.order import Order
from scaletransfer.shard_reader import read_view
from scaletransfer.sources import open_source
from scaletransfer.streams import batches, make_loader

_SEED = 1
_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class PlainCrop:
    """A random square of the wanted size, as it is: the crop that the peers are given too."""

    size: int
    draws: ClassVar[int] = 2

    def used(self, height: int, width: int, uniforms: Uniforms) -> Box:
        """A square anywhere in the image."""
        assert min(height, width) >= self.size
        top, left = int(uniforms[0] * (height - self.size + 1)), int(uniforms[1] * (width - self.size + 1))
        return Box(top, left, self.size, self.size)

    def resample(self, part: np.ndarray, box: Box, uniforms: Uniforms, out: np.ndarray) -> None:
        """Nothing is resampled."""
        out[:] = part


def opened(settings: Settings) -> Opened:
    """Epoch after epoch of a shuffled training order."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    stream = open_stream(settings)
    last: list[Any] = []

    def counted() -> Iterator[int]:
        for batch in stream:
            last[:] = [batch]
            yield len(batch)

    return counted(), lambda: shape_of(last[0])


def open_index(settings: Settings) -> ShardIndex:
    """The shards, or the files as they lie."""
    if "files" in settings:
        return from_records(open_source("image_folder", settings["files"]), PUBLIC_SALT)
    return load_index(settings["shards"])


def open_stream(settings: Settings) -> Iterator[Any]:
    """The images of each batch: uint8 [batch, channels, size, size]."""
    data, order = open_dataset(settings)
    batch = settings["batch"]
    sampler = StepSampler(settings.get("seen", 0), _EPOCHS * order.samples_per_epoch, 0, 1, batch, batch)
    if settings["augment"] == "read":
        return _read_only(data, sampler)
    loader = make_loader(data, sampler, settings["workers"], settings.get("worker_kind", "auto"))
    return (made["image"] for made in batches(loader))


def open_dataset(settings: Settings) -> tuple[ShardDataset, Order]:
    """The training set, and its order."""
    index, policy = open_index(settings), LabelPolicy()
    names = target_names([index], policy, "intersection", None)
    source = Source(index=index, split="train", policy=policy, names=names)
    order = Order(shards=(source.shards,), weights=(None,), seed=_SEED, global_batch=settings["batch"])
    transform = _transform(settings)
    return ShardDataset([source], order, transform, transform.channels, _SEED), order


def _transform(settings: Settings) -> Fused:
    """affine: the X-ray augmentation of the protocol "corrected"; published: of "paper", with flips and larger
    shifts; resized_crop: RandomResizedCrop and flip; crop: `PlainCrop`; centre: evaluation."""
    size, augment = settings["size"], settings["augment"]
    if augment in ("crop", "read"):
        return Fused(geometry=PlainCrop(size=size), channels=1 if settings["kind"] == "xray" else 3)
    protocol = "paper" if augment == "published" else "corrected"
    made = build_fused(settings["kind"], augment != "centre", size, protocol)  # type: ignore[arg-type]
    assert made is not None
    return made


def _read_only(data: ShardDataset, sampler: StepSampler) -> Iterator[np.ndarray]:
    """Every image of a batch is read and dropped; what comes out has only its length."""
    for positions in sampler:
        pending = data.begin(positions)
        for (number, line), entry in zip(pending.where, pending.entries, strict=True):
            chosen = data.sources[number]
            read_view(data.reader, chosen.index, chosen.split, line, entry)
        yield np.empty(len(positions), np.uint8)


if __name__ == "__main__":
    serve(opened)
