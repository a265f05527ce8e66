"""Typed configuration: YAML files over shared parts, overlays, `a.b=c` overrides. Nothing here imports torch.

`schema.py` says which keys there are; `files.py` reads YAML into such dataclasses; here is what a program
calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import sysconfig
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar, overload

from scaletransfer.config import files
from scaletransfer.config.data import DataConfig, LabelPolicyConfig, RemoteConfig
from scaletransfer.config.files import ConfigError
from scaletransfer.config.finetune import (
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    FinetuneOptimizerConfig,
)
from scaletransfer.config.schema import (
    CheckpointConfig,
    FailingConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    ValidateConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "FailingConfig",
    "FinetuneConfig",
    "FinetuneDataConfig",
    "FinetuneModelConfig",
    "FinetuneOptimizerConfig",
    "LabelPolicyConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "RemoteConfig",
    "ScheduleConfig",
    "ValidateConfig",
    "accumulation",
    "config_main",
    "find_config",
    "load_config",
    "parse_args",
    "to_yaml",
]

T = TypeVar("T")
PathLike = str | os.PathLike[str]


def find_config(path: PathLike) -> Path:
    """The configuration or launch file `path`: as given, else the one that came with the package.

    `configs/x.yaml` therefore works from any directory, in a checkout (also an editable install) and from a
    wheel. Raises FileNotFoundError that names the nearest file there is.
    """
    wanted = Path(path).expanduser()
    if wanted.is_file():
        return wanted
    homes = _homes()
    if not wanted.is_absolute() and ".." not in wanted.parts:
        for home in homes:
            if (home / wanted).is_file():
                return home / wanted
    shipped = [
        str(file.relative_to(home))
        for home in homes[:1]
        for folder in ("configs", "launch")
        for file in sorted((home / folder).rglob("*.yaml"))
    ]
    here = [str(file) for file in sorted(wanted.parent.glob("*.yaml"))] if wanted.parent.is_dir() else []
    close = difflib.get_close_matches(str(wanted), [*here, *shipped], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(shipped) or 'none'}."
    raise FileNotFoundError(f"there is no configuration file {path}; {hint}")


def _homes() -> list[Path]:
    """Folders that may hold `configs/` and `launch/`, best first: the checkout, then where a wheel puts
    them."""
    checkout = Path(__file__).resolve().parents[2]
    data: list[str | Path] = [
        sysconfig.get_path("data"),
        sysconfig.get_path("data", sysconfig.get_preferred_scheme("user")),
        checkout,  # pip install --target puts share/ beside the package
    ]
    homes = [checkout] if (checkout / "setup.cfg").is_file() else []
    homes += [Path(folder) / "share" / "scaletransfer" for folder in data]
    return [home for home in homes if (home / "configs").is_dir()]


@overload
def load_config(paths: PathLike | Sequence[PathLike], overrides: Sequence[str] = ()) -> PretrainConfig: ...
@overload
def load_config(paths: PathLike | Sequence[PathLike], overrides: Sequence[str], cls: type[T]) -> T: ...
@overload
def load_config(paths: PathLike | Sequence[PathLike], overrides: Sequence[str] = (), *, cls: type[T]) -> T: ...
def load_config(
    paths: PathLike | Sequence[PathLike], overrides: Sequence[str] = (), cls: type = PretrainConfig
) -> object:
    """Read `paths` (later ones overlay earlier ones), then `overrides` such as `optimizer.base_lr=0.003`.

    Where nothing sets `name`, it is the names of the files joined by a dash, so that a run with an overlay
    has another folder than the run without. Raises FileNotFoundError for a missing file; ValueError with one
    sentence that names file, line and key for an unknown key, a wrong type or value, a YAML tag, an alias, a
    double key.
    """
    chosen = [find_config(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    values: dict[str, files.Value] = {}
    for path in chosen:
        values |= files.read_file(path, cls)
    for override in overrides:
        values |= files.read_override(override, cls)
    if chosen and "name" in files.hints(cls) and "name" not in values:
        values["name"] = files.Value("-".join(path.stem for path in chosen), "from the names of the files")
    return files.build(cls, values)


def to_yaml(cfg: object) -> str:
    """The resolved configuration as YAML; reading it gives an equal object."""
    return files.dump(cfg)


def accumulation(cfg: PretrainConfig, world: int) -> int:
    """Forward passes that one step accumulates on each of `world` ranks: global_batch / (world x
    micro_batch).

    Raises ValueError, with the nearest values that do, where that is no whole number.
    """
    once = world * cfg.micro_batch
    if cfg.global_batch % once == 0:
        return cfg.global_batch // once
    below = cfg.global_batch // once * once
    choices = f"{below} or {below + once}" if below else f"{once}"
    fitting = [m for m in range(1, cfg.micro_batch) if cfg.global_batch % (world * m) == 0]
    smaller = f", or micro_batch={fitting[-1]}" if fitting else ""
    raise ValueError(
        f"global_batch {cfg.global_batch} is not a multiple of ranks x micro_batch = {world} x "
        f"{cfg.micro_batch} = {once}: set global_batch={choices}{smaller} "
        "(the learning rate follows global_batch)."
    )


class _Parser(argparse.ArgumentParser):
    """Errors are ValueErrors (the command prints them as one line); --help ends with the keys."""

    schema: type = PretrainConfig

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")

    def format_help(self) -> str:
        return f"{super().format_help()}\n{describe(self.schema)}"


def describe(cls: type) -> str:
    """Every key of the schema with its type, its default and its documentation, as text for a terminal."""
    lines = ["keys (set them in a file, or on the command line as key=value):"]
    for key in files.keys(cls):
        default = "required" if key.default is dataclasses.MISSING else f"default {_yaml_value(key.default)}"
        lines.append(f"  {key.name}: {files.type_name(key.hint)}; {default}")
        lines += textwrap.wrap(key.doc, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _yaml_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


@overload
def parse_args(
    argv: Sequence[str] | None = None, *, prog: str | None = None, description: str | None = None
) -> tuple[PretrainConfig, argparse.Namespace]: ...
@overload
def parse_args(
    argv: Sequence[str] | None,
    cls: type[T],
    *,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[T, argparse.Namespace]: ...
def parse_args(
    argv: Sequence[str] | None = None,
    cls: type = PretrainConfig,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> tuple[object, argparse.Namespace]:
    """`[--config FILE ...] [key=value ...]` -> the configuration, and what was given (`config`, `overrides`).

    `--help` lists every key and `--print_config` prints the resolved configuration; both then raise
    SystemExit(0). Raises what `load_config` raises, and ValueError for an option that there is not.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.schema = cls
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file; give it again to overlay another, whose values win",
    )
    parser.add_argument(
        "--print_config",
        "--print-config",
        action="store_true",
        help="print the resolved configuration and stop",
    )
    resume = "checkpoint.resume"
    if cls is PretrainConfig:
        parser.add_argument("--resume", metavar="latest|FOLDER|URL", help=f"the same as {resume}=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set one key, for example seed=1")
    extras, unknown = parser.parse_known_intermixed_args(argv)
    for option in unknown:
        name = option.split("=")[0]
        dotted = name.lstrip("-").replace("-", "_")
        if dotted in {key.name for key in files.keys(cls)}:
            raise ValueError(f"unknown option {name}: an override has no dashes, write {dotted}=VALUE.")
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise ValueError(f"unknown option {name}{files.nearest(name, known)}; see --help.")
    if getattr(extras, "resume", None) is not None:
        extras.overrides = [*extras.overrides, f"{resume}={extras.resume}"]
    cfg: object = load_config(extras.config, extras.overrides, cls)
    if extras.print_config:
        if os.environ.get("RANK", "0") == "0":  # under a launcher once, not once a process
            sys.stdout.write(to_yaml(cfg))
        raise SystemExit(0)
    return cfg, extras


def config_main(argv: Sequence[str]) -> int:
    """`scaletransfer config`: print the resolved configuration."""
    description = "Print the configuration that a run with the same arguments would have."
    cfg, _ = parse_args(argv, PretrainConfig, prog="scaletransfer config", description=description)
    sys.stdout.write(to_yaml(cfg))
    return 0
