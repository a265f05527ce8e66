"""The runs of a sweep, and whether all of them can start: every model, target and pair is opened once beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scaletransfer.config import FinetuneConfig, PretrainConfig, find_config, load_config
from scaletransfer.config.files import Value, build, read_file
from scaletransfer.config.sweep import FULL, SCRATCH, TARGET_KEYS, Sweep, SweepModelConfig, override_values
from scaletransfer.transfer.data import Target, open_target
from scaletransfer.transfer.network import Pretrained, decide_head, open_pretrained
from scaletransfer.transfer.selection import select

RUNS = "runs"
DIGESTS = ("the weights of the model", "the images of the target")
# What may differ between two starts of a sweep: none of it changes a result.
_FREE: tuple[str, ...] = (
    "data.cache",
    "data.cache_gb",
    "data.workers",
    "data.prefetch_mb",
    "data.check_images",
    "data.salt_file",
)
_FREE += ("memory_gb", "checkpoint", "log", "failing", "model.path", *TARGET_KEYS)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning run of a sweep."""

    target: str
    model: str
    shot: int | None
    seed: int
    folder: Path
    cfg: FinetuneConfig
    pretrain: PretrainConfig | None = None
    pretrain_name: str | None = None
    weights: str = ""
    """sha256 of what it starts from."""
    index: str = ""
    """sha256 of what it trains on."""
    skipped: str = ""
    """Why it cannot be: a class has too few images."""

    @property
    def title(self) -> str:
        """Its place in the grid, which is that of its folder."""
        return place(self.target, self.model, self.shot, self.seed)

    def asked(self) -> dict[str, Any]:
        """What decides its result, by key."""
        values = dict(_leaves(asdict(self.cfg)))
        free = tuple(f"{key}." for key in _FREE)
        kept = {key: value for key, value in values.items() if key not in _FREE and not key.startswith(free)}
        return {**kept, **dict(zip(DIGESTS, (self.weights, self.index), strict=True))}


def place(target: str, model: str, shot: int | None, seed: int) -> str:
    """The folder of a run below runs/."""
    return f"{target}/{model}/{shot_name(shot)}/seed{seed}"


def shot_name(shot: int | None) -> str:
    """As published tables have it."""
    return "full_shot" if shot is None else f"{shot}_shot"


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def make_grid(sweep: Sweep, out: Path, given: dict[str, Any]) -> list[Run]:
    """All runs, in the order in which they are started: a whole comparison of one seed before the next.

    given: keys of all runs that neither the sweep file nor its configurations need to set, with their values.

    Raises:
        ValueError: a key that there is not, or a value that it may not have.
    """
    runs = []
    for target_name, target in sweep.targets.items():
        for seed in sweep.common.seeds:
            for asked in target.shots or sweep.common.shots:
                shot = None if asked == FULL else int(asked)
                for model_name in sweep.models:
                    runs.append(_run(sweep, out, given, target_name, model_name, shot, seed))
    return runs


def _run(
    sweep: Sweep, out: Path, given: dict[str, Any], target_name: str, model_name: str, shot: int | None, seed: int
) -> Run:
    target, model = sweep.targets[target_name], sweep.models[model_name]
    origin = str(sweep.path)
    values = {key: Value(value, "by default") for key, value in given.items()}
    for paths in (sweep.common.config, target.config):
        for path in [paths] if isinstance(paths, str) else paths or []:
            values |= read_file(find_config(path), FinetuneConfig)
    values |= override_values(sweep.common.overrides, FinetuneConfig, origin)
    values |= override_values(target.overrides, FinetuneConfig, f"{origin}: target {target_name}")
    values |= override_values(model.overrides, FinetuneConfig, f"{origin}: model {model_name}")
    like = _like(sweep, model)
    own = {
        "seed": seed,
        "examples_per_class": shot,
        "selection": None,
        "model.path": like.path if like is not None else None,
        "model.from_scratch": model.path == SCRATCH,
        "model.title": model_name,
        "data.dataset": target_name,
    }
    for key in ("images", "shards", "source", "root"):
        if getattr(target, key) is not None:
            own[f"data.{key}"] = getattr(target, key)
    values |= {key: Value(value, f"{origin}: {model_name} on {target_name}") for key, value in own.items()}
    config = model.pretrain_config or (like.pretrain_config if like is not None else None)
    return Run(
        target=target_name,
        model=model_name,
        shot=shot,
        seed=seed,
        folder=out / RUNS / place(target_name, model_name, shot, seed),
        cfg=build(FinetuneConfig, values),
        pretrain=None if config is None else load_config([config], (), PretrainConfig),
        pretrain_name=None if config is None else Path(config).stem,
    )


def _like(sweep: Sweep, model: SweepModelConfig) -> SweepModelConfig | None:
    """The model whose file is opened: its own, or of drawn values that of which they have the network."""
    if model.path != SCRATCH:
        return model
    if model.like is not None:
        return sweep.models[model.like]
    says = "model.name" in model.overrides or "name" in model.overrides.get("model", {}) or model.pretrain_config
    return None if says else next((other for other in sweep.models.values() if other.path != SCRATCH), None)


def check_grid(sweep: Sweep, runs: list[Run]) -> list[Run]:
    """The same runs with the digests of what they start from and train on; those that cannot be are marked.

    Targets are listed, models are read once each; no image is decoded.

    Raises:
        ValueError: a target or model that is not there or cannot be used, or that do not fit each other.
    """
    targets: dict[str, Target] = {}
    short: dict[tuple[str, int | None], str] = {}
    networks: dict[str, str] = {}
    start: Pretrained | None = None
    opened = ""
    checked: dict[int, Run] = {}
    # model by model, as the weights of one alone may fill the memory
    for number, run in sorted(enumerate(runs), key=lambda pair: (list(sweep.models).index(pair[1].model), pair[0])):
        cfg = run.cfg
        data = repr((cfg.data, cfg.train_dir, cfg.val_dir, cfg.nb_classes))
        if data not in targets:
            targets[data] = _named(sweep, f"target {run.target}", lambda cfg=cfg: open_target(cfg))
        target = targets[data]
        key = repr((run.model, cfg.model, cfg.data.mean, cfg.data.std))
        if key != opened:
            start = None  # before the next one is read
            start = _named(
                sweep,
                f"model {run.model}",
                lambda run=run: open_pretrained(run.cfg, run.pretrain, run.pretrain_name),
            )
            opened = key
        assert start is not None
        networks[run.model] = start.model
        pair = f"model {run.model} on target {run.target}"
        _named(
            sweep, pair, lambda cfg=cfg, start=start, target=target: decide_head(cfg.model.head, start, target.names)
        )
        known = (data + repr(cfg.allow_fewer), run.shot)
        if known not in short:
            short[known] = _too_few(target, cfg, run.shot)
        checked[number] = replace(run, weights=start.digest, index=target.index.digest, skipped=short[known])
    _check_scratch(sweep, networks)
    return [checked[number] for number in range(len(runs))]


def _named(sweep: Sweep, what: str, function: Any) -> Any:
    try:
        return function()
    except (ValueError, OSError) as error:
        from scaletransfer.cli import sentence_of

        raise ValueError(f"{sweep.path}: {what}: {sentence_of(error)}") from error


def _too_few(target: Target, cfg: FinetuneConfig, shot: int | None) -> str:
    """Why a class cannot give so many images; "" where all can, as every seed draws as many."""
    split = cfg.data.train_split
    try:
        found = target.targets(split)
        select(target.index, split, found, target.names, shot=shot, seed=0, allow_fewer=cfg.allow_fewer)
    except ValueError as error:
        return str(error)
    return ""


def _check_scratch(sweep: Sweep, networks: dict[str, str]) -> None:
    """ValueError where drawn values would be compared with networks of another kind without anybody having said so."""
    for name, model in sweep.models.items():
        others = {networks[other] for other, m in sweep.models.items() if m.path != SCRATCH}
        if model.path == SCRATCH and model.like is None and _like(sweep, model) is not None and len(others) > 1:
            raise ValueError(
                f"{sweep.path}: model {name} is drawn, but the others are of several networks "
                f"({', '.join(sorted(others))}): say which by like: NAME, one such model for each"
            )
