"""One rank of `tools/bench/memory.py`: builds an engine, trains some steps on noise, says what memory that took.

python memory_worker.py SPEC.json       under accelerate launch; writes rank-N.json beside SPEC.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scaletransfer.config import ModelConfig, OptimizerConfig
from scaletransfer.engine import verify
from scaletransfer.engine.assemble import make_network, make_optimizer
from scaletransfer.engine.build import build_engine
from scaletransfer.engine.holdings import expected_bytes, measured_parameters
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import asked
from scaletransfer.losses import make_loss
from scaletransfer.models import initial_tensors


def resident(what: str) -> int:
    """Bytes of this process that are in memory: now (VmRSS) or at most since `forget_peak` (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {what}: this measurement needs Linux")


def forget_peak() -> int:
    """Start a new peak; what is resident now. See https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html"""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Build and train as `spec` says; bytes of each phase on this rank."""
    torch.set_num_threads(spec["threads"])
    strategy = asked(cuda=torch.cuda.is_available())
    model = ModelConfig(name=spec["model"], activation_checkpointing=spec["checkpointing"])
    loss = make_loss("multiclass")
    if strategy.deepspeed:
        import deepspeed  # noqa: F401 (0.3 GB of libraries that are no part of the model)
        import transformers  # noqa: F401
    base = forget_peak()
    engine = build_engine(
        strategy,
        lambda: make_network(model, spec["classes"]),
        lambda skeleton: initial_tensors(skeleton, 0),
        lambda network: make_optimizer(OptimizerConfig(name=spec["optimizer"]), network),
        precision="fp32",
        micro_batch=spec["micro_batch"],
        accumulation=1,
    )
    found: dict[str, Any] = {"base": base, "birth_peak": resident("VmHWM"), "born": resident("VmRSS")}
    found["born_parameters"] = measured_parameters(engine)
    generator = torch.Generator().manual_seed(strategy.rank)
    steps = []
    for number in range(spec["steps"]):
        batch, side = spec["micro_batch"], spec["size"]
        image = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
        target = torch.randint(0, spec["classes"], (batch,), generator=generator)
        first = verify.FirstStep(engine, momentum=True) if number == 0 else None
        forget_peak()
        began = time.monotonic()
        result = train_step(
            engine,
            loss,
            lambda images: images.float() / 127.5 - 1,
            [{"image": image, "target": target}],
            0.01,
            first.after_backward if first else None,
        )
        value = float(engine.sum_over_ranks(result.loss))
        steps.append({"peak": resident("VmHWM"), "seconds": time.monotonic() - began, "loss": value})
        if first:
            first.after_step()
            found["held"] = vars(first.measured)
            found["expected"] = vars(expected_bytes(engine, momentum=True))
    found["steps"] = steps
    found["parameters"] = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    blocks: dict[str, int] = {}
    for name, whole in engine.shapes.items():
        unit = ".".join(name.split(".")[:3]) if name.startswith("body.") else name.rsplit(".", 1)[0]
        blocks[unit] = blocks.get(unit, 0) + 4 * torch.Size(whole).numel()
    found["largest_block"] = max(blocks.values())
    return found


if __name__ == "__main__":
    case = Path(sys.argv[1])
    measured = measure(json.loads(case.read_text()))
    case.with_name(f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(measured))
    end_group()
