"""A model folder of ours in the forms of others: what timm loads, what the published code loads, ONNX."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scaletransfer.export_onnx import write_onnx
from scaletransfer.model_folder import FORMAT, WEIGHTS, as_float32, new_folder, write_card, write_weights, writing
from scaletransfer.models.bit import parse_name
from scaletransfer.models.convolution import TIMM_WS_EPS
from scaletransfer.models.files import Entry, open_weights
from scaletransfer.models.weights import card_beside, from_timm, is_timm_bit, locate, stem_of, to_timm

PICKLED = (".pth", ".tar", ".pt", ".bin")
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "safetensors": (WEIGHTS, (".safetensors",)),
    "timm": (WEIGHTS, (".safetensors", *PICKLED)),
    "published": ("model.pth.tar", PICKLED),
    "onnx": ("model.onnx", (".onnx",)),
}
"""Format -> the file's name in a folder, and the suffixes by which --to is a file itself."""
_OUR_WS_EPS = 1e-10


def convert(model: Path, to: Path, form: str) -> list[str]:
    """Write the exported model ``model`` (its folder, or its model.safetensors) as ``form`` of FILES to the folder or
    file ``to``, with its model.json; what is to be known of it, a line each.

    Raises:
        ValueError: no exported model, a network that the form does not have, a target that is there already, packages
            that are not installed, an ONNX file that does not compute the same.
    """
    file = locate(model)
    entries, card = open_weights(file).entries, card_beside(file)
    if card.get("format") != FORMAT:
        raise ValueError(
            f"{model} has no model.json of ours, so what its outputs mean is not known: bring it in first with "
            "scaletransfer import"
        )
    if is_timm_bit(entries) and parse_name(str(card["model"])) is not None:
        entries = from_timm(entries)
    said = _check(card, form)
    name, suffixes = FILES[form]
    if to.suffix.lower() not in suffixes:
        with new_folder(to) as folder:
            said += _write(folder / name, to / name, entries, card, form)
        return said
    for path in (to, to.with_name(stem_of(to) + ".json")):
        if path.exists():
            raise ValueError(f"{path} is there already: give another file to --to, or remove it first")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as made:
        said += _write(Path(made) / to.name, to, entries, card, form)
        for path in sorted(Path(made).iterdir(), key=lambda path: path.name == to.name):  # the file itself last
            os.replace(path, to.with_name(path.name))
    return said


def _check(card: Mapping[str, Any], form: str) -> list[str]:
    """Notes on what the form computes else; ValueError where it has no such network."""
    architecture = parse_name(str(card["model"]))
    if form in ("published", "timm") and architecture is None:
        raise ValueError(f"{card['model']} is no BiT: --format {form} is for BiT; use safetensors or onnx")
    if form == "timm" and not timm_name(str(card["model"])):
        raise ValueError(f"timm has no network of {card['model']}'s size: use safetensors or onnx")
    eps = card.get("ws_eps") or _OUR_WS_EPS
    theirs = {"timm": TIMM_WS_EPS, "published": _OUR_WS_EPS}.get(form, eps)
    if eps == theirs:
        return []
    return [
        f"note: {form} standardises weights with eps {theirs:g}, this model was made with {eps:g}: its logits there "
        "differ in about the fourth decimal (docs/MODELS.md says how to set it)"
    ]


def timm_name(model: str) -> str | None:
    """resnetv2_<depth>x<width>_bit, the network of timm that computes what this BiT does; None where it has none."""
    size = model.rpartition("-R")[2]
    return f"resnetv2_{size}_bit" if size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4") else None


def _write(path: Path, shown: Path, entries: dict[str, Entry], card: dict[str, Any], form: str) -> list[str]:
    if form == "onnx":
        with writing(shown):
            said = write_onnx(path, entries, card)
    elif form == "published" or path.suffix in PICKLED:
        state = {name: as_float32(name, entry.read) for name, entry in entries.items()}
        epoch = card.get("provenance", {}).get("imported", {}).get("epoch")
        with writing(shown):
            if form == "timm":
                torch.save(to_timm(state), path)
            else:
                torch.save({"model": state, **({"epoch": epoch} if epoch is not None else {})}, path)
        said = []
    else:
        named = to_timm(entries) if form == "timm" else entries
        write_weights(path.parent, shown.parent, named, path.name)
        said = []
    if form == "timm":
        said.append(
            f"timm: create_model({timm_name(str(card['model']))!r}, num_classes={card['num_classes']}, "
            f"checkpoint_path={str(shown)!r})"
        )
    elif form == "published":
        said.append("the published code: its dict has the entry 'model', in the published names")
    with path.open("rb") as handle:
        card = {**card, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    write_card(path.parent, card, stem_of(path) + ".json")
    return said
