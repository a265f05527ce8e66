"""A few steps of a small network of odd shapes under any engine, and every rank's pieces of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from workers.common import forget_engine

from scaletransfer.engine import pieces
from scaletransfer.engine.build import build_engine
from scaletransfer.engine.filling import Values
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import Strategy
from scaletransfer.losses import make_loss
from scaletransfer.models import PreActBottleneck, initial_value
from scaletransfer.optim import SGD_AGC, split_head
from scaletransfer.order import rank_positions

GLOBAL_BATCH, ACCUMULATION, STEPS, CLASSES = 24, 2, 4, 5
COMMON = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "corrected": {"options": {**COMMON, "clipping": 0.002}, "exempt": "corrected"},
    "paper": {"options": {**COMMON, "clipping": 0.002}, "exempt": "paper"},
    "nesterov": {"options": {**COMMON, "nesterov": True, "clipping": 0.004, "eps": 0.5}, "exempt": "corrected"},
    "no momentum": {"options": {"lr": 0.5, "clipping": 0.002}, "exempt": "corrected"},
    "unused": {"options": {"lr": 0.5, "momentum": 0.9, "clipping": 0.002}, "exempt": "corrected", "unused": True},
}


class Small(nn.Module):
    """[b, 3, 8, 8] -> [b, CLASSES]. Parameters of one to five dimensions, of one row, and with rows of odd length."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.unit = PreActBottleneck(32, 128, ws_eps=1e-10)
        self.row = nn.Parameter(torch.empty(1, 37))
        self.cube = nn.Parameter(torch.empty(5, 3, 7))
        self.hyper = nn.Parameter(torch.empty(3, 2, 3, 1, 7))
        self.one = nn.Parameter(torch.empty(1))
        self.zero = nn.Parameter(torch.empty(128))
        self.conv = nn.Module()
        self.conv.head = nn.Linear(128, CLASSES)
        self.unused = nn.Parameter(torch.empty(4, 3)) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.unit(self.stem(x)).mean((2, 3)) + self.zero
        gain = (
            self.row.square().mean()
            + self.cube.sin().sum() * 0.1
            + self.hyper.flatten(1).sum(1).tanh().sum()
            + self.one
        )
        return self.conv.head(hidden * gain).clone()


def values(module: nn.Module) -> Values:
    """Drawn by name; `zero` is zeros, so that its gradient is clipped by eps alone."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    ones = {name for name in shapes if ".gn" in name and name.endswith("weight")}

    def value(name: str) -> Tensor:
        kind = "ones" if name in ones else "zeros" if name == "zero" else "uniform"
        return initial_value(name, shapes[name], kind, 0, fan_in=None if len(shapes[name]) > 1 else 9)

    return value


def micro_batches(step: int, rank: int, world: int) -> list[dict[str, Tensor]]:
    """This rank's share of the step's global batch, which does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
    target = torch.randint(0, 2, (GLOBAL_BATCH, CLASSES), generator=generator).float()
    target[torch.rand(target.shape, generator=generator) < 0.3] = float("nan")
    where = rank_positions(0, rank, world, GLOBAL_BATCH // world // ACCUMULATION, GLOBAL_BATCH)
    return [{"image": images[rows], "target": target[rows]} for rows in where]


def train(strategy: Strategy, case: dict[str, Any]) -> dict[str, Any]:
    """STEPS steps: loss, gradient norm and share of clipped units of each, then values and momentum by piece."""
    forget_engine()

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        groups = split_head(module.named_parameters(), "conv.head.weight", "conv.head.bias", case["exempt"])
        return SGD_AGC(groups, **case["options"])

    engine = build_engine(
        strategy,
        lambda: Small(case.get("unused", False)),
        values,
        optimizer,
        precision="fp32",
        micro_batch=GLOBAL_BATCH // strategy.world // ACCUMULATION,
        accumulation=ACCUMULATION,
    )
    loss, found = make_loss("multilabel"), {"loss": [], "norm": [], "clipped": []}
    for step in range(STEPS):
        batches = micro_batches(step, strategy.rank, strategy.world)
        result = train_step(engine, loss, lambda images: images, batches, case["options"]["lr"])
        found["loss"].append(float(engine.sum_over_ranks(result.loss.clone())))
        found["norm"].append(float(result.square_norm) ** 0.5)
        found["clipped"].append(float(result.clipped))
    held = []
    for piece in engine.pieces:
        momentum = pieces.momentum_of(engine.optimizer, piece)
        held.append(
            {
                "name": piece.name,
                "shape": piece.shape,
                "start": piece.start,
                "stop": piece.stop,
                "values": piece.value().tolist(),
                "momentum": None if momentum is None else momentum.tolist(),
            }
        )
    return {"steps": found, "pieces": held}
