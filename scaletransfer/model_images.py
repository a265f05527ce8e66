"""An exported model at work on images: files, a folder of classes, or shards, prepared exactly as in evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scaletransfer import keys
from scaletransfer.evaluate import load_model, prepare
from scaletransfer.image_check import check_images
from scaletransfer.index import from_records, load_index
from scaletransfer.labels import LabelPolicy
from scaletransfer.loader import EvalSampler, ShardDataset
from scaletransfer.models import BiT, create_model
from scaletransfer.models.weights import load_into, network_options
from scaletransfer.sources.base import Record, Source
from scaletransfer.sources.image_folder import IMAGE_SUFFIXES, ImageFolder
from scaletransfer.streams import batches, dead_workers_named, make_loader
from scaletransfer.transfer.data import Target, make_target
from scaletransfer.transforms import Normalizer


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model in evaluation mode, on the device that it computes on."""

    path: Path
    card: dict[str, Any]
    network: nn.Module
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        """Label names; their numbers where the model has none."""
        return tuple(self.card.get("label_names") or map(str, range(self.card["num_classes"])))


class Seen(NamedTuple):
    """A batch of images that a model can look at."""

    rows: np.ndarray
    """Of the split's table, int64 [n]."""
    pixels: Tensor
    """As decoded and cropped: integers [n, 1 or 3, h, w]."""
    images: Tensor
    """The same, normalised: float32 [n, 1 or 3, h, w], on the device."""
    white: float
    """The value of white pixels."""


def open_ready(path: Path, needs: Sequence[str]) -> Ready:
    """Read the exported model (or a fine-tuning run's) and build its network as its model.json says.

    Raises ValueError where that does not say what is needed, naming the option of import that does.
    """
    path, state, card = load_model(path)
    for key in ("model", "num_classes", "normalisation", *needs):
        if key not in card:
            how = {"task": " --task", "transform": " --transform and --size", "label_names": " --labels"}.get(key, "")
            raise ValueError(
                f"{path} has no model.json that says its {key}: bring it in with scaletransfer import{how}"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = create_model(card["model"], card["num_classes"], **network_options(card))
    load_into(network, state)
    return Ready(path=path, card=card, network=network.to(device).eval(), device=device)


def pooled(network: nn.Module, images: Tensor) -> Tensor:
    """float32 [n, C]: what the classifier gets: after the last norm and ReLU, averaged over the image."""
    if isinstance(network, BiT):
        if images.shape[1] == 1:
            images = images.expand(-1, network.in_channels, -1, -1)
        head: Any = network.head
        x = head.avg(head.relu(head.gn(network.body(network.root(images)))))
        return torch.flatten(x, 1).float()
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    model: Any = network
    x = model.forward_head(model.forward_features(images), pre_logits=True)
    return torch.flatten(x, 1).float()


class Files(Source):
    """Image files as they were named, without labels."""

    name = "images"
    task = "multiclass"
    licence = "unknown (the user's own images)"
    public = False
    label_names = ("unknown",)

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [Path(os.path.abspath(file)) for file in files]
        super().__init__(os.path.commonpath([file.parent for file in self.files]))

    def __iter__(self) -> Iterator[Record]:
        for file in self.files:
            name = file.relative_to(self.root).as_posix()
            yield Record(source_id=name, split="test", patient="", image=name, labels=0, view="")


def find_files(given: Sequence[Path]) -> list[Path]:
    """The files that were named and all images below the folders that were, in that order, each once.

    Raises ValueError for what is not there, and for a folder without images.
    """
    found: dict[Path, None] = {}
    for path in given:
        if path.is_file():
            found[path] = None
        elif path.is_dir():
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            ]
            if not inside:
                raise ValueError(f"{path} holds no image: give image files, or folders with some")
            found |= dict.fromkeys(inside)
        else:
            raise ValueError(f"there is no image {path}")
    seen: dict[str, Path] = {}
    for path in found:
        seen.setdefault(os.path.abspath(path), path)
    return list(seen.values())


def files_target(files: Sequence[Path]) -> Target:
    """Files as the loader takes them; the split is test."""
    return make_target(from_records(Files(files), keys.PUBLIC_SALT), "images", LabelPolicy())


def open_data(data: Path | str, policy: LabelPolicy) -> tuple[Target, bool]:
    """(what the path names, whether it has labels): shards, a folder of one folder a class, or images."""
    path = Path(data)
    if "://" in str(data) or (path / "index.json").is_file():
        return make_target(load_index(str(data)), path.name, policy), True
    if path.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir()):
        loose = [f for f in path.iterdir() if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES]
        if not loose:
            return make_target(from_records(ImageFolder(path), keys.PUBLIC_SALT), path.name, policy), True
    return files_target(find_files([path])), False


def look(ready: Ready, target: Target, split: str, *, batch: int, workers: int) -> Iterator[Seen]:
    """All images of a split, in the order of its table.

    Raises ValueError that names the images that cannot be read, before any is looked at.
    """
    transform, channels = prepare(ready.card["transform"], target)
    workers = min(workers, os.cpu_count() or 1)
    depth = 8 if channels == 3 else target.depth
    data = ShardDataset([target.source(split)], None, transform, channels, 0, depth=depth)
    if target.index.in_memory:
        rows = [np.arange(len(data))]
        check_images(data.sources, rows, channels=channels, depth=depth, workers=workers if len(data) > batch else 0)
    normal = ready.card["normalisation"]
    normalize = Normalizer(normal["mean"], normal["std"], data.pixel_max).to(ready.device)
    size = min(batch, len(data))
    sampler = EvalSampler(len(data), 0, 1, size)
    done = 0
    with dead_workers_named():
        for made in batches(make_loader(data, sampler, workers if len(data) > batch else 0)):
            count = min(size, len(data) - done)  # what fills up the last batch repeats a sample
            pixels = made["image"][:count]
            images = normalize(pixels.to(ready.device, non_blocking=True))
            yield Seen(made["position"][:count].numpy(), pixels, images, float(data.pixel_max))
            done += count
