"""A model's folder, model.safetensors and model.json: written complete or not at all, one tensor in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletransfer.models.files import Entry
from scaletransfer.tensor_file import write_tensors

WEIGHTS, CARD = "model.safetensors", "model.json"
FORMAT = "scaletransfer-model"
FORMAT_VERSION = 1


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder that becomes `to` when the block ends, and vanishes when it fails.

    Raises ValueError where `to` is a file or holds something already.
    """
    to = Path(os.path.abspath(to))  # "." has no name to put a temporary folder beside
    if to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file: give a folder to --to")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} is not empty: give another folder to --to, or remove it first")
    temporary = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if to.exists():
            to.rmdir()
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside, such as a full disk, says which file could not be written."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" not in str(error):  # torch.save's writer, which does not say what the system said
            raise
        raise OSError(f"{path} cannot be written (is the disk full?): nothing was exported") from error
    except OSError as error:
        if error.filename not in (None, str(path)):  # something else could not be read
            raise
        raise OSError(f"{path} cannot be written ({error.strerror or error}): nothing was exported") from error


def write_card(folder: Path, card: Mapping[str, Any], name: str = CARD) -> None:
    """model.json."""
    (folder / name).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def write_weights(folder: Path, shown: Path, entries: Mapping[str, Entry], name: str = WEIGHTS) -> str:
    """A safetensors file in float32, tensor by tensor; the file's sha256. shown: the folder as the user knows it.

    Raises ValueError for a tensor that is no floating-point one, or has no finite value as float32; OSError where it
    cannot be written.
    """
    layout = {tensor: ("F32", entry.shape) for tensor, entry in entries.items()}

    def values() -> Iterator[np.ndarray]:
        for tensor, entry in entries.items():
            yield as_float32(tensor, entry.read).numpy()

    try:
        with writing(folder / name):
            return write_tensors(folder / name, layout, values())
    except OSError as error:
        raise OSError(str(error).replace(str(folder), str(shown))) from error


def as_float32(name: str, read: Callable[[], Tensor]) -> Tensor:
    """The tensor in float32, bit for bit where it was that, or float16 or bfloat16."""
    value = read()
    if not value.is_floating_point():
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}, not a tensor of weights")
    made = value.to(torch.float32).contiguous()
    if not bool(torch.isfinite(made.sum())) and not bool(torch.isfinite(made).all()):
        raise ValueError(f"{name} holds values that are not finite: the file is damaged, or its training failed")
    return made
