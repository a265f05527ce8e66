"""The runs that `parity.py` compares: twenty steps of a small network under any engine, looping over everything else.

`python -m bench.parity_worker spec.json`, under `accelerate launch`; the tests run single cases of it. The network is
smooth: a rectifier that rounding pushes over its kink changes later losses by up to 1e-2, on one engine alone, and a
comparison that forgives that would forgive faults too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scaletransfer import models
from scaletransfer.engine.build import Engine, build_engine
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import Strategy, asked
from scaletransfer.losses import make_loss
from scaletransfer.models import initial_tensors
from scaletransfer.optim import SGD_AGC, split_head
from scaletransfer.order import Order, rank_positions

SAMPLES, CLASSES, GLOBAL_BATCH, STEPS, SEED = 72, 5, 24, 20, 7
"""24 is divided by one to four ranks and two micro-batches."""
BLANK = range(12)
"""Positions whose samples have no known label at all: those of half the ranks in the first step, or of the first."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
    "sgd_agc": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "clipping": 0.02},
}
TASKS = ("multilabel", "multiclass")
FLOAT64 = ("single", "ddp", "fsdp2", "hsdp")
"""The engines that can train in float64."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run, but for engine and ranks."""

    optimizer: str
    task: str
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """Unique; also the name of the file in which a reference's weights lie."""
        more = f"x{self.accumulation}{'-checkpointing' if self.checkpointing else ''}"
        return f"{self.optimizer}-{self.task}-{more}-{self.precision}"

    def base(self, precision: str) -> Case:
        """The run in a single process that this one is compared with."""
        return Case(optimizer=self.optimizer, task=self.task, precision=precision)


def precisions(engine: str) -> tuple[str, ...]:
    """The precisions in which an engine is compared."""
    return ("fp32", "fp64") if engine in FLOAT64 else ("fp32",)


def all_cases(engine: str) -> list[Case]:
    """Everything that one launch loops over."""
    cases = (
        Case(
            optimizer=optimizer, task=task, accumulation=accumulation, checkpointing=checkpointing, precision=precision
        )
        for accumulation, checkpointing, precision, optimizer, task in product(
            (1, 2), (False, True), precisions(engine), OPTIMIZERS, TASKS
        )
    )
    return sorted(cases, key=_turn)


def _turn(case: Case) -> tuple[bool, bool]:
    """What others are compared with comes first."""
    return case != case.base(case.precision), case.precision != "fp64"


_PAIRS = (
    ("sgd", "multilabel", 1, False),
    ("sgd", "multiclass", 2, True),
    ("sgd_agc", "multilabel", 2, True),
    ("sgd_agc", "multiclass", 1, True),
    ("sgd_agc", "multiclass", 2, False),
)


def pairwise_cases(engine: str) -> list[Case]:
    """Few cases, in which every two values of two settings meet; for a single process the references too."""
    pairs = [
        Case(
            optimizer=optimizer, task=task, accumulation=accumulation, checkpointing=checkpointing, precision=precision
        )
        for precision in precisions(engine)
        for optimizer, task, accumulation, checkpointing in _PAIRS
    ]
    if engine != "single":
        return pairs
    bases = [case for case in all_cases("single") if case == case.base(case.precision)]
    return sorted({*bases, *pairs}, key=lambda case: (*_turn(case), case.name))


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

    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 4, stride=4)
        units = [PreActBottleneck(32, 128, ws_eps=1e-10), PreActBottleneck(128, 256, stride=2, ws_eps=1e-10)]
        for unit in units:
            unit.checkpointing = checkpointing
        self.body = nn.Sequential(*units)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images."""
        out: Tensor = self.head(0.3 * F.silu(self.body(self.stem(x))).mean((2, 3)))
        return out.clone()


def order() -> Order:
    """Which sample is where, whatever the engine."""
    return Order(shards=((SAMPLES,),), weights=(None,), seed=SEED, global_batch=GLOBAL_BATCH)


def data(task: str) -> tuple[Tensor, Tensor]:
    """uint8 images [SAMPLES, 1, 32, 32] in which label k brightens its own stripe, and targets.

    Multi-label: a third unknown, and all of those in BLANK. Multi-class: the first label that is set, or the last.
    """
    generator = torch.Generator().manual_seed(SEED)
    target = torch.randint(0, 2, (SAMPLES, CLASSES), generator=generator).float()
    images = torch.randint(0, 100, (SAMPLES, 1, 32, 32), generator=generator, dtype=torch.uint8)
    for label in range(CLASSES):
        images[:, :, 6 * label : 6 * label + 6] += (120 * target[:, label]).to(torch.uint8)[:, None, None, None]
    if task == "multiclass":
        target[:, -1] = 1
        return images, target.argmax(dim=1)
    target[torch.rand(target.shape, generator=generator) < 0.33] = float("nan")
    _, rows = order().locate(np.array(BLANK))
    target[torch.from_numpy(rows)] = float("nan")
    return images, target


def make_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    """The case's optimizer."""
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), **OPTIMIZERS[name])
    groups = split_head(network.named_parameters(), "head.weight", "head.bias", "corrected")
    return SGD_AGC(groups, **OPTIMIZERS[name])


def train(strategy: Strategy, case: Case, references: Path) -> dict[str, Any]:
    """One run: what was seen in each step, and how far the weights are from those of a single process.

    Returns: "loss" of the global batch, share of units "clipped", gradient "norm", labels "known" to this rank by
    micro-batch, all by step; "weights": by the precision of the reference, the norm of the difference over the norm.
    A single process writes its own weights to ``references`` if it is one.
    """
    micro = GLOBAL_BATCH // case.accumulation // strategy.world
    engine = build_engine(
        strategy,
        lambda: Network(case.checkpointing),
        lambda skeleton: initial_tensors(skeleton, SEED),
        lambda network: make_optimizer(network, case.optimizer),
        precision=case.precision,
        micro_batch=micro,
        accumulation=case.accumulation,
    )
    images, target = data(case.task)
    loss, dtype = make_loss(case.task), engine.master_dtype  # type: ignore[arg-type]
    found: dict[str, Any] = {"loss": [], "clipped": [], "norm": [], "known": []}
    for step in range(STEPS):
        where = rank_positions(step, strategy.rank, strategy.world, micro, GLOBAL_BATCH)
        rows = [torch.from_numpy(order().locate(positions)[1]) for positions in where]
        batches = [{"image": images[chosen], "target": target[chosen]} for chosen in rows]
        found["known"].append([int(loss.count(batch["target"])) for batch in batches])
        lr = OPTIMIZERS[case.optimizer]["lr"]
        result = train_step(engine, loss, lambda raw: raw.to(dtype) / 127.5 - 1, batches, lr)
        found["loss"].append(float(engine.sum_over_ranks(result.loss.clone())))
        found["clipped"].append(float(result.clipped))
        found["norm"].append(float(result.square_norm) ** 0.5)
    if strategy.engine == "single" and case == case.base(case.precision):
        weights = {piece.name: piece.value().clone() for piece in engine.pieces}
        save_file(weights, references / f"{case.name}.safetensors")
    found["weights"] = {}
    for precision in ("fp32", "fp64"):
        file = references / f"{case.base(precision).name}.safetensors"
        if file.exists():
            found["weights"][precision] = distance(engine, load_file(file))
    return found


def distance(engine: Engine, reference: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all weights to those of the reference, over the reference's norm."""
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for piece in engine.pieces:
        wanted = reference[piece.name][piece.start : piece.stop].double()
        sums += torch.stack([(piece.value().cpu().double() - wanted).square().sum(), wanted.square().sum()])
    difference, whole = engine.sum_over_shards(sums).tolist()
    return float((difference / whole) ** 0.5)


def forget_engine() -> None:
    """Forget accelerate's process-wide state, so that the next engine of this process starts afresh."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(strategy: Strategy, cases: Sequence[Case], references: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All cases one after the other, by name."""
    found = {}
    for case in cases:
        forget_engine()
        found[case.name] = train(strategy, case, references)
        say(f"{case.name}: last loss {found[case.name]['loss'][-1]:.6f}")
    return found


def main() -> None:
    """Reads `references` and `folder` from the file named on the command line; writes `folder`/rank-N.json."""
    torch.set_num_threads(1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    strategy = asked()
    found = run(strategy, all_cases(strategy.engine), Path(spec["references"]), lambda text: print(text, flush=True))
    (Path(spec["folder"]) / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main()
