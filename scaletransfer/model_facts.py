"""What names say of a model whose file does not say it: the published ones, Google's BiT, timm's `resnetv2_*_bit`.

Each fact comes with the sentence that says where it is from; nothing is filled in without one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletransfer.config import PretrainConfig, find_config, load_config
from scaletransfer.models.bit import parse_name

SYNSETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog"}
"""Outputs of Google's and timm's networks -> timm's name of the list of their synsets."""
_HALF = 0.5
_PAPER_IMAGENET = 1000


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model. None: that is not known."""

    why: str = ""
    """Where it is known from, for a person."""
    model: str | None = None
    task: str | None = None
    label_names: tuple[str, ...] | None = None
    mean: float | list[float] | None = None
    std: float | list[float] | None = None
    pixel_max: int = 255
    """White of the training images."""
    transform: dict[str, Any] | None = None
    policy: dict[str, Any] | None = None
    outputs: int | None = None
    """What the head of the model of this name has."""
    notes: tuple[str, ...] = field(default=())


def of_card(card: Mapping[str, Any], path: Path) -> Facts:
    """What the model.json of an exported model says."""
    normal = card.get("normalisation", {})
    names = card.get("label_names")
    return Facts(
        why=f"{path.name} beside it",
        model=card.get("model"),
        task=card.get("task"),
        label_names=None if names is None else tuple(names),
        mean=normal.get("mean"),
        std=normal.get("std"),
        pixel_max=normal.get("pixel_max", 255),
        transform=card.get("transform"),
        policy=card.get("policy"),
    )


def of_published(names: Sequence[str], config: Path | None) -> Facts:
    """By the pre-training configuration `config`, or else by the first of `names` that is a published one's, such as
    chexpert_bit152x4; no facts where none is.

    Raises ValueError or FileNotFoundError for a configuration that cannot be read.
    """
    if config is not None:
        return _of_config(load_config([config], (), PretrainConfig), f"the configuration {config}")
    for name in names:
        plain = name.lower().replace("-", "_")
        if not re.fullmatch(r"[a-z0-9_]+_bit(50x1|152x4)(_optimized)?", plain):
            continue
        try:
            found = find_config(Path("configs") / f"{plain}.yaml")
        except FileNotFoundError:
            continue
        return _of_config(load_config([found], (), PretrainConfig), f"its name {name} (configs/{plain}.yaml)")
    return Facts()


def _of_config(cfg: PretrainConfig, why: str) -> Facts:
    data, policy = cfg.data, cfg.data.policy
    xray = data.transform == "xray"
    labels: Sequence[str] | None = data.expect_labels
    notes: tuple[str, ...] = ()
    if labels is None and data.nb_classes == _PAPER_IMAGENET and not xray:
        labels = _synsets(_PAPER_IMAGENET)
        notes = ("labels: the synsets of ImageNet-1k, sorted, as the training folders were",) if labels else ()
    return Facts(
        why=why,
        model=cfg.model.name,
        task="multilabel" if xray else "multiclass",
        label_names=None if labels is None else tuple(labels),
        mean=data.mean,
        std=data.std,
        transform={"kind": data.transform, "size": data.image_size},
        policy={
            "name": policy.name,
            "uncertain": policy.uncertain,
            "blank": policy.blank,
            "per_label": {name: dict(choices) for name, choices in policy.per_label.items()},
        },
        outputs=len(labels) if labels is not None else data.nb_classes,
        notes=notes,
    )


def of_google(stem: str, outputs: int) -> Facts:
    """Of an .npz in Google's names, whose file may be called BiT-{S,M}-R<depth>x<width>[-ILSVRC2012].

    All of Google's BiT take pixels of -1 to 1 (arXiv 1912.11370, and bit_hyperrule of google-research/big_transfer).
    """
    named = re.match(r"(BiT-[SM]-R\d+x\d+)(-.+)?$", stem)
    labels = _synsets(outputs)
    transform = {"kind": "natural", "size": 224}
    if named and (named[2] or "").upper() == "-ILSVRC2012":
        transform = {"kind": "bit", "precrop": 512, "size": 480, "square": True, "flip": 0.5, "xray": False}
    return Facts(
        why="Google's BiT" + (f", by its name {stem}" if named else ", by the names of its arrays"),
        model=named[1] if named and parse_name(named[1]) else None,
        task="multiclass" if labels else None,
        label_names=labels,
        mean=_HALF,
        std=_HALF,
        transform=transform,
        notes=(f"labels: the {outputs} synsets of {SYNSETS[outputs]}, by their number",) if labels else (),
    )


def of_timm(name: str | None, beside: Mapping[str, Any] | None, outputs: int) -> Facts:
    """Of tensors in the names of timm's `resnetv2_*_bit`.

    name: a name of timm (`resnetv2_50x1_bit.goog_in21k`), or what the file is called. beside: timm's config.json, as
    its own hub folders have it. All networks of this family in timm have one normalisation, which is taken where
    neither says another.
    """
    settings, why = dict(beside.get("pretrained_cfg") or {}) if beside else {}, "timm's config.json beside it"
    if not settings:
        settings, why = _timm_settings(name)
    labels = (beside or {}).get("label_names") or settings.get("label_names")
    if labels is None:
        labels = _synsets(outputs)
    size, share = int(settings.get("input_size", (3, 224, 224))[-1]), float(settings.get("crop_pct") or 0.875)
    transform: dict[str, Any] = {"kind": "natural", "size": size}
    if share == 1:
        transform = {"kind": "bit", "precrop": size, "size": size, "square": True, "flip": 0.5, "xray": False}
    if labels is None or len(labels) != outputs:
        labels = ()
    known = bool(labels)
    return Facts(
        why=why,
        task="multiclass" if known else None,
        label_names=tuple(map(str, labels)) if known else None,
        mean=_one(settings.get("mean", _HALF)),
        std=_one(settings.get("std", _HALF)),
        transform=transform,
        notes=(f"labels: the {outputs} synsets of {SYNSETS[outputs]}, by their number",)
        if known and outputs in SYNSETS
        else (),
    )


def _timm_settings(name: str | None) -> tuple[dict[str, Any], str]:
    """Timm's own configuration of the name, and where that is from."""
    if name and (found := re.match(r"(resnetv2_\d+x\d_bit)(\.\w+)?", name)):
        try:
            from timm import get_pretrained_cfg

            for known in dict.fromkeys((found[0], found[1])):
                if (cfg := get_pretrained_cfg(known)) is not None:
                    return cfg.to_dict(), f"timm's configuration of {known}"
        except (ImportError, RuntimeError):
            pass
    return {}, "timm's resnetv2_*_bit, by the names of its tensors"


def _one(values: Any) -> float | list[float]:
    """One number for three equal ones."""
    numbers = [float(value) for value in (values if isinstance(values, list | tuple) else [values])]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _synsets(outputs: int) -> tuple[str, ...] | None:
    """WordNet ids of so many outputs, in order, from timm's lists; None where there is no such list, or no timm."""
    if outputs not in SYNSETS:
        return None
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError:
        return None
    return tuple(ImageNetInfo(SYNSETS[outputs]).label_names())
