"""The known silent failures of the engines, sprung one by one in the real `scaletransfer.pretrain`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.utils
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import nn
from workers.common import forget_engine, work

from scaletransfer import cli, pretrain
from scaletransfer.engine import assemble, build, step, trainer
from scaletransfer.engine.build import Engine
from scaletransfer.engine.guard import Guard
from scaletransfer.models import create_model
from scaletransfer.optim import SGD_AGC

Patch = Callable[..., Any]
"""Replaces an attribute of an object until the case is over."""


class Unguarded(Guard):
    """Ends no process, so that one launch serves all traps, and joins no group: a trap may be in how that is done."""

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["PreActBottleneck"],
        cpu_ram_efficient_loading=False,
    )


def accelerator(patch: Patch, make: Callable[[], Accelerator]) -> None:
    """A process set up as one would naively do it, without the rehearsal."""
    patch(build, "make_accelerator", lambda strategy: make())


def after_build(patch: Patch, change: Callable[[Engine], None]) -> None:
    """Something happens to the finished engine before it is verified."""
    right = build.build_engine

    def faulty(*args: Any, **kwargs: Any) -> Engine:
        engine = right(*args, **kwargs)
        change(engine)
        return engine

    patch(assemble, "build_engine", faulty)


def swap_for_ddp(engine: Engine) -> None:
    engine.model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))


def swap_for_bare(engine: Engine) -> None:
    engine.model = engine.module


def swap_optimizer(engine: Engine) -> None:
    engine.optimizer = torch.optim.Adam(engine.module.parameters())


def scale_gradients(engine: Engine) -> None:
    """A hook that somebody registered: what the optimizer is given is no longer what backward made."""

    def halve(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(0.5)

    engine.optimizer.register_step_pre_hook(halve)


def spare_layer(patch: Patch) -> None:
    """A layer that the forward never uses: elsewhere it stays as it is, ZeRO would let it decay."""
    right = assemble.make_network

    def faulty(*args: Any) -> nn.Module:
        network = right(*args)
        network.spare = nn.Linear(3, 2)
        return network

    patch(assemble, "make_network", faulty)


def half_masters(patch: Patch) -> None:
    right = assemble.make_network
    patch(assemble, "make_network", lambda *args: right(*args).to(torch.bfloat16))


def reduce_in_half(patch: Patch) -> None:
    import torch.distributed.fsdp as fsdp

    right = fsdp.MixedPrecisionPolicy
    patch(fsdp, "MixedPrecisionPolicy", lambda **options: right(**{**options, "reduce_dtype": torch.bfloat16}))


def another_class(patch: Patch) -> None:
    patch(assemble, "make_optimizer", lambda cfg, network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))


def rank0_reads_for_all(patch: Patch) -> None:
    """Trap 3: every rank believes that it is rank 0 where the data is read."""
    right = trainer.StepSampler
    patch(trainer, "StepSampler", lambda start, stop, rank, *rest: right(start, stop, 0, *rest))


def rank0_reads_and_deals_out(patch: Patch) -> None:
    """Trap 12: what accelerate's DataLoaderDispatcher does with a prepared stream, in which each rank has its share."""
    right = trainer.make_loader

    def dispatched(*args: Any) -> Any:
        stream, rank = iter(right(*args)), dist.get_rank()
        dealt: list[Any] = [None] * dist.get_world_size()
        while True:
            if rank == 0:
                for number in range(len(dealt)):
                    dealt[number] = next(stream, dealt[number - 1])  # a short run ends early
            dist.broadcast_object_list(dealt, src=0)
            yield dealt[rank]

    patch(trainer, "make_loader", dispatched)


def deepspeed_settings(
    patch: Patch, change: Callable[[dict[str, Any]], Any], environment: dict[str, str] | None = None
) -> None:
    """Other settings for DeepSpeed, under what the launcher may have exported for what somebody wrote in its file."""
    right = build.deepspeed_settings

    def faulty(*args: Any) -> dict[str, Any]:
        settings = right(*args)
        change(settings)
        return settings

    patch(build, "deepspeed_settings", faulty)
    if environment is not None:
        patch(os, "environ", os.environ | environment)  # accelerate looks names up in it


def unset_clipping(patch: Patch, launch_file_says: str | None) -> None:
    """Trap 4: accelerate clips to 1.0 unless it is told not to, and drops 0.0 of a launch file because it is falsy."""
    exported = {} if launch_file_says is None else {"ACCELERATE_GRADIENT_CLIPPING": launch_file_says}
    deepspeed_settings(patch, lambda s: s.pop("gradient_clipping"), exported)


def cpu_adam(patch: Patch) -> None:
    """Trap 4: with offload accelerate puts DeepSpeedCPUAdam in the place of any optimizer, unless it is told not to."""
    from deepspeed.ops.adam import cpu_adam as module

    # Its kernel is compiled for a minute; nothing steps here.
    patch(module, "CPUAdamBuilder", mock.MagicMock())
    deepspeed_settings(patch, lambda s: s.pop("zero_force_ds_cpu_optimizer"))


def nothing_offloaded(patch: Patch) -> None:
    none = {"device": "none"}
    deepspeed_settings(patch, lambda s: s["zero_optimization"].update(offload_param=none, offload_optimizer=none))


def backward_steps(patch: Patch) -> None:
    """Trap 5: accelerate's backward steps DeepSpeed's engine as well."""
    right = step._backward

    def faulty(engine: Engine, loss: torch.Tensor) -> None:
        if engine.model.is_gradient_accumulation_boundary():
            engine.accelerator.backward(loss)
        else:
            right(engine, loss)

    patch(step, "_backward", faulty)


def no_layout(patch: Patch) -> None:
    """Trap 6: an optimizer that looks at shapes is given flat partitions or shards."""
    patch(SGD_AGC, "set_layout", lambda self, layout, group, device: setattr(self, "_group", group))


def sums_of_one_rank(patch: Patch) -> None:
    """Trap 7: units that lie on several ranks are told by each rank's own part."""
    right = SGD_AGC.set_layout
    patch(SGD_AGC, "set_layout", lambda self, layout, group, device: right(self, layout, None, device))


def optimizer_before_sharding(patch: Patch) -> None:
    """Trap 13: sharding replaces the parameters, so an optimizer that was made before steps what nobody uses."""
    right = assemble.make_optimizer

    def faulty(cfg: Any, network: nn.Module) -> torch.optim.Optimizer:
        return right(cfg, create_model("BiT-tiny", 13))

    patch(assemble, "make_optimizer", faulty)


def far_from_zero(patch: Patch) -> None:
    """Trap 9: weights are rounded to bf16 before they are standardised, and one filter's mean is 30 deviations."""
    right = assemble.initial_tensors

    def faulty(skeleton: nn.Module, seed: int) -> Callable[[str], torch.Tensor]:
        values = right(skeleton, seed)

        def moved(name: str) -> torch.Tensor:
            found = values(name)
            if name == "body.block2.unit01.conv2.weight":
                found[5] += 30 * found[5].std()
            return found

        return moved

    patch(assemble, "initial_tensors", faulty)


def mesh_ignored(patch: Patch) -> None:
    """Hybrid sharding was asked for, but the model is sharded over all ranks."""
    right = accelerate.utils.fsdp2_prepare_model

    def faulty(prepared: Accelerator, model: nn.Module) -> nn.Module:
        with mock.patch.object(prepared.state, "device_mesh", None, create=True):
            return right(prepared, model)

    patch(accelerate.utils, "fsdp2_prepare_model", faulty)


def without_transformers(patch: Patch) -> None:
    """Trap 11: accelerate asks for the version of a package that nothing else here needs."""
    right = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return right(name)

    patch(importlib.metadata, "version", missing)


def prepare_makes_ddp(patch: Patch) -> None:
    def prepare(self: Accelerator, model: nn.Module, optimizer: Any) -> Any:
        return nn.parallel.DistributedDataParallel(model), optimizer

    patch(Accelerator, "prepare", prepare)


def deepspeed_swaps_the_optimizer(patch: Patch) -> None:
    """What offload does with DeepSpeedCPUAdam: another optimizer is built over the same parameters."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine._configure_zero_optimizer

    def faulty(self: Any, optimizer: torch.optim.Optimizer) -> Any:
        return right(self, torch.optim.Adam([dict(g) for g in optimizer.param_groups], lr=1e-3))

    patch(DeepSpeedEngine, "_configure_zero_optimizer", faulty)


COMMON: dict[str, Callable[[Patch], None]] = {
    "positions": rank0_reads_for_all,
    "scaled gradient": lambda patch: after_build(patch, scale_gradients),
    "dispatcher": rank0_reads_and_deals_out,
    "another optimizer class": another_class,
    "optimizer swapped": lambda patch: after_build(patch, swap_optimizer),
}
TRAPS: dict[str, dict[str, Callable[[Patch], None]]] = {
    "ddp": {
        "world 1": lambda patch: accelerator(patch, Accelerator),
        "bare model": lambda patch: after_build(patch, swap_for_bare),
        "half masters": half_masters,
        **COMMON,
    },
    "fsdp2": {
        "world 1": lambda patch: accelerator(patch, lambda: Accelerator(fsdp_plugin=fsdp_plugin())),
        "ignored": lambda patch: accelerator(patch, lambda: Accelerator(cpu=True, fsdp_plugin=fsdp_plugin())),
        "not sharded": lambda patch: patch(accelerate.utils, "fsdp2_prepare_model", lambda _, model: model),
        "model swapped for DDP": lambda patch: after_build(patch, swap_for_ddp),
        "half masters": half_masters,
        "half reduction": reduce_in_half,
        "no layout": no_layout,
        "sums of one rank": sums_of_one_rank,
        "optimizer before sharding": optimizer_before_sharding,
        "rounded first": far_from_zero,
        **COMMON,
    },
    "hsdp": {
        "world 1": lambda patch: accelerator(patch, lambda: Accelerator(fsdp_plugin=fsdp_plugin())),
        "ignored": lambda patch: accelerator(patch, lambda: Accelerator(cpu=True, fsdp_plugin=fsdp_plugin())),
        "mesh ignored": mesh_ignored,
        "half reduction": reduce_in_half,
        "no layout": no_layout,
        "sums of one rank": sums_of_one_rank,
        "rounded first": far_from_zero,
        **COMMON,
    },
    "zero2": {
        "world 1": lambda patch: accelerator(
            patch, lambda: Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
        ),
        "ignored": lambda patch: accelerator(
            patch, lambda: Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
        ),
        "prepare makes DDP": prepare_makes_ddp,
        "model swapped for DDP": lambda patch: after_build(patch, swap_for_ddp),
        "clipping by default": lambda patch: unset_clipping(patch, None),
        "clipping 1.0": lambda patch: unset_clipping(patch, "1.0"),
        "clipping 0 dropped": lambda patch: unset_clipping(patch, "0.0"),
        "backward steps": backward_steps,
        "no layout": no_layout,
        "sums of one rank": sums_of_one_rank,
        "without transformers": without_transformers,
        "another stage": lambda patch: deepspeed_settings(patch, lambda s: s.update(zero_optimization={"stage": 1})),
        "accumulation": lambda patch: deepspeed_settings(
            patch, lambda s: s.update(gradient_accumulation_steps=1, train_batch_size=4)
        ),
        "no gradient": spare_layer,
        "optimizer replaced": deepspeed_swaps_the_optimizer,
        "rounded first": far_from_zero,
        **COMMON,
    },
    "zero3_offload": {
        "ignored": lambda patch: accelerator(
            patch, lambda: Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
        ),
        "DeepSpeedCPUAdam": cpu_adam,
        "not offloaded": nothing_offloaded,
        "clipping by default": lambda patch: unset_clipping(patch, None),
        "no layout": no_layout,
        "sums of one rank": sums_of_one_rank,
        "rounded first": far_from_zero,
        **COMMON,
    },
}
"""By engine, in an order in which the first runs before any process group exists."""
OPTIONS = {"rounded first": ["precision=bf16"]}
"""What the run of a trap has beside the options of all."""


def spring(engine: str, name: str | None, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run the training command with one trap set (None: soundly): exit status, error line, what it left behind."""
    forget_engine()
    said = io.StringIO()
    with ExitStack() as stack:

        def patch(target: Any, attribute: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, attribute, value))

        patch(pretrain, "Guard", Unguarded)
        patch(cli, "_wait_for_rank0", lambda: None)  # which is for the eyes: no rank repeats another's sentence
        if name is not None:
            TRAPS[engine][name](patch)
        stack.enter_context(contextlib.redirect_stderr(said))
        mine = [*OPTIONS.get(name or "", []), f"name={(name or 'sound').replace(' ', '_')}"]
        status = cli.run_command(pretrain.main, [*options, *mine])
    run = folder / "runs" / (name or "sound").replace(" ", "_")
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {
        "status": status,
        "error": [line for line in said.getvalue().splitlines() if line.startswith("error:")],
        "saved": sorted(path.name for kind in ("checkpoints", "best") for path in (run / kind).glob("*")),
        "steps": [row["step"] for row in rows if "loss" in row],
    }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    os.environ["SCALETRANSFER_TRACEBACK"] = ""
    folder = Path(spec["folder"])
    options = [*spec["options"], f"run_dir={folder / 'runs'}"]
    return {str(name): spring(spec["engine"], name, folder, options) for name in [*TRAPS[spec["engine"]], None]}


if __name__ == "__main__":
    work(run)
