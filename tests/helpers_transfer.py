"""A small pre-trained model and fine-tuning runs in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scaletransfer.config import FinetuneConfig, load_config
from scaletransfer.models import create_model, init_weights

FAST = (
    "steps=6",
    "global_batch=8",
    "micro_batch=4",
    "data.resolution=[36,32]",
    "data.workers=0",
    "optimizer.lr=0.1",
    "validate.every_steps=3",
    "checkpoint.every_steps=2",
    "log.every_steps=1",
    "bootstrap=20",
)


def make_pretrained(
    folder: Path,
    *,
    labels: Sequence[str] = ("a", "b", "c", "d", "e"),
    mean: Any = 0.5,
    std: Any = 0.5,
    kind: str = "natural",
    seed: int = 7,
    model: str = "BiT-tiny",
) -> Path:
    """An exported folder, as `scaletransfer export` writes it, with drawn values; returns it."""
    folder.mkdir(parents=True)
    network = create_model(model, len(labels))
    init_weights(network, seed)
    save_file(network.state_dict(), folder / "model.safetensors")
    card = {
        "format": "scaletransfer-model",
        "format_version": 1,
        "model": model,
        "num_classes": len(labels),
        "task": "multiclass",
        "label_names": list(labels),
        "policy": {"name": "corrected", "uncertain": "ignore", "blank": "ignore", "per_label": {}},
        "normalisation": {"mean": mean, "std": std, "pixel_max": 255},
        "transform": {"kind": kind, "size": 32, "augmentation": "corrected", "rand_augment": None},
        "provenance": {},
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def config(*overrides: str) -> FinetuneConfig:
    """A configuration of a few steps of small images, then `overrides`."""
    return load_config([], [*FAST, *overrides], FinetuneConfig)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a finished run's model."""
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [row["loss"] for row in rows(folder) if "event" not in row]
