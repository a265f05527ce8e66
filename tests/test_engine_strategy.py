"""What the launcher's environment asks for, as accelerate really exports it; and the rehearsal's private levers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as distrib_run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from helpers_engine import ROOT, jobs

from scaletransfer.engine.strategy import ENGINES, asked

WORLDS = {engine: {"single": 1, "hsdp": 4}.get(engine, 2) for engine in ENGINES}
Edit = Callable[[dict[str, Any]], Any]


class Started(Exception):
    """Raised in the place of the workers, with the environment that they would get."""

    def __init__(self, env: dict[str, str]) -> None:
        super().__init__()
        self.env = env


def exported(config: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, str]:
    """The environment of rank 1 (or of the only process) under `accelerate launch --config_file <config>`."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def run(args: Any) -> None:
        count = int(args.nproc_per_node)
        ranks = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": 1, "LOCAL_RANK": 1}  # torchrun adds these
        raise Started({**os.environ, **{name: str(value) for name, value in ranks.items()}})

    def popen(*_: Any, env: dict[str, str], **__: Any) -> None:
        raise Started(env)

    monkeypatch.setattr(distrib_run, "run", run)
    monkeypatch.setattr(subprocess, "Popen", popen)
    args = launch_command_parser().parse_args(["--config_file", str(config), *arguments, "-m", "nothing"])
    with pytest.raises(Started) as started:
        launch_command(args)
    return started.value.env


def edited(engine: str, folder: Path, edit: Edit) -> Path:
    """A copy of a launch file that somebody changed."""
    settings = yaml.safe_load((ROOT / "launch" / f"{engine}.yaml").read_text())
    edit(settings)
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_each_launch_file_asks_for_its_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = asked(exported(ROOT / "launch" / f"{engine}.yaml", monkeypatch))
    assert strategy.engine == engine
    world = WORLDS[engine]
    assert (strategy.world, strategy.rank, strategy.local_rank) == (world, min(1, world - 1), min(1, world - 1))
    copies = {"ddp": 2, "hsdp": 2}.get(engine, 1)
    assert (strategy.replicas, strategy.shards) == (copies, world // copies)
    assert strategy.offload == (engine == "zero3_offload")
    assert strategy.cpu
    assert strategy.deepspeed == engine.startswith("zero")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3", "zero3_offload"])
def test_num_processes_sets_the_world(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = asked(exported(ROOT / "launch" / f"{engine}.yaml", monkeypatch, "--num_processes", "5"))
    assert (strategy.engine, strategy.world) == (engine, 5)


def test_replicas_and_shards_of_hybrid_sharding_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = ("--parallelism_config_dp_replicate_size", "3", "--parallelism_config_dp_shard_size", "4")
    strategy = asked(exported(ROOT / "launch" / "hsdp.yaml", monkeypatch, "--num_processes", "12", *mesh))
    assert (strategy.engine, strategy.world, strategy.replicas, strategy.shards) == ("hsdp", 12, 3, 4)
    assert [dataclasses.replace(strategy, rank=rank).replica for rank in (0, 3, 4, 11)] == [0, 0, 1, 2]


def test_processes_that_do_not_fit_the_mesh_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    env = exported(ROOT / "launch" / "hsdp.yaml", monkeypatch, "--num_processes", "6")
    with pytest.raises(ValueError, match="2 replicas of 2 shards but 6 processes were started: set --num_processes"):
        asked(env)


def test_every_launch_file_is_known_and_every_engine_has_one() -> None:
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} == set(ENGINES)


def test_cuda_is_used_where_it_is_there_unless_the_cpu_is_asked_for() -> None:
    assert not asked({}, cuda=True).cpu
    assert asked({"ACCELERATE_USE_CPU": "True"}, cuda=True).cpu
    assert (asked({}).engine, asked({"WORLD_SIZE": "3", "RANK": "2"}).engine) == ("single", "ddp")


OFFLOADED = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
ONE_REPLICA = {"parallelism_config_dp_replicate_size": 1, "parallelism_config_dp_shard_size": 4}
ONE_SHARD = {"parallelism_config_dp_replicate_size": 4, "parallelism_config_dp_shard_size": 1}
REFUSED: list[tuple[str, Edit, str]] = [
    ("zero2", lambda s: s["deepspeed_config"].update(zero_stage=0), "zero_stage is 0: use launch/zero1"),
    (
        "zero2",
        lambda s: s["deepspeed_config"].update(offload_optimizer_device="cpu"),
        "offload_optimizer_device is cpu and deepspeed_config.offload_param_device is none with zero_stage 2: only",
    ),
    ("zero2", lambda s: s["deepspeed_config"].update(OFFLOADED), "is cpu with zero_stage 2: only both none"),
    ("zero3", lambda s: s["deepspeed_config"].update(offload_param_device="nvme"), "offload_param_device is nvme"),
    ("zero3_offload", lambda s: s["deepspeed_config"].update(offload_param_device="none"), "offload_param_device is n"),
    ("fsdp2", lambda s: s["fsdp_config"].update(fsdp_version=1), "only FSDP2 is supported"),
    ("fsdp2", lambda s: s["fsdp_config"].update(fsdp_offload_params=True), "fsdp_offload_params is true"),
    ("hsdp", lambda s: s["parallelism_config"].update(parallelism_config_tp_size=2), "parallelism_config_tp_size is 2"),
    ("hsdp", lambda s: s["parallelism_config"].update(ONE_REPLICA), "1 replicas of 4 shards: hybrid sharding needs"),
    ("hsdp", lambda s: s["parallelism_config"].update(ONE_SHARD), "4 replicas of 1 shards: .* launch/ddp.yaml"),
]


@pytest.mark.parametrize(("engine", "edit", "sentence"), REFUSED, ids=[sentence for *_, sentence in REFUSED])
def test_engines_that_are_not_offered_are_refused(
    engine: str, edit: Edit, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = exported(edited(engine, tmp_path, edit), monkeypatch)
    with pytest.raises(ValueError, match=sentence) as refusal:
        asked(env)
    assert "\n" not in str(refusal.value)


def test_a_deepspeed_configuration_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "deepspeed.json"
    theirs.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}')
    path = edited("zero2", tmp_path, lambda s: s.update(deepspeed_config={"deepspeed_config_file": str(theirs)}))
    with pytest.raises(ValueError, match="deepspeed_config_file is set: remove it"):
        asked(exported(path, monkeypatch))


ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "hsdp": "FSDP", **dict.fromkeys(ZERO, "DEEPSPEED")}
REHEARSED = ("ddp", "fsdp2", "zero3")
"""The others take the same ways through Accelerate, and their training is compared elsewhere."""


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", [pytest.param(e, marks=[] if e in REHEARSED else pytest.mark.slow) for e in TYPES])
def test_the_rehearsal_makes_accelerate_run_the_engine_on_cpu(engine: str) -> None:
    """Fails when a release of accelerate changes the private state that `engine.rehearsal` sets."""
    world = WORLDS[engine]
    for rank, found in enumerate(jobs(engine, world)["rehearsal"]):
        assert found["type"] == found["partial type"] == TYPES[engine]
        assert (found["processes"], found["index"], found["main"]) == (world, rank, rank == 0)
        assert (found["device"], found["sum"]) == ("cpu", world)
        wanted = {"FSDP": "FullyShardedDataParallelPlugin", "DEEPSPEED": "DeepSpeedPlugin"}
        assert found["plugin"] == wanted.get(TYPES[engine])
        assert found["stage"] == (int(engine[4]) if "zero" in engine else None)
        assert found["offload"] == (engine == "zero3_offload")
        assert found["mesh"] == ([2, 2] if engine == "hsdp" else None)
