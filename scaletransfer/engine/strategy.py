"""Which engine the launcher was asked for: read once from the variables that ``accelerate launch`` sets.

``launch/<engine>.yaml`` chooses engine and topology only; what really runs is compared with this in ``verify``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

ENGINES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "zero3_offload")

_OFFLOAD = ("offload_optimizer_device", "offload_param_device")
_MESH = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")


def _flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "false").strip().lower() in ("1", "true", "yes")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    return int(text) if text.strip().isdigit() else default


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What was asked for: engine name, number of processes, this process's rank, and whether to stay on the CPU."""

    engine: str
    world: int
    rank: int
    local_rank: int
    local_world: int
    cpu: bool
    replicas: int = 1
    """Groups of ranks that each hold one whole model: all ranks under ddp, ``dp_replicate_size`` under hsdp, else 1."""

    def __post_init__(self) -> None:
        assert self.engine in ENGINES, self.engine
        assert self.world % self.replicas == 0, (self.world, self.replicas)

    @property
    def deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def fsdp(self) -> bool:
        return self.engine in ("fsdp2", "hsdp")

    @property
    def zero_stage(self) -> int:
        return int(self.engine[4]) if self.deepspeed else 0

    @property
    def offload(self) -> bool:
        """Parameters, masters and optimizer state lie in the host's memory, whatever computes."""
        return self.engine == "zero3_offload"

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the model is cut."""
        return self.world // self.replicas

    @property
    def replica(self) -> int:
        """Which copy this rank holds a part of. Neighbours share one: they are the fastest to reach."""
        return self.rank // self.shards


def asked(env: Mapping[str, str] | None = None, cuda: bool = False) -> Strategy:
    """The strategy that the launcher's environment asks for.

    Args:
        env: environment (default: the process's).
        cuda: whether a CUDA device is there; without one, or with ACCELERATE_USE_CPU set, everything runs on the CPU.

    Raises:
        ValueError: an engine that is not offered (FSDP1, FSDP2 with offload, offload of one half, another ZeRO stage),
            or a number of processes that does not fit the mesh of hybrid sharding.
    """
    env = os.environ if env is None else env
    world = _number(env, "WORLD_SIZE", 1)
    if _flag(env, "ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("distributed_type is MEGATRON_LM, which is not supported: use one of the files in launch/")
    if _flag(env, "ACCELERATE_USE_DEEPSPEED"):
        engine = _zero(env)
    elif _flag(env, "ACCELERATE_USE_FSDP"):
        engine = _fsdp(env)
    else:
        engine = "ddp" if world > 1 else "single"
    if engine != "hsdp" and _flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(f"parallelism_config is set, which {engine} would ignore: remove it, or use launch/hsdp.yaml")
    replicas = _replicas(env, world) if engine == "hsdp" else world if engine == "ddp" else 1
    return Strategy(
        engine=engine,
        world=world,
        rank=_number(env, "RANK", 0),
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world=_number(env, "LOCAL_WORLD_SIZE", world),
        cpu=not cuda or _flag(env, "ACCELERATE_USE_CPU"),
        replicas=replicas,
    )


def _zero(env: Mapping[str, str]) -> str:
    if env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").strip().lower() not in ("", "none"):
        raise ValueError(
            "deepspeed_config_file is set: remove it, the engine owns the DeepSpeed configuration and the launch file "
            "only chooses zero_stage"
        )
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage not in ("1", "2", "3"):
        raise ValueError(f"deepspeed_config.zero_stage is {stage or 'not set'}: use launch/zero1, zero2 or zero3.yaml")
    devices = {name: env.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "").strip().lower() or "none" for name in _OFFLOAD}
    if set(devices.values()) == {"none"}:
        return f"zero{stage}"
    if stage == "3" and set(devices.values()) == {"cpu"}:
        return "zero3_offload"
    said = " and ".join(f"deepspeed_config.{name} is {device}" for name, device in devices.items())
    raise ValueError(
        f"{said} with zero_stage {stage}: only both none, or both cpu with zero_stage 3 (launch/zero3_offload.yaml), "
        "are offered"
    )


def _fsdp(env: Mapping[str, str]) -> str:
    if env.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_config.fsdp_version is not 2: only FSDP2 is supported, use launch/fsdp2.yaml")
    if _flag(env, "FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "fsdp_config.fsdp_offload_params is true: FSDP2 with offload is not offered, set it to false or use "
            "launch/zero3_offload.yaml"
        )
    return "hsdp" if _flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG") else "fsdp2"


def _replicas(env: Mapping[str, str], world: int) -> int:
    """``dp_replicate_size`` of accelerate's mesh, which must be one of hybrid sharding over all processes."""
    sizes = {name: _number(env, f"PARALLELISM_CONFIG_{name.upper()}", 1) for name in _MESH}
    for name in _MESH[2:]:
        if sizes[name] != 1:
            raise ValueError(
                f"parallelism_config.parallelism_config_{name} is {sizes[name]}: only dp_replicate_size and "
                "dp_shard_size are offered, set it to 1"
            )
    replicate, shard = sizes["dp_replicate_size"], sizes["dp_shard_size"]
    if replicate < 2 or shard < 2:
        raise ValueError(
            f"parallelism_config asks for {replicate} replicas of {shard} shards: hybrid sharding needs at least 2 of "
            f"each, use launch/{'fsdp2' if replicate < 2 else 'ddp'}.yaml"
        )
    if replicate * shard != world:
        raise ValueError(
            f"parallelism_config asks for {replicate} replicas of {shard} shards but {world} processes were started: "
            "set --num_processes to --parallelism_config_dp_replicate_size x --parallelism_config_dp_shard_size"
        )
    return replicate
