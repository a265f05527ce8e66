"""Which engine the launcher was asked for: read once from the variables that ``accelerate launch`` sets.

``launch/<engine>.yaml`` chooses engine and topology only; what really runs is compared with this in ``verify``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


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

    def __post_init__(self) -> None:
        assert self.engine in ENGINES, self.engine

    @property
    def deepspeed(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def zero_stage(self) -> int:
        return int(self.engine[4:]) if self.deepspeed else 0


def asked(env: Mapping[str, str] | None = None, cuda: bool = False) -> Strategy:
    """The strategy that the launcher's environment asks for.

    Args:
        env: environment (default: the process's).
        cuda: whether a CUDA device is there; without one, or with ACCELERATE_USE_CPU set, everything runs on the CPU.

    Raises:
        ValueError: an engine that is not offered (FSDP1, offload, hybrid sharding, another ZeRO stage).
    """
    env = os.environ if env is None else env
    world = _number(env, "WORLD_SIZE", 1)
    if _flag(env, "ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("distributed_type is MEGATRON_LM, which is not supported: use one of the files in launch/")
    if _flag(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError("parallelism_config is set: hybrid sharding is not supported yet, use launch/fsdp2.yaml")
    if _flag(env, "ACCELERATE_USE_DEEPSPEED"):
        engine = _zero(env)
    elif _flag(env, "ACCELERATE_USE_FSDP"):
        engine = _fsdp(env)
    else:
        engine = "ddp" if world > 1 else "single"
    return Strategy(
        engine=engine,
        world=world,
        rank=_number(env, "RANK", 0),
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_world=_number(env, "LOCAL_WORLD_SIZE", world),
        cpu=not cuda or _flag(env, "ACCELERATE_USE_CPU"),
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
    for name in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        device = env.get(f"ACCELERATE_DEEPSPEED_{name}", "none").lower()
        if device not in ("", "none"):
            raise ValueError(
                f"deepspeed_config.{name.lower()} is {device}: offload is not supported yet, because DeepSpeed then "
                "replaces the optimizer by its own; set it to none"
            )
    return f"zero{stage}"


def _fsdp(env: Mapping[str, str]) -> str:
    if env.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_config.fsdp_version is not 2: only FSDP2 is supported, use launch/fsdp2.yaml")
    if _flag(env, "FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_config.fsdp_offload_params is true: offload is not supported yet, set it to false")
    return "fsdp2"
