"""The keys of a sweep: pre-trained models x targets x shots x seeds, each a fine-tuning run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaletransfer.config import files
from scaletransfer.config.files import Value, check

SCRATCH = "scratch"
FULL = "full"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
TARGET_KEYS = ("data.images", "data.shards", "data.source", "data.root", "train_dir", "val_dir")
OWN = {
    "seed": "seeds",
    "examples_per_class": "shots",
    "selection": "shots and seeds",
    "model.path": "models",
    "model.from_scratch": "models",
    "model.title": "the name of a model",
    "data.dataset": "the name of a target",
    **dict.fromkeys(TARGET_KEYS, "targets"),
}
"""Keys of a fine-tuning run that a sweep sets itself, and by what."""


@dataclass(frozen=True, kw_only=True)
class SweepModelConfig:
    """What runs start from."""

    name: str | None = None
    """In results and folders; null: that of its folder or file."""
    path: str = SCRATCH
    """A pre-trained model, as model.path of a fine-tuning run; scratch: drawn values."""
    like: str | None = None
    """Of scratch: name of the model whose network and normalisation it has. null: the first that has a path."""
    pretrain_config: str | None = None
    """The configuration it was pre-trained with, where the model itself does not say."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of its fine-tuning runs, such as {optimizer.lr: 0.03}."""


@dataclass(frozen=True, kw_only=True)
class SweepTargetConfig:
    """What runs transfer to: one of images, shards, source with root, or what config names."""

    name: str | None = None
    """In results and folders; null: what a fine-tuning run would call it."""
    images: str | None = None
    """A folder of images."""
    shards: str | None = None
    """A folder made by make_shards, or its URL."""
    source: str | None = None
    """An official data set, read from its own files in root."""
    root: str | None = None
    """The folder of that data set."""
    config: str | list[str] | None = None
    """A fine-tuning configuration, or several, of which later ones win."""
    shots: list[int | str] | None = None
    """In place of the sweep's."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of its fine-tuning runs."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of fine-tuning runs. Overrides of models win over those of targets, and these over the common ones."""

    models: list[Any]
    """What runs start from: each scratch, a path, or a mapping of name, path, like, pretrain_config, overrides."""
    targets: list[Any]
    """What runs transfer to: each a folder of images, or a mapping of name, images, shards, source and root, config,
    shots, overrides."""
    shots: list[int | str] = field(default_factory=lambda: [FULL])
    """Training images a class; full: all."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Each draws its own images; models are compared seed by seed."""
    config: str | list[str] | None = None
    """A fine-tuning configuration, or several, that all runs begin with."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of all fine-tuning runs."""
    keep: Literal["all", "model"] = "model"
    """What a finished run leaves beside its results. model: its network, without the checkpoints."""

    def __post_init__(self) -> None:
        for key in ("models", "targets", "shots", "seeds"):
            check(bool(getattr(self, key)), key, getattr(self, key), "a list of one or more")
        check_shots("shots", self.shots)
        ok = len(set(self.seeds)) == len(self.seeds) and all(seed >= 0 for seed in self.seeds)
        check(ok, "seeds", self.seeds, "different numbers of 0 or more")


def check_shots(key: str, shots: Sequence[int | str]) -> None:
    """ConfigError for what is neither a number of images nor "full", and for what is there twice."""
    ok = all(shot == FULL or (isinstance(shot, int) and not isinstance(shot, bool) and shot >= 1) for shot in shots)
    check(ok and len(set(shots)) == len(shots), key, list(shots), f"different numbers of 1 or more, or {FULL}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, read: every model and target with its name."""

    path: Path
    common: SweepConfig
    models: dict[str, SweepModelConfig]
    targets: dict[str, SweepTargetConfig]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file; nothing that it names is opened.

    Raises:
        ValueError: an unknown key, a value that may not be, or a name that is there twice or cannot be a folder's.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {path}")
    common = files.build(SweepConfig, files.read_file(path, SweepConfig))
    models = [_entry(SweepModelConfig, one, "path", f"{path}: models[{n}]") for n, one in enumerate(common.models)]
    targets = [
        _entry(SweepTargetConfig, one, "images", f"{path}: targets[{n}]") for n, one in enumerate(common.targets)
    ]
    for target in targets:
        if target.shots is not None:
            check_shots(f"{path}: shots of a target", target.shots)
    named = _named(path, "models", [(m.name or _model_name(m), m) for m in models])
    for name, model in named.items():
        if model.like is not None and (model.like not in named or named[model.like].path == SCRATCH):
            known = [other for other, m in named.items() if m.path != SCRATCH]
            raise ValueError(
                f"{path}: model {name} is like {model.like!r}, which is no model with a path"
                f"{files.nearest(model.like, known)}: there are {', '.join(known) or 'none'}"
            )
        if model.like is not None and model.path != SCRATCH:
            raise ValueError(f"{path}: model {name} has both path and like: like is for path: {SCRATCH}")
    return Sweep(
        path=path,
        common=common,
        models=named,
        targets=_named(path, "targets", [(t.name or _target_name(t), t) for t in targets]),
    )


def _entry(cls: type[Any], entry: Any, short: str, origin: str) -> Any:
    if isinstance(entry, str):
        entry = {short: entry}
    if not isinstance(entry, dict):
        raise ValueError(
            f"{origin} must be text or a mapping of {', '.join(files.hints(cls))}, not {files.shown(entry)}"
        )
    return files.build(cls, files.flatten(entry, cls, origin, {}))


def _model_name(model: SweepModelConfig) -> str:
    """As results call it by themselves: a folder "model" is that of the run above."""
    path = Path(model.path)
    name = path.name.removesuffix(".tar")
    name = name.rpartition(".")[0] if path.suffix in (".tar", ".npz", ".safetensors", ".pth", ".pt") else name
    return path.parent.name if name == "model" else name


def _target_name(target: SweepTargetConfig) -> str:
    config = [target.config] if isinstance(target.config, str) else target.config or []
    if target.images or target.shards:
        return Path((target.images or target.shards or "").rstrip("/")).name
    return target.source or (Path(config[-1]).stem if config else "")


def _named(path: Path, kind: str, entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """By name; file systems may take names that differ in case only for one."""
    found: dict[str, Any] = {}
    for number, (name, entry) in enumerate(entries):
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{path}: {kind}[{number}] is called {name!r}, which is to be a folder's name: give it a name of "
                "letters, digits, '.', '_', '+' and '-'"
            )
        if name.casefold() in (other.casefold() for other in found):
            raise ValueError(f"{path}: two {kind} are called {name}: give one of them another name")
        found[name] = entry
    return found


def override_values(overrides: Mapping[str, Any], cls: type, origin: str) -> dict[str, Value]:
    """Overrides, nested or with dots, as the values of a configuration.

    Raises:
        ValueError: an unknown key, or one that the sweep sets itself.
    """
    values: dict[str, Value] = {}
    for name, value in overrides.items():
        data: Any = value
        for part in reversed(str(name).split(".")):
            data = {part: data}
        values |= files.flatten(data, cls, f"{origin}: overrides", {})
    for key in values:
        if key in OWN:
            raise ValueError(f"{origin}: overrides set {key}, which a sweep sets itself: use {OWN[key]}")
    return values
