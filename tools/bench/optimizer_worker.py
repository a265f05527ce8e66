"""One rank of `tools/bench/optimizer.py --engine`: steps of the engine's own optimizer, next to its shard's floor.

python optimizer_worker.py SPEC.json       under accelerate launch; writes rank-N.json beside SPEC.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.optimizer import FLOOR, OURS, floor
from scaletransfer.config import ModelConfig, OptimizerConfig
from scaletransfer.engine.assemble import make_network, make_optimizer
from scaletransfer.engine.build import build_engine
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.step import train_step
from scaletransfer.engine.strategy import asked
from scaletransfer.losses import make_loss


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train on one black image of 32 pixels a rank; seconds of each optimizer step and of the floor after it."""
    torch.set_num_threads(spec["threads"])
    strategy = asked(cuda=torch.cuda.is_available())
    model = ModelConfig(name=spec["model"], activation_checkpointing=True)
    generator = torch.Generator().manual_seed(0)
    engine = build_engine(
        strategy,
        lambda: make_network(model, spec["classes"]),
        # values do not matter here, and published ones take a minute to draw
        lambda skeleton: (
            lambda name: torch.empty(skeleton.state_dict()[name].shape).normal_(generator=generator) * 0.02
        ),
        lambda network: make_optimizer(OptimizerConfig(), network),
        precision="fp32",
        micro_batch=1,
        accumulation=1,
    )
    elements = sum(len(piece) for piece in engine.pieces)
    copy, step, spent = floor(elements), engine.optimizer.step, [0.0]

    def timed(*args: Any, **options: Any) -> Any:
        # ranks come here at different moments; the clock is to show the work, not the waiting
        torch.distributed.barrier(engine.shards)
        began = time.perf_counter()
        done = step(*args, **options)
        spent[0] += time.perf_counter() - began
        return done

    engine.optimizer.step = timed  # type: ignore[method-assign]
    image, target = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    seconds: dict[str, list[float]] = {FLOOR: [], OURS: []}
    for number in range(spec["rounds"] + 1):
        spent[0] = 0.0
        train_step(engine, make_loss("multiclass"), torch.Tensor.float, [{"image": image, "target": target}], 1e-3)
        engine.barrier()
        began = time.perf_counter()
        copy()
        if number:
            seconds[FLOOR].append(time.perf_counter() - began)
            seconds[OURS].append(spent[0])
    return {"elements": elements, "tensors": len(engine.pieces), "seconds": seconds}


if __name__ == "__main__":
    case = Path(sys.argv[1])
    found = measure(json.loads(case.read_text()))
    case.with_name(f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    end_group()
