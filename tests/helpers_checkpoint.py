"""A small network under the single engine, trained and saved in milliseconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from scaletransfer.engine.build import Engine, build_engine
from scaletransfer.engine.checkpoint_saver import save
from scaletransfer.engine.strategy import asked
from scaletransfer.models import initial_tensors

FACTS = {"samples_seen": 48, "label_names": ["a", "b", "c"]}


class Net(nn.Module):
    """A little of everything: 4-D, 2-D and 1-D parameters, and a buffer that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(images)).mean((2, 3)))


def make(source=None, momentum: float = 0.9) -> Engine:
    return build_engine(
        asked(env={}, cuda=False),
        Net,
        source or (lambda skeleton: initial_tensors(skeleton, 1)),
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum),
        precision="fp32",
        micro_batch=4,
        accumulation=1,
    )


def train(engine: Engine, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = engine.model(images).square().mean()
        engine.optimizer.zero_grad()
        loss.backward()
        engine.optimizer.step()
        losses.append(loss.item())
    return losses


def listing(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def save_3_and_6(root: Path) -> Path:
    """A run below `root` with checkpoints of steps 3 and 6."""
    engine = make()
    for step in (3, 6):
        train(engine, 3, step - 3)
        save(engine, root, step, FACTS, keep=5)
    return root
