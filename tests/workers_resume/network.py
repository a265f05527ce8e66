"""A small network under any engine, trained on drawn batches that depend on the step alone, saved and loaded.

It is smooth: a rectifier that rounding pushes over its kink changes later losses by more than engines differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from scaletransfer import models
from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine.build import Engine, build_engine
from scaletransfer.engine.checkpoint import Checkpoint
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import Strategy
from scaletransfer.losses import make_loss
from scaletransfer.models import initial_tensors
from scaletransfer.optim import SGD_AGC, split_head

CLASSES, GLOBAL_BATCH, SEED, RATE = 5, 24, 7, 0.05
MICRO_BATCH = 2
FACTS = {"label_names": ["a", "b", "c", "d", "e"], "samples_seen": 0}


class PreActBottleneck(models.PreActBottleneck):
    """BiT's unit with SiLU for ReLU, under its name, by which FSDP2 wraps it."""

    def _unit(self, x: Tensor) -> Tensor:
        out = F.silu(self.gn1(x))
        assert self.downsample is not None
        shortcut = self.downsample(out)
        out = self.conv2(F.silu(self.gn2(self.conv1(out))))
        return self.conv3(F.silu(self.gn3(out))) + shortcut


class Network(nn.Module):
    """[b, 1, 16, 16] -> [b, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 4, stride=4)
        self.body = nn.Sequential(PreActBottleneck(32, 128, ws_eps=1e-10))
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(0.3 * F.silu(self.body(self.stem(x))).mean((2, 3))).clone()


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    groups = split_head(network.named_parameters(), "head.weight", "head.bias", "corrected")
    return SGD_AGC(groups, lr=RATE, momentum=0.9, nesterov=True, weight_decay=1e-4, clipping=0.05)


def build(strategy: Strategy, found: Checkpoint | None, *, momentum: bool = True) -> Engine:
    """A new engine, with the values and the momentum of a checkpoint, or those that are drawn."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    def values(skeleton: nn.Module) -> Callable[[str], Tensor]:
        return initial_tensors(skeleton, SEED) if found is None else checkpoints.model_values(found)

    accumulation = GLOBAL_BATCH // MICRO_BATCH // strategy.world
    engine = build_engine(
        strategy, Network, values, make_optimizer, precision="fp32", micro_batch=MICRO_BATCH, accumulation=accumulation
    )
    if found is not None and momentum:
        checkpoints.load_momentum(engine, found)
    return engine


def train(engine: Engine, step: int) -> float:
    """Do a step (the first is 1); the loss of its global batch."""
    generator = torch.Generator().manual_seed(1000 * SEED + step)
    target = torch.randint(0, 2, (GLOBAL_BATCH, CLASSES), generator=generator).float()
    images = torch.randint(0, 100, (GLOBAL_BATCH, 1, 16, 16), generator=generator, dtype=torch.uint8)
    for label in range(CLASSES):
        images[:, :, 3 * label : 3 * label + 3] += (120 * target[:, label]).to(torch.uint8)[:, None, None, None]
    target[torch.rand(target.shape, generator=generator) < 0.3] = float("nan")
    part = GLOBAL_BATCH // engine.world
    mine = slice(engine.rank * part, (engine.rank + 1) * part)
    batches = [
        {"image": image, "target": labels}
        for image, labels in zip(images[mine].split(MICRO_BATCH), target[mine].split(MICRO_BATCH), strict=True)
    ]
    result = train_step(engine, make_loss("multilabel"), normalize, batches, RATE)
    return float(engine.sum_over_ranks(result.loss.clone()))


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def newest(root: Path) -> Checkpoint | None:
    latest = checkpoints.find_latest(root)
    return None if latest is None else checkpoints.open_checkpoint(latest)


def result_file(folder: str) -> Path:
    """Where this rank leaves what it found."""
    return Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
