"""Data sets over small shards, for the tests of the loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers_data import SALT, make_chexpert

from scaletransfer import labels, sources
from scaletransfer.fused import build_fused
from scaletransfer.index import ShardIndex
from scaletransfer.loader import (
    Batch,
    ShardDataset,
    Source,
    target_names,
)
from scaletransfer.order import Order
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import Record, open_source
from scaletransfer.transforms import build_transform

SIZE = 32
POLICY = labels.LabelPolicy()


class Findings(sources.Source):
    """A multi-label source with a vocabulary of its own: two findings that CheXpert has, one that it has not."""

    name, task, licence, public = "other", "multilabel", "none", True
    label_names = ("Edema", "Effusion", "Hernia")

    def __init__(self, root: Path, count: int = 12, **attributes: object) -> None:
        super().__init__(root)
        self.count = count
        for key, value in attributes.items():
            setattr(self, key, value)

    def __iter__(self) -> Iterator[Record]:
        for number in range(self.count):
            states = (number % 2, 1 - number % 2, (1, 0, -1, -2)[number % 4])
            yield Record(
                source_id=str(number), split="train", patient="", image=f"{number}.jpg", labels=states, view=""
            )


def small_chexpert(folder: Path) -> Path:
    """52 training and 11 validation images below ``folder``."""
    return make_chexpert(folder / "CheXpert-v1.0", rows=52, valid=11, laterals=False)


def small_shards(root: Path) -> Path:
    """Shards of ten images beside ``root``."""
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=10), root.parent / "shards")
    return root.parent / "shards"


def source(index: ShardIndex, split: str = "train", names: Sequence[str] | None = None) -> Source:
    own = target_names([index], POLICY, "intersection", None)
    return Source(index=index, split=split, policy=POLICY, names=tuple(names or own))


def dataset(
    sources: Sequence[Source], *, train: bool = True, batch: int = 12, weights=None, seed: int = 5, kind="xray"
) -> ShardDataset:
    order = None
    if train:
        shards = tuple(s.shards for s in sources)
        order = Order(shards=shards, weights=weights or (None,) * len(shards), seed=seed, global_batch=batch)
    transform = build_fused(kind, train, SIZE) or build_transform(kind, train, SIZE)
    return ShardDataset(sources, order, transform, 1 if kind == "xray" else 3, seed)


def by_position(stream: Iterator[Batch] | Sequence[Batch]) -> dict[int, tuple[bytes, bytes, int]]:
    """(image bytes, target bytes, key) of every position; no position twice."""
    found: dict[int, tuple[bytes, bytes, int]] = {}
    for batch in stream:
        for row, position in enumerate(batch["position"].tolist()):
            assert position not in found
            image, target = batch["image"][row].numpy(), batch["target"][row].numpy()
            found[position] = (image.tobytes(), target.tobytes(), int(batch["key"][row]))
    return found
