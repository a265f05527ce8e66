"""Made-up run folders of fine-tuning, as far as a report reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_run(folder: Path, score: float, *, curve: dict[int, float] | None = None, **changes: Any) -> Path:
    """A folder with result.json, ``score`` the share that is right, and metrics.jsonl with ``curve`` (step: score)."""
    folder.mkdir(parents=True)
    content = {
        "format": "scaletransfer-result",
        "format_version": 1,
        "dataset": "xray5",
        "pretrained_model": "scratch",
        "shot": 5,
        "seed": 0,
        "steps": 500,
        "last_step": 500,
        "protocol": "bit",
        "peak_lr": 0.001,
        "task": "multiclass",
        "metric": "accuracy",
        "label_names": ["a", "b"],
        "train_samples": 10,
        "valid_samples": 400,
        "metrics": {"accuracy": score, "mean_auroc": 0.5, "loss": 1.5},
    } | changes
    (folder / "result.json").write_text(json.dumps(content))
    if curve is not None:
        rows: list[dict[str, Any]] = [{"step": 1, "loss": 2.0, "lr": 0.001}]
        rows += [{"event": "validation", "step": s, content["metric"]: v, "loss": 1.0} for s, v in curve.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_runs(base: Path, scores: dict[str, list[float]], **changes: Any) -> Path:
    """A run per model and seed, seeds counted from 0."""
    for model, values in scores.items():
        for seed, score in enumerate(values):
            name = f"{changes.get('dataset', 'xray5')}-{changes.get('shot', 5)}-{model}-{seed}"
            write_run(base / name, score, pretrained_model=model, seed=seed, **changes)
    return base


def write_table(path: Path, rows: Sequence[Sequence[object]], *, times: int = 1) -> Path:
    """A table in the published columns; a row is value, metric, seed, shot, model, data set, and, if not 500, steps."""
    lines = ["metric_value,metric,path,seed,shot,pretrained_model,dataset,last_step"]
    for value, metric, seed, shot, model, dataset, *steps in rows:
        folder = f"finetuning_results/{dataset}/{model}/{shot}/seed_{seed}"
        lines += times * [f"{value},{metric},{folder},{seed},{shot},{model},{dataset},{(steps or [500])[0]}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
