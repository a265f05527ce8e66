"""Validation on all ranks: every image counts once, and the numbers do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from scaletransfer.losses import Loss
from scaletransfer.metrics import multiclass_report, multilabel_report

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

    All ranks must call this with the same number of equal batches (``loader.EvalSampler``).
    """
    training = engine.model.training
    engine.average_buffers()
    engine.model.eval()
    logits, targets, positions = [], [], []
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
    plain = replace(loss, class_weights=None)  # weights are for training: a validation loss counts images alike
    total, count = plain(torch.from_numpy(predicted["logits"]).double(), torch.from_numpy(predicted["target"]))
    found["loss"] = float(total) / max(1, int(count))
    return found


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
    per_class = {"AUC_class": "auroc", "average_precision_class": "average_precision"}
    per_class |= {name: name for name in ("precision", "recall", "f1")}
    for number, label in enumerate(names[:TAGGED_CLASSES]):
        tags |= {f"test/{tag}_{number}": found["classes"][label][key] for tag, key in per_class.items()}
    return tags
