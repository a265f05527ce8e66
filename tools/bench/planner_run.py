"""One rank of a measurement of tools/bench/planner.py: a few real steps, the memory they take and the bytes they send.

    accelerate launch --config_file launch/zero2.yaml -m bench.planner_run cases.json OUT

Memory is the growth of this process's resident set (VmHWM of /proc/self/status) over what it was before the engine was
built. Bytes are those of the messages that went through torch.distributed, whoever sent them (DDP's reducer, FSDP2,
DeepSpeed): every collective passes PyTorch's dispatcher as an operation of the namespace c10d.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaletransfer.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    accumulation,
)
from scaletransfer.engine.assemble import make_network, make_optimizer
from scaletransfer.engine.build import build_engine
from scaletransfer.engine.checkpoint_saver import Saver
from scaletransfer.engine.rehearsal import end_group
from scaletransfer.engine.step import Batch, train_step
from scaletransfer.engine.strategy import Strategy, asked
from scaletransfer.losses import make_loss
from scaletransfer.models import initial_tensors

WARM = {"model": "BiT-tiny", "size": 32, "classes": 10, "micro": 2, "times": 1, "checkpointing": False}
STEPS = 4
"""ZeRO-3 behaves as it will from the third step on: it records the order of layers in the first."""
GATHER = ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "allgather_coalesced_")
SCATTER = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_")
REDUCE = ("allreduce_", "allreduce_coalesced_")


def configuration(case: dict[str, Any], world: int) -> PretrainConfig:
    """The configuration that a case stands for: what the planner gets, and what is run here."""
    return PretrainConfig(
        precision="fp32",
        global_batch=world * case["micro"] * case["times"],
        micro_batch=case["micro"],
        model=ModelConfig(name=case["model"], activation_checkpointing=case["checkpointing"]),
        data=DataConfig(train="nowhere", transform="natural", image_size=case["size"], nb_classes=case["classes"]),
        optimizer=OptimizerConfig(name=case.get("optimizer", "sgd_agc")),
        checkpoint=CheckpointConfig(asynchronous=case.get("saves", False)),
    )


class Messages(TorchDispatchMode):
    """Counts the bytes of each kind of collective as a ring would send them from one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name in (*GATHER, *SCATTER, *REDUCE):
            # args: outputs, inputs, group, ... (in place: the tensors, group, ...)
            names = [argument.name for argument in func._schema.arguments]
            ranks = dist.ProcessGroup.unbox(args[names.index("process_group")]).size()
            ring = (ranks - 1) / ranks
            if name in REDUCE:
                self.sent[name] += int(2 * ring * _bytes(args[0]))
            else:
                self.sent[name] += int(ring * max(_bytes(args[0]), _bytes(args[1])))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))


def status(key: str) -> int:
    """Bytes by which /proc/self/status answers to ``key``: VmRSS, or VmHWM, the highest that it was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def forget_peak() -> None:
    """From now on VmHWM counts from what is resident now (proc(5), clear_refs 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def run(strategy: Strategy, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a case takes on this rank; ``folder``: for its checkpoints, if it saves any."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    cfg = configuration(case, strategy.world)
    base = status("VmRSS")
    forget_peak()
    engine = build_engine(
        strategy,
        lambda: make_network(cfg.model, case["classes"]),
        lambda skeleton: initial_tensors(skeleton, 0),
        lambda network: make_optimizer(cfg.optimizer, network),
        precision="fp32",
        micro_batch=cfg.micro_batch,
        accumulation=accumulation(cfg, strategy.world),
    )
    born = status("VmHWM") - base
    loss, sent = make_loss("multiclass"), Messages()
    saver = Saver(engine, say=lambda _: None)
    peaks = []
    for step in range(STEPS):
        forget_peak()
        batches = [_batch(case) for _ in range(case["times"])]
        if step == STEPS - 1:
            with sent:
                train_step(engine, loss, _normalize, batches, 0.01)
        else:
            train_step(engine, loss, _normalize, batches, 0.01)
        peaks.append(status("VmHWM") - base)
        if case.get("saves") and step == 0:
            saver.save(folder, 1, {}, keep=1)  # its copy stays
            saver.wait()
    if strategy.deepspeed:
        engine.model.destroy()  # type: ignore[operator]  # its hooks would keep it for ever, beside the next case's
    return {"base": base, "born": born, "peaks": peaks, "sent": dict(sent.sent)}


def _batch(case: dict[str, Any]) -> Batch:
    images = torch.randint(0, 256, (case["micro"], 3, case["size"], case["size"]), dtype=torch.uint8)
    return {"image": images, "target": torch.randint(0, case["classes"], (case["micro"],))}


def _normalize(images: Tensor) -> Tensor:
    return images.float().sub_(127.5).div_(127.5)


def main() -> None:
    """Run the cases, write what this rank found."""
    torch.set_num_threads(1)
    cases: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    strategy = asked()
    out = Path(sys.argv[2])
    run(strategy, WARM, out)  # loads libraries and kernels
    found = {name: run(strategy, case, out / "checkpoints") for name, case in cases.items()}
    Path(out, f"rank-{strategy.rank}.json").write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main()
