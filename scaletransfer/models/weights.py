"""Reading checkpoints of the published forms, and fitting them to a model.

Google's arrays come out in the names of our BiT, which are those of the published PyTorch checkpoints; other files
keep theirs. `files` opens them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from scaletransfer.models import create_model, head_names
from scaletransfer.models.bit import parse_name
from scaletransfer.models.convolution import TIMM_WS_EPS
from scaletransfer.models.files import Entry, open_weights

StateDict = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
V = TypeVar("V")


def load_pretrained(path: str | Path, *, model_name: str | None = None) -> tuple[StateDict, dict[str, Any]]:
    """Read a checkpoint and return (state_dict on the CPU, metadata).

    `path` may be a folder with `model.safetensors` or else `model.pth.tar` (or one `.npz`), a `.safetensors`
    file, a published `model.pth.tar` (a dict with `model`, names perhaps behind `module.`; a bare state_dict
    is taken too), one of Google's `.npz` files, or a file of timm's `resnetv2_*_bit`. Metadata is the content
    of the `.json` beside a safetensors file; for the others what is known: `format`, and `epoch` where the file
    has it. A BiT without a model.json that names it also has `ws_eps`, timm's.
    `model_name` is used to check `model.json`, where both are there: another architecture is an error.

    Raises ValueError (the file and the reason) when the file is not of such a form, is damaged, or holds
    pickled objects other than tensors and plain values: such a file is not loaded, and nothing in it runs.
    Raises FileNotFoundError when there is no such path.
    """
    file = locate(Path(path))
    opened = open_weights(file)
    entries, meta = opened.entries, dict[str, Any]()
    if opened.form == "npz":
        entries, meta = from_google(entries, file), {"format": "google-npz"}
    else:
        meta = card_beside(file)
    if opened.form == "pytorch" and not meta:
        meta = {"format": "pytorch"}
        if opened.epoch is not None:
            meta["epoch"] = opened.epoch
    found = meta.get("model")
    if is_timm_bit(entries) and (found is None or parse_name(str(found)) is not None):
        entries = from_timm(entries)
        if found is None:
            meta = {**meta, "format": "timm"}
    if found is None and "root.conv.weight" in entries:
        # In whatever names: no file says its eps, the same weights shall give the same logits, and timm's code is the
        # one that everybody can compare with. Google's and the published code add 1e-10.
        meta = {"ws_eps": TIMM_WS_EPS, **meta}
    if model_name is not None and isinstance(found, str) and not same_network(found, model_name):
        raise ValueError(f"{file} holds {found}, but {model_name} was asked for{_difference(entries, model_name)}.")
    return {name: entry.read() for name, entry in entries.items()}, meta


def _difference(entries: Mapping[str, Entry], model_name: str) -> str:
    """ ": <the first tensor that differs>" from a network of that name with this head; "" where there is none."""
    head = entries.get("head.conv.weight")
    if parse_name(model_name) is None or head is None:
        return ""
    with torch.device("meta"):
        skeleton = create_model(model_name, head.shape[0])
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    found = first_difference({name: entry.shape for name, entry in entries.items()}, shapes)
    return found and f": {found}"


def same_network(one: str, other: str) -> bool:
    """Whether two names stand for one network: BiT-S and BiT-M of a size differ in what they were trained on."""
    first, second = parse_name(one), parse_name(other)
    if first is None or second is None:
        return one == other
    return (first.units, first.base) == (second.units, second.base)


def network_options(card: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_model` must be told beside name and classes to build the network that a model.json describes: the
    `ws_eps` of weights that were trained with another than ours."""
    return {"ws_eps": float(card["ws_eps"])} if card.get("ws_eps") is not None else {}


def first_difference(given: Shapes, wanted: Shapes) -> str:
    """The first tensor of a network, in its order, that a file does not have or has in another shape, or else the
    first that the network does not have; "" where both agree."""
    for name, shape in wanted.items():
        if name not in given:
            return f"{name} {tuple(shape)} is missing"
        if tuple(given[name]) != tuple(shape):
            return f"{name} is {tuple(given[name])} in the file and {tuple(shape)} in the network"
    foreign = next((name for name in given if name not in wanted), None)
    return "" if foreign is None else f"{foreign} {tuple(given[foreign])} has no place in the network"


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


def architecture_of(state: Mapping[str, Tensor | Entry]) -> str | None:
    """The name `BiT-S-R<depth>x<width>` (or `BiT-tiny`) of the network that these tensors are of, from the number of
    units in each block and the width of the root; None where they are of no BiT that has a name."""
    root = state.get("root.conv.weight")
    if root is None or len(root.shape) != 4:
        return None
    width = root.shape[0]
    counts: dict[str, set[str]] = {}
    for name in state:
        if match := re.match(r"body\.block([1-4])\.unit(\d\d)\.", name):
            counts.setdefault(match[1], set()).add(match[2])
    units = tuple(len(counts.get(block, ())) for block in "1234")
    names = ["BiT-tiny", *(f"BiT-S-R{depth}x{max(1, width // 64)}" for depth in (50, 101, 152))]
    for name in names:
        known = parse_name(name)
        if known is not None and (known.units, known.base) == (units, width):
            return name
    return None


def is_timm_bit(names: Mapping[str, Any]) -> bool:
    """Whether these are the names of timm's `resnetv2_*_bit`, all of them."""
    try:
        return bool(names) and bool(from_timm(names))
    except ValueError:
        return False


def to_timm(state: Mapping[str, V]) -> dict[str, V]:
    """Rename our BiT tensors to those of timm's `resnetv2_*_bit`, which computes the same but for eps 1e-8.

    Raises ValueError for a name that is not of our BiT.
    """
    return {_to_timm_name(name): value for name, value in state.items()}


def from_timm(state: Mapping[str, V]) -> dict[str, V]:
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


def stem_of(file: Path) -> str:
    """The name without its suffix: "model" of model.pth.tar and of model.safetensors."""
    return file.name.removesuffix(".tar").rpartition(".")[0]


def card_beside(file: Path) -> dict[str, Any]:
    """The content of the .json of the same name beside a file of weights, {} where there is none.

    Of another file than a safetensors one, {} as well where it isn't a model.json of ours that describes this file.
    Raises ValueError where it is damaged, or describes another safetensors file.
    """
    beside = file.with_name(stem_of(file) + ".json")
    if not beside.is_file():
        return {}
    try:
        meta = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not valid JSON: {error}.") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{beside} must hold one JSON object.")
    if file.suffix != ".safetensors" and not (meta.get("format") == "scaletransfer-model" and "sha256" in meta):
        return {}
    if isinstance(meta.get("sha256"), str):
        with file.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found != meta["sha256"]:
            if file.suffix != ".safetensors":
                return {}
            raise ValueError(f"{file} is not the file that {beside.name} describes (sha256): copy or export it again.")
    return meta


def from_google(entries: Mapping[str, Entry], file: Path) -> dict[str, Entry]:
    """The arrays of one of Google's BiT .npz files in our names. ValueError for one that has no place in BiT."""
    made = {}
    for key, entry in entries.items():
        name = _from_google_name(key)
        if name is None:
            raise ValueError(f"{file} is not a BiT .npz file of plain arrays: the array {key!r} has no place in BiT.")
        if len(entry.shape) == 4:
            # TensorFlow keeps kernels as height, width, in, out.
            height, width, c_in, c_out = entry.shape
            entry = Entry(shape=(c_out, c_in, height, width), dtype=entry.dtype, read=_out_first(entry.read))
        made[name] = entry
    return made


def _out_first(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: read().permute(3, 2, 0, 1).contiguous()


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
