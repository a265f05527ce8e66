"""The network of a transfer: which, with what values, normalisation and head."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaletransfer.config import FinetuneConfig, PretrainConfig
from scaletransfer.engine.filling import Values
from scaletransfer.models import create_model, head_names, initial_tensors
from scaletransfer.models.bit import parse_name
from scaletransfer.models.weights import StateDict, architecture_of, first_difference, load_pretrained, locate
from scaletransfer.transfer.data import shortened

PRETRAINED_MODELS = Path("pretrained_models")
Numbers = float | list[float]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Where a run starts from."""

    model: str
    """Name of the architecture."""
    title: str
    """Name of the pre-trained model in results; "scratch" for drawn values."""
    path: str | None
    state: StateDict | None
    """None: drawn values."""
    label_names: tuple[str, ...] | None
    mean: Numbers
    std: Numbers
    xray: bool
    """Whether it was trained on X-rays, whose anatomy has sides."""
    digest: str
    """sha256 of the weights' file; "" for drawn values."""
    ws_eps: float | None = None
    """Of weight standardisation, where it is not ours."""


def open_pretrained(cfg: FinetuneConfig, pretrain: PretrainConfig | None, pretrain_name: str | None) -> Pretrained:
    """Read the checkpoint that a run starts from, or say what is drawn.

    pretrain: the pre-training configuration, where one was given; pretrain_name: its name, which is also that of its
    folder in pretrained_models/.

    Raises:
        ValueError: no checkpoint named or found, one that is of another network, or normalisations that contradict
            each other or are not known.
    """
    path = _path(cfg, pretrain_name)
    if cfg.model.from_scratch:
        return _drawn(cfg, pretrain, path)
    if path is None and cfg.model.name is not None and timm_card(cfg.model.name) is not None:
        return _from_timm(cfg, cfg.model.name)
    if path is None:
        raise ValueError(
            "there is no pre-trained model: give --model-path PATH, or --pretrain-config FILE whose model lies in "
            f"{PRETRAINED_MODELS}/, or start from drawn values with --from-scratch"
        )
    wanted = cfg.model.name or (pretrain.model.name if pretrain is not None else None)
    state, card = load_pretrained(path, model_name=wanted)
    check_card(card, path)
    name = wanted or card.get("model") or architecture_of(state)
    if not isinstance(name, str):
        raise ValueError(f"{path} does not say which network it is of: set model.name=..., such as BiT-S-R50x1")
    mean, std = _normalisation(cfg, pretrain, card, path, name)
    names = card.get("label_names")
    kind = card.get("transform", {}).get("kind") or (pretrain.data.transform if pretrain is not None else None)
    xray = kind == "xray" or bool(card.get("transform", {}).get("xray"))
    return Pretrained(
        model=name,
        title=cfg.model.title or title_of(path),
        path=str(path),
        state=state,
        label_names=None if names is None else tuple(names),
        mean=mean,
        std=std,
        xray=xray,
        digest=_digest(path, card),
        ws_eps=card.get("ws_eps"),
    )


def title_of(path: Path) -> str:
    """The model's name in results: of its folder or file, but of the folder above where that is just "model"."""
    path = Path(os.path.abspath(path))
    name = path.name if path.is_dir() else path.name.removesuffix(".tar").rpartition(".")[0]
    while name == "model":  # runs/<run>/model/model.safetensors
        path = path.parent
        name = path.name
    return name


def _path(cfg: FinetuneConfig, pretrain_name: str | None) -> Path | None:
    if cfg.model.path is not None:
        path = Path(cfg.model.path)
        if cfg.model.from_scratch and not path.exists():  # its normalisation is wanted, and would silently be another
            raise ValueError(f"there is no pre-trained model {path}: correct --model-path")
        if (path / "checkpoints").is_dir() and not (path / "model.safetensors").exists():
            if (path / "model" / "model.safetensors").exists():  # a fine-tuning run: its result
                return path / "model"
            raise ValueError(f"{path} is a run, not a model: write its model first with scaletransfer export {path}")
        return path
    if pretrain_name is None:
        return None
    path = PRETRAINED_MODELS / pretrain_name
    if not path.exists() and not cfg.model.from_scratch:
        raise ValueError(
            f"there is no {path}: put the model there (scaletransfer export runs/{pretrain_name} --to {path}), or give "
            "--model-path"
        )
    return path


def check_card(card: Any, path: Path) -> None:
    """ValueError where a field of model.json, if it is there, is not what `scaletransfer export` writes."""

    def numbers(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return len(values) in (1, 3) and all(isinstance(v, int | float) for v in values)

    def normalisation(value: Any) -> bool:
        return isinstance(value, dict) and numbers(value.get("mean")) and numbers(value.get("std"))

    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "model": ("the name of a network", lambda v: isinstance(v, str)),
        "num_classes": ("a whole number", lambda v: isinstance(v, int)),
        "label_names": ("a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v)),
        "normalisation": ("mean and std, each one number or three", normalisation),
        "transform": ("kind and size", lambda v: isinstance(v, dict) and isinstance(v.get("size"), int)),
        "policy": ("a label policy", lambda v: isinstance(v, dict)),
    }
    for key, (what, fits) in kinds.items():
        if not isinstance(card, dict) or (key in card and not fits(card[key])):
            raise ValueError(f"{path}: the field {key!r} of its model.json must be {what}: export the model again")


def _drawn(cfg: FinetuneConfig, pretrain: PretrainConfig | None, path: Path | None) -> Pretrained:
    """Drawn values of the same network, normalised alike: what the pre-trained one is compared with."""
    card: dict[str, Any] = {}
    name = cfg.model.name or (pretrain.model.name if pretrain is not None else None)
    if path is not None and path.exists():
        beside = locate(path).with_suffix(".json")
        if beside.is_file():
            card = json.loads(beside.read_text(encoding="utf-8"))
            check_card(card, path)
        name = name or card.get("model") or architecture_of(load_pretrained(path)[0])
    if name is None:
        raise ValueError("from scratch, but which network? Set model.name=BiT-S-R50x1, or give --pretrain-config")
    kind = card.get("transform", {}).get("kind") or (pretrain.data.transform if pretrain is not None else None)
    known = card.get("normalisation") or (
        {"mean": pretrain.data.mean, "std": pretrain.data.std}
        if pretrain is not None
        else timm_card(name) or {"mean": 0.5, "std": 0.5}
    )
    return Pretrained(
        model=name,
        title=cfg.model.title or "scratch",
        path=None,
        state=None,
        label_names=None,
        mean=cfg.data.mean if cfg.data.mean is not None else known["mean"],
        std=cfg.data.std if cfg.data.std is not None else known["std"],
        xray=kind == "xray" or bool(card.get("transform", {}).get("xray")),
        digest="",
    )


def _normalisation(
    cfg: FinetuneConfig, pretrain: PretrainConfig | None, card: dict[str, Any], path: Path, name: str
) -> tuple[Numbers, Numbers]:
    """Mean and deviation that the checkpoint was trained with; everybody who names them must name the same."""
    said: dict[str, tuple[Numbers, Numbers]] = {}
    if "normalisation" in card:
        said[f"{path}"] = (card["normalisation"]["mean"], card["normalisation"]["std"])
    elif card.get("format") == "google-npz":
        said[f"{path} (Google's BiT)"] = (0.5, 0.5)
    if pretrain is not None:
        said["the pre-training configuration"] = (pretrain.data.mean, pretrain.data.std)
    if cfg.data.mean is not None or cfg.data.std is not None:
        first = next(iter(said.values()), (None, None))
        mean = cfg.data.mean if cfg.data.mean is not None else first[0]
        std = cfg.data.std if cfg.data.std is not None else first[1]
        if mean is None or std is None:
            raise ValueError("give data.mean and data.std together")
        said["data.mean and data.std"] = (mean, std)
    theirs = timm_card(name)
    if not said and theirs is not None:  # whoever knows better says so by data.mean and data.std
        said[f"timm's configuration of {name}"] = (theirs["mean"], theirs["std"])
    if not said:
        raise ValueError(
            f"{path} does not say how its images were normalised: give the --pretrain-config it was made with, or "
            "data.mean=... and data.std=..."
        )
    (first_name, first), *others = said.items()
    for name, other in others:
        if [_three(value) for value in other] != [_three(value) for value in first]:
            raise ValueError(
                f"normalisation does not fit: {first_name} has mean {first[0]} and std {first[1]}, {name} mean "
                f"{other[0]} and std {other[1]}; the network would see other pixels than it was trained on, so leave "
                "data.mean and data.std out, or give the configuration that belongs to the checkpoint"
            )
    return first


def timm_card(name: str) -> dict[str, Any] | None:
    """Mean, std, image side and crop share that timm gives a network, and whether its side is fixed; None for BiT and
    names that timm does not know."""
    if parse_name(name) is not None:
        return None
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    found = timm.get_pretrained_cfg(name)
    if found is None:
        return None
    return {
        "mean": [float(value) for value in found.mean],
        "std": [float(value) for value in found.std],
        "size": int(found.input_size[-1]),
        "crop": float(found.crop_pct or 0.875),
        "fixed": bool(found.fixed_input_size),
    }


def fixed_resolution(name: str) -> tuple[int, int] | None:
    """(side before the crop, side of the crop) of a network of timm that takes one image size only; None: any."""
    card = timm_card(name)
    if card is None or not card["fixed"]:
        return None
    return math.ceil(card["size"] / card["crop"]), card["size"]


def _from_timm(cfg: FinetuneConfig, name: str) -> Pretrained:
    """A network of timm with timm's own weights, from its cache or the network, by its own loader."""
    import timm

    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # of every library that timm downloads with
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ValueError(
            f"timm has no weights of {name} at hand ({reason}): give a file by --model-path, or start from drawn "
            "values with --from-scratch"
        ) from error
    card, digest = timm_card(name), hashlib.sha256()
    assert card is not None
    state = network.state_dict()
    for key, tensor in state.items():
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    mean, std = _normalisation(cfg, None, {}, Path(f"timm's {name}"), name)
    return Pretrained(
        model=name,
        title=name,
        path=None,
        state=state,
        label_names=None,
        mean=mean,
        std=std,
        xray=False,
        digest=digest.hexdigest(),
    )


def _three(value: Numbers) -> list[float]:
    numbers = value if isinstance(value, list) else [value]
    return [float(v) for v in (numbers * 3 if len(numbers) == 1 else numbers)]


def _digest(path: Path, card: dict[str, Any]) -> str:
    if isinstance(card.get("sha256"), str):
        return str(card["sha256"])
    with locate(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def decide_head(mode: str, start: Pretrained, names: Sequence[str]) -> tuple[str, str]:
    """("keep" or "new", a sentence why): the head is kept where it means the same.

    Raises:
        ValueError: as many classes but other names, or names in another order (both lists are shown), unless ``mode``
            is "new"; a head that cannot be kept although ``mode`` is "keep".
    """
    if start.state is None:
        return "new", f"new head of {len(names)} outputs"
    with torch.device("meta"):
        skeleton = create_model(start.model, len(names))
    weights = [name for name in head_names(skeleton) if name.endswith("weight")]
    held = len(start.state[weights[0]]) if weights and weights[0] in start.state else 0
    if mode == "new":
        return "new", f"new head of {len(names)} outputs (the checkpoint has {held})"
    if held != len(names):
        if mode == "keep":
            raise ValueError(
                f"model.head is keep but {start.path} has {held} outputs and the data {len(names)} classes: set "
                "model.head=new"
            )
        return (
            "new",
            f"the checkpoint's head has {held} outputs and the data {len(names)} classes: replaced by a new head",
        )
    if start.label_names is None:
        if mode == "keep":
            return "keep", f"head of {held} outputs kept, as asked; the checkpoint does not name its labels"
        return "new", f"the checkpoint does not name its {held} labels: its head is replaced by a new one"
    if start.label_names == tuple(names):
        return "keep", f"head kept: its {held} labels are those of the data (model.head=new draws a new one)"
    raise ValueError(
        f"label names do not fit: {start.path} has {shortened(start.label_names)}; the data has {shortened(names)}; "
        "its head means something else, set model.head=new for a new one"
    )


def starting_values(start: Pretrained, head: str, protocol: str, seed: int) -> Callable[[nn.Module], Values]:
    """Where each tensor's values come from, for the engine.

    A new head is all zeros under ``bit``, drawn like PyTorch's own under ``paper``.

    Raises (when called): ValueError for a checkpoint that does not fit the network.
    """

    def values(skeleton: nn.Module) -> Values:
        drawn = initial_tensors(skeleton, seed)
        own = skeleton.state_dict()
        new = set(head_names(skeleton)) if head == "new" else set()
        if start.state is not None:
            _check_fits(start, own, new)

        def value(name: str) -> Tensor:
            if name in new and protocol == "bit":
                return torch.zeros(own[name].shape, dtype=torch.float32, device="cpu")
            if start.state is None or name in new:
                return drawn(name)
            return start.state[name].float()

        return value

    return values


def _check_fits(start: Pretrained, own: StateDict, new: set[str]) -> None:
    state = start.state or {}
    wanted = {name: tuple(value.shape) for name, value in own.items() if name not in new}
    given = {name: tuple(value.shape) for name, value in state.items() if name in wanted or name not in own}
    if difference := first_difference(given, wanted):
        raise ValueError(
            f"{start.path} does not fit {start.model}: {difference}; set model.name to the network of that checkpoint"
        )
