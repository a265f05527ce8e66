"""Reading checkpoints of the published forms, and fitting them to a model.

Everything comes out in the names of our BiT, which are those of the published PyTorch checkpoints. No file is
ever unpickled beyond plain tensors: `torch.load(weights_only=True)`, `np.load(allow_pickle=False)`,
safetensors.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scaletransfer.models import head_names
from scaletransfer.models.bit import parse_name

StateDict = dict[str, Tensor]
_PICKLES = (".tar", ".pth", ".pt", ".bin", ".ckpt")


def load_pretrained(path: str | Path, *, model_name: str | None = None) -> tuple[StateDict, dict[str, Any]]:
    """Read a checkpoint and return (state_dict on the CPU, metadata).

    `path` may be a folder with `model.safetensors` or else `model.pth.tar` (or one `.npz`), a `.safetensors`
    file, a published `model.pth.tar` (a dict with `model`, names perhaps behind `module.`; a bare state_dict
    is taken too), or one of Google's `.npz` files. Metadata is the content of the `.json` beside a
    safetensors file ({} where there is none); for the others what is known: `format`, and `epoch` where the
    file has it. `model_name` is used to check `model.json`, where both are there: another architecture is an
    error.

    Raises ValueError (the file and the reason) when the file is not of such a form, is damaged, or holds
    pickled objects other than tensors and plain values: such a file is not loaded, and nothing in it runs.
    Raises FileNotFoundError when there is no such path.
    """
    file = locate(Path(path))
    if file.suffix == ".safetensors":
        state, meta = _load_safetensors(file)
    elif file.suffix == ".npz":
        state, meta = _load_npz(file)
    elif file.suffix in _PICKLES:
        state, meta = _load_torch(file)
    else:
        raise ValueError(f"{file}: unknown kind of checkpoint; known are .safetensors, .npz and {', '.join(_PICKLES)}.")
    found = meta.get("model")
    if model_name is not None and isinstance(found, str) and found != model_name:
        raise ValueError(f"{file} holds {found}, but {model_name} was asked for.")
    return state, meta


def load_into(model: nn.Module, state: StateDict, head: Literal["strict", "replace"] = "strict") -> None:
    """Copy `state` into `model` in place, in the model's dtype and on its device.

    head "strict": every name and shape must agree. "replace": the classifier (`head_names`) keeps the model's
    own values whatever the checkpoint has there, as for a new set of classes; all else must agree.
    Raises ValueError that lists missing and unexpected names and differing shapes; the model is then
    untouched.
    """
    if head not in ("strict", "replace"):
        raise ValueError(f"head must be 'strict' or 'replace', not {head!r}.")
    own = model.state_dict()
    classifier = head_names(model)
    skipped = classifier if head == "replace" else ()
    wanted = {name: value for name, value in own.items() if name not in skipped}
    given = {name: value for name, value in state.items() if name not in skipped}
    problems = []
    if missing := [name for name in wanted if name not in given]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [name for name in given if name not in wanted]:
        problems.append(f"unexpected {_some(unexpected)}")
    differing = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if differing:
        problems.append(f"wrong shape of {_some(differing)}")
    if problems:
        hint = ""
        if head == "strict" and differing and classifier and all(text.startswith(classifier) for text in differing):
            hint = " (head='replace' keeps a new head for another number of classes)"
        raise ValueError(f"The checkpoint does not fit the model: {'; '.join(problems)}{hint}.")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(given[name])


def architecture_of(state: StateDict) -> str | None:
    """The name `BiT-S-R<depth>x<width>` (or `BiT-tiny`) of the network that these tensors are of, from the number of
    units in each block and the width of the root; None where they are of no BiT that has a name."""
    root = state.get("root.conv.weight")
    if root is None:
        return None
    counts: dict[str, set[str]] = {}
    for name in state:
        if match := re.match(r"body\.block([1-4])\.unit(\d\d)\.", name):
            counts.setdefault(match[1], set()).add(match[2])
    units = tuple(len(counts.get(block, ())) for block in "1234")
    names = ["BiT-tiny", *(f"BiT-S-R{depth}x{max(1, len(root) // 64)}" for depth in (50, 101, 152))]
    for name in names:
        known = parse_name(name)
        if known is not None and (known.units, known.base) == (units, len(root)):
            return name
    return None


def to_timm(state: StateDict) -> StateDict:
    """Rename our BiT tensors to those of timm's `resnetv2_*_bit`, which computes the same but for eps 1e-8.

    Raises ValueError for a name that is not of our BiT.
    """
    return {_to_timm_name(name): value for name, value in state.items()}


def from_timm(state: StateDict) -> StateDict:
    """Rename the tensors of timm's `resnetv2_*_bit` to ours. Raises ValueError for any other name."""
    return {_from_timm_name(name): value for name, value in state.items()}


# Outside the residual units: ours -> timm.
_TIMM = {
    "root.conv.weight": "stem.conv.weight",
    "head.gn.weight": "norm.weight",
    "head.gn.bias": "norm.bias",
    "head.conv.weight": "head.fc.weight",
    "head.conv.bias": "head.fc.bias",
}
_OURS = {theirs: ours for ours, theirs in _TIMM.items()}


def _to_timm_name(name: str) -> str:
    if name in _TIMM:
        return _TIMM[name]
    match = re.fullmatch(r"body\.block(\d)\.unit(\d\d)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise ValueError(f"{name} is not the name of a BiT tensor.")
    part = "downsample.conv" if match[3] == "downsample" else match[3].replace("gn", "norm")
    # timm counts blocks and units from 0.
    return f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{part}.{match[4]}"


def _from_timm_name(name: str) -> str:
    if name in _OURS:
        return _OURS[name]
    match = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(norm\d|conv\d|downsample\.conv)\.(weight|bias)", name)
    if match is None:
        raise ValueError(f"{name} is not the name of a tensor of timm's resnetv2_*_bit.")
    part = "downsample" if match[3] == "downsample.conv" else match[3].replace("norm", "gn")
    return f"body.block{int(match[1]) + 1}.unit{int(match[2]) + 1:02d}.{part}.{match[4]}"


def locate(path: Path) -> Path:
    """The file that `load_pretrained` reads for `path`. ValueError or FileNotFoundError where there is none."""
    if path.is_dir():
        for name in ("model.safetensors", "model.pth.tar"):
            if (path / name).is_file():
                return path / name
        found = sorted(path.glob("*.npz"))
        if len(found) == 1:
            return found[0]
        raise ValueError(f"{path} holds no model.safetensors, no model.pth.tar and not exactly one .npz file.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint.")
    return path


def _load_safetensors(file: Path) -> tuple[StateDict, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}.") from error
    beside = file.with_suffix(".json")
    if not beside.is_file():
        return state, {}
    try:
        meta = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not valid JSON: {error}.") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{beside} must hold one JSON object.")
    if isinstance(meta.get("sha256"), str):
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != meta["sha256"]:
            raise ValueError(f"{file} is not the file that {beside.name} describes (sha256): copy or export it again.")
    return state, meta


def _load_torch(file: Path) -> tuple[StateDict, dict[str, Any]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text suggests weights_only=False, the one thing not to do with a stranger's file.
        found = re.search(r"(?:GLOBAL|function) ([\w.]+)", str(error))
        what = f" (it asks for {found[1]})" if found else ""
        raise ValueError(
            f"{file} was refused and nothing in it was run: it is damaged or holds pickled objects "
            f"other than tensors, which could execute code{what}; have it exported as safetensors."
        ) from error
    except (RuntimeError, EOFError, struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a readable PyTorch checkpoint: {first}.") from error
    state: Any = content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        state = content["model"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file} holds neither a state_dict nor a dict with the entry 'model'.")
    strange = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"{file}: the entries {_some([str(s) for s in strange])} of its state_dict are not tensors.")
    # DistributedDataParallel leaves its prefix on every name.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    meta: dict[str, Any] = {"format": "pytorch"}
    if isinstance(content, dict) and isinstance(content.get("epoch"), int):
        meta["epoch"] = content["epoch"]
    return dict(state), meta


def _load_npz(file: Path) -> tuple[StateDict, dict[str, Any]]:
    state: StateDict = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                value = arrays[key]
                if not isinstance(value, np.ndarray):  # numpy gives any other member of the zip as bytes
                    raise ValueError(f"the member {key!r} is no array")
                if value.ndim == 4:
                    # TensorFlow keeps kernels as height, width, in, out.
                    value = value.transpose(3, 2, 0, 1)
                name = _from_google_name(key)
                if name is None:
                    raise ValueError(f"the array {key!r} has no place in BiT")
                state[name] = torch.from_numpy(np.ascontiguousarray(value))
    except (ValueError, zipfile.BadZipFile, EOFError, TypeError) as error:
        raise ValueError(f"{file} is not a BiT .npz file of plain arrays: {error}.") from error
    return state, {"format": "google-npz"}


def _from_google_name(key: str) -> str | None:
    fixed = {
        "root_block/standardized_conv2d/kernel": "root.conv.weight",
        "group_norm/gamma": "head.gn.weight",
        "group_norm/beta": "head.gn.bias",
        "head/conv2d/kernel": "head.conv.weight",
        "head/conv2d/bias": "head.conv.bias",
    }
    name = key.removeprefix("resnet/")
    if name in fixed:
        return fixed[name]
    match = re.fullmatch(
        r"block(\d)/unit(\d\d)/([abc])/(proj/)?(standardized_conv2d/kernel|group_norm/gamma|group_norm/beta)",
        name,
    )
    if match is None or (match[4] and match[3] != "a"):
        return None
    stage = "abc".index(match[3]) + 1
    unit = f"body.block{match[1]}.unit{match[2]}"
    if match[5].startswith("standardized_conv2d"):
        return f"{unit}.downsample.weight" if match[4] else f"{unit}.conv{stage}.weight"
    if match[4]:
        return None
    return f"{unit}.gn{stage}.{'weight' if match[5].endswith('gamma') else 'bias'}"


def _some(names: list[str], limit: int = 5) -> str:
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
