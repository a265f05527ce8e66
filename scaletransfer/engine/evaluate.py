"""Validation on all ranks: every image counts once, and the numbers do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from scaletransfer.engine.average import WeightAverage
from scaletransfer.losses import Loss
from scaletransfer.metrics import chexpert_five, multiclass_report, multilabel_report
from scaletransfer.models.folding import folded

Batch = dict[str, Tensor]
TAGGED_CLASSES = 200
"""Classes up to which TensorBoard gets five numbers a class; metrics.jsonl has them for any number."""


class Runner(Protocol):
    """What prediction needs: an ``Engine``, or an ``Inference`` that trains nothing."""

    @property
    def world(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def whole(self) -> bool: ...
    @property
    def average(self) -> WeightAverage | None: ...
    def forward(self, images: Tensor) -> Tensor: ...
    def average_buffers(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A finished network on every rank, in fp32 or under bf16 autocast."""

    module: nn.Module
    device: torch.device
    precision: str
    world: int
    rank: int

    @property
    def model(self) -> nn.Module:
        return self.module

    @property
    def whole(self) -> bool:
        return True

    @property
    def average(self) -> None:
        return None

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, classes] of normalised float images [b, c, H, W]."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(images)

    def average_buffers(self) -> None:
        """Every rank has the same file's."""


def gather_rows(engine: Runner, rows: Tensor) -> Tensor:
    """[n, ...] of equal shape on every rank -> [world * n, ...] on the CPU."""
    if engine.world == 1:
        return rows.cpu()
    rows = rows.to(engine.device).contiguous()
    parts = [torch.empty_like(rows) for _ in range(engine.world)]
    dist.all_gather(parts, rows)
    return torch.cat(parts).cpu()


@torch.no_grad()
def predict(
    engine: Runner, normalize: Callable[[Tensor], Tensor], batches: Iterable[Batch], *, progress: bool = False
) -> dict[str, np.ndarray]:
    """Logits float32 [n, L], targets and positions of all samples over all ranks, in order of position.

    Of the running mean of the weights, where one is kept; with weights that are standardised once, not in each forward.
    All ranks must call this with the same number of equal batches (``loader.EvalSampler``).
    """
    training = engine.model.training
    engine.average_buffers()
    engine.model.eval()
    logits, targets, positions = [], [], []
    with ExitStack() as stack:
        if engine.average is not None:
            stack.enter_context(engine.average.in_place())
        if engine.whole:
            stack.enter_context(folded(engine.module))
        for batch in tqdm(batches, unit="batch", disable=not progress):
            images = normalize(batch["image"].to(engine.device, non_blocking=True))
            logits.append(engine.forward(images).float())
            targets.append(batch["target"])
            positions.append(batch["position"])
    engine.model.train(training)
    where = gather_rows(engine, torch.cat(positions)).numpy()
    _, first = np.unique(where, return_index=True)  # what fills up the last batch repeats a sample
    return {
        "logits": gather_rows(engine, torch.cat(logits)).numpy()[first],
        "target": gather_rows(engine, torch.cat(targets)).numpy()[first],
        "position": where[first],
    }


def report(loss: Loss, predicted: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """Loss (float64) and metrics of ``predict``'s result. Every rank may call it; nothing is communicated.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    make = multilabel_report if loss.task == "multilabel" else multiclass_report
    found = make(predicted["logits"], predicted["target"], names)
    # weights and smoothing are for training: a validation loss counts images alike
    plain = replace(loss, class_weights=None, label_smoothing=0.0)
    total, count = plain(torch.from_numpy(predicted["logits"]).double(), torch.from_numpy(predicted["target"]))
    found["loss"] = float(total) / max(1, int(count))
    if loss.task == "multilabel" and (five := chexpert_five(found)) is not None:
        found["chexpert_five"] = five
    return found


def by_source(
    loss: Loss, predicted: dict[str, np.ndarray], names: Sequence[str], source: np.ndarray, titles: Sequence[str]
) -> dict[str, Any]:
    """``report`` of each source of a merged set alone: its title -> the report without its classes.

    source: int64 [n], which source each of ``predict``'s samples is of; {} where there is one source only.
    """
    found: dict[str, Any] = {}
    for number, title in enumerate(titles if len(titles) > 1 else ()):
        mine = source == number
        if mine.any():
            one = report(loss, {key: values[mine] for key, values in predicted.items()}, names)
            found[title] = {key: value for key, value in one.items() if key != "classes"}
    return found


def titles_of(names: Sequence[str]) -> list[str]:
    """Names of sources, numbered where one comes more than once."""
    return [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def score(task: str, found: dict[str, Any]) -> tuple[str, float | None]:
    """Name and value of the number by which the best model is chosen: larger is better."""
    name = "mean_auroc" if task == "multilabel" else "accuracy"
    return name, found[name]


def curves(found: dict[str, Any], names: Sequence[str]) -> dict[str, float | None]:
    """The points that TensorBoard gets of ``report``'s result, by their published names."""
    tags = {f"test/{key}": found[key] for key in found if key.startswith("mean_") and key != "mean_classes"}
    renamed = {"test/mean_auroc": "test/mean_auc"}
    tags = {renamed.get(tag, tag): number for tag, number in tags.items()}
    tags |= {"test/loss": found["loss"], "test/acc": found["accuracy"]}
    if "chexpert_five" in found:
        tags["test/mean_auc_chexpert_five"] = found["chexpert_five"]["mean_auroc"]
    for title, one in found.get("sources", {}).items():
        tags |= {f"test/{title}/loss": one["loss"], f"test/{title}/mean_auc": one["mean_auroc"]}
    per_class = {"AUC_class": "auroc", "average_precision_class": "average_precision"}
    per_class |= {name: name for name in ("precision", "recall", "f1")}
    for number, label in enumerate(names[:TAGGED_CLASSES]):
        tags |= {f"test/{tag}_{number}": found["classes"][label][key] for tag, key in per_class.items()}
    return tags
