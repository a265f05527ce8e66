"""Twenty steps of a small network on masked multi-label data under any engine, sound or with one planted fault.

The network is smooth: a rectifier that rounding pushes over its kink changes later losses by up to 1e-2, on one engine
alone, and a test that forgives that would forgive faults too.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workers.common import forget_engine

from scaletransfer import models
from scaletransfer.engine import step as step_module
from scaletransfer.engine.build import Engine, build_engine
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import Strategy
from scaletransfer.losses import make_loss
from scaletransfer.models import initial_tensors
from scaletransfer.optim import SGD_AGC, split_head
from scaletransfer.order import Order, rank_positions

SAMPLES, CLASSES, GLOBAL_BATCH, ACCUMULATION, STEPS, SEED = 64, 5, 16, 2, 20, 7
BLANK = (0, 1, 1)
"""(step, micro-batch, rank of two) whose samples have no known label at all."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
    "sgd_agc": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "clipping": 0.02},
}
FAULTS = ("accumulation", "data", "initialisation")
FAULTY = ("ddp", "fsdp2", "zero2")
"""The engines under which the faults are planted; DeepSpeed's clipping under every ZeRO stage."""


def cases(engine: str) -> dict[str, dict[str, Any]]:
    """The sound runs, and for engines of several processes the faulty ones."""
    found: dict[str, dict[str, Any]] = {name: {"optimizer": name, "fault": None} for name in OPTIMIZERS}
    if engine in FAULTY:
        found |= {fault: {"optimizer": "sgd", "fault": fault} for fault in FAULTS}
    if engine.startswith("zero"):
        found["clipping"] = {"optimizer": "sgd", "fault": "clipping"}
    return found


class PreActBottleneck(models.PreActBottleneck):
    """BiT's unit with SiLU for ReLU, under its name, by which FSDP2 wraps it."""

    def _unit(self, x: Tensor) -> Tensor:
        out = F.silu(self.gn1(x))
        assert self.downsample is not None
        shortcut = self.downsample(out)
        out = self.conv2(F.silu(self.gn2(self.conv1(out))))
        return self.conv3(F.silu(self.gn3(out))) + shortcut


class Network(nn.Module):
    """[b, 1, 32, 32] -> [b, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 4, stride=4)
        self.body = nn.Sequential(
            PreActBottleneck(32, 128, ws_eps=1e-10),
            PreActBottleneck(128, 256, stride=2, ws_eps=1e-10),
        )
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(0.3 * F.silu(self.body(self.stem(x))).mean((2, 3))).clone()


def order() -> Order:
    return Order(shards=((SAMPLES,),), weights=(None,), seed=SEED, global_batch=GLOBAL_BATCH)


def data() -> tuple[Tensor, Tensor]:
    """uint8 images [SAMPLES, 1, 32, 32] in which label k brightens its own stripe, and targets with a third unknown."""
    generator = torch.Generator().manual_seed(SEED)
    target = torch.randint(0, 2, (SAMPLES, CLASSES), generator=generator).float()
    images = torch.randint(0, 100, (SAMPLES, 1, 32, 32), generator=generator, dtype=torch.uint8)
    for label in range(CLASSES):
        images[:, :, 6 * label : 6 * label + 6] += (120 * target[:, label]).to(torch.uint8)[:, None, None, None]
    target[torch.rand(target.shape, generator=generator) < 0.33] = float("nan")
    step, number, rank = BLANK
    _, rows = order().locate(rank_positions(step, rank, 2, 4, GLOBAL_BATCH)[number])
    target[torch.from_numpy(rows)] = float("nan")
    return images, target


def normalize(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@contextmanager
def planted(fault: str | None) -> Any:
    """Makes the engine's step wrong: the loss is not scaled for accumulation."""
    with ExitStack() as stack:
        if fault == "accumulation":
            right = step_module._backward

            def unscaled(engine: Engine, loss: Tensor) -> None:
                right(engine, loss / engine.accumulation)

            stack.enter_context(mock.patch.object(step_module, "_backward", unscaled))
        yield


def make_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), **OPTIMIZERS[name])
    groups = split_head(network.named_parameters(), "head.weight", "head.bias", "corrected")
    return SGD_AGC(groups, **OPTIMIZERS[name])


def train(strategy: Strategy, case: dict[str, Any]) -> dict[str, Any]:
    """The global loss of every step, the shares of clipped units, and how many labels this rank knew by micro-batch."""
    forget_engine()
    fault = case["fault"]
    micro = GLOBAL_BATCH // ACCUMULATION // strategy.world
    engine = build_engine(
        strategy,
        Network,
        lambda skeleton: initial_tensors(skeleton, SEED + (fault == "initialisation")),
        lambda network: make_optimizer(network, case["optimizer"]),
        precision="fp32",
        micro_batch=micro,
        accumulation=ACCUMULATION,
    )
    if fault == "clipping":
        engine.zero.clip_grad = 1.0
    images, target = data()
    loss, losses, clipped, norms, known = make_loss("multilabel"), [], [], [], []
    reader = 0 if fault == "data" else strategy.rank
    with planted(fault):
        for step in range(STEPS):
            where = rank_positions(step, reader, strategy.world, micro, GLOBAL_BATCH)
            rows = [torch.from_numpy(order().locate(positions)[1]) for positions in where]
            batches = [{"image": images[chosen], "target": target[chosen]} for chosen in rows]
            known.append([int(np.isfinite(batch["target"].numpy()).sum()) for batch in batches])
            result = train_step(engine, loss, normalize, batches, OPTIMIZERS[case["optimizer"]]["lr"])
            losses.append(float(engine.sum_over_ranks(result.loss.clone())))
            clipped.append(float(result.clipped))
            norms.append(float(result.square_norm) ** 0.5)
    return {"loss": losses, "clipped": clipped, "norm": norms, "known": known}
