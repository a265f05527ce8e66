"""What stands in a run's folder beside its records and checkpoints: config.yaml and environment.json."""

from __future__ import annotations

import difflib
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch

from scaletransfer.config import FinetuneConfig, PretrainConfig, to_yaml
from scaletransfer.engine.checkpoint import find_latest
from scaletransfer.engine.runlog import claim
from scaletransfer.engine.strategy import Strategy
from scaletransfer.files import write_atomically


def take_folder(folder: Path, cfg: PretrainConfig | FinetuneConfig, strategy: Strategy, latest: Path | None) -> IO[str]:
    """Claim the run folder, name what changed since an earlier start, write what a run says of itself. By rank 0.

    latest: the checkpoint that this process goes on from. What is returned must stay open as long as the run lives.

    Raises:
        ValueError: another process trains there, or did since this one looked.
    """
    held = claim(folder)
    if find_latest(folder / "checkpoints") != latest:
        raise ValueError(f"{folder} got a checkpoint while this process started: start it again to go on from there")
    if latest is not None:
        say_changes(folder / "config.yaml", cfg)
    write_run_folder(folder, cfg, strategy)
    return held


def write_run_folder(folder: Path, cfg: PretrainConfig | FinetuneConfig, strategy: Strategy) -> None:
    """``config.yaml`` (resolved) and ``environment.json``, by rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    # atomically: what a killed run decided is read again when it goes on
    write_atomically(folder / "config.yaml", to_yaml(cfg).encode("utf-8"))
    packages = (
        "scaletransfer",
        "torch",
        "torchvision",
        "accelerate",
        "deepspeed",
        "numpy",
        "safetensors",
        "timm",
    )
    environment = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "engine": strategy.engine,
        "world": strategy.world,
        "device": "cpu" if strategy.cpu else torch.cuda.get_device_name(),
        "command": sys.argv,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def say_changes(path: Path, cfg: PretrainConfig | FinetuneConfig) -> None:
    """Name the settings in which a resumed run differs from how it ran before; those of ``run_facts`` may not."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    after = to_yaml(cfg).splitlines()
    for line in difflib.unified_diff(before, after, lineterm="", n=0):
        if line[:1] in "+-" and line[:3] not in ("+++", "---"):
            print(f"note: changed since the run last started: {line}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
