"""The optimizer of a fine-tuning run: the engine's own, AdamW, and learning rates that fall from layer to layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scaletransfer.config import FinetuneConfig, FinetuneOptimizerConfig
from scaletransfer.engine import assemble
from scaletransfer.engine.strategy import Strategy
from scaletransfer.models import head_names

CLASSES: dict[str, type[torch.optim.Optimizer]] = {**assemble.OPTIMIZERS, "adamw": torch.optim.AdamW}


def make(settings: FinetuneOptimizerConfig, peak: float, network: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that are trained.

    Groups carry ``lr_scale``, by which the loop multiplies the schedule's rate, where layers learn at rates of their
    own.

    Raises ValueError where layer_decay is asked for and timm, whose layers these are, is not installed.
    """
    if settings.name == "adamw":
        trained = [p for p in network.parameters() if p.requires_grad]
        vectors = [p for p in trained if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        beta1, beta2 = settings.betas
        made: torch.optim.Optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=peak, betas=(beta1, beta2)
        )
    else:
        made = assemble.make_optimizer(settings.resolved(peak), network)
    if settings.layer_decay is None or settings.layer_decay == 1:
        return made
    scales = layer_scales(network, settings.layer_decay)
    split: list[dict[str, Any]] = []
    for group in made.param_groups:
        for scale in sorted({scales[id(p)] for p in group["params"]}):
            mine = [p for p in group["params"] if scales[id(p)] == scale]
            split.append({**group, "params": mine, "lr_scale": scale})
    return type(made)(split, lr=peak)  # type: ignore[call-arg]


def layer_scales(network: nn.Module, decay: float) -> dict[int, float]:
    """The share of the schedule's rate that each trained parameter learns at, by ``id``: decay^(layers above it).

    The classifier has 1; what is a layer is timm's notion (``group_matcher``, which BiT has too).
    """
    try:
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
    except ImportError:
        raise ValueError(
            "optimizer.layer_decay takes its layers from timm: pip install 'scaletransfer[timm]', or set it to null"
        ) from None
    groups = param_groups_layer_decay(network, layer_decay=decay)
    scales = {id(p): float(group["lr_scale"]) for group in groups for p in group["params"]}
    named = dict(network.named_parameters())
    scales.update({id(named[name]): 1.0 for name in head_names(network)})
    return scales


def check_engine(cfg: FinetuneConfig, strategy: Strategy) -> None:
    """ValueError where an option was not built for the engine that was asked for."""
    if strategy.engine in ("single", "ddp"):
        return
    asked = {
        "optimizer.name=adamw": cfg.optimizer.name == "adamw",
        "optimizer.layer_decay": cfg.optimizer.layer_decay is not None,
        "ema_decay": cfg.ema_decay is not None,
        "model.freeze_through": cfg.model.freeze_through is not None,
        "model.linear_probe": cfg.model.linear_probe,
    }
    for key, used in asked.items():
        if used:
            raise ValueError(
                f"{key} is for one process or launch/ddp.yaml, not {strategy.engine}, which cuts the tensors over "
                "the ranks: start with --config_file launch/ddp.yaml"
            )
