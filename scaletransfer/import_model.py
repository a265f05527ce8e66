"""Bring a model from elsewhere into a folder of ours: model.safetensors and model.json.

    scaletransfer import FILE --to pretrained_models/NAME

FILE is the published model.pth.tar (with or without its optimizer), one of Google's BiT .npz files, a file of timm's
resnetv2_*_bit (.pth, .safetensors, a folder of its hub, or a name that timm can fetch), or a folder that scaletransfer
export wrote. Which it is, is told by its content. Labels and normalisation are those given, or follow from the name,
and what followed from what is printed; where the normalisation cannot be known, nothing is imported. One tensor at a
time is in memory, whatever else the file holds. Nothing is unpickled beyond tensors and plain values.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scaletransfer.cli import CommandParser
from scaletransfer.model_facts import Facts
from scaletransfer.model_folder import FORMAT, FORMAT_VERSION, new_folder, write_card, write_weights
from scaletransfer.models import create_model
from scaletransfer.models.bit import parse_name
from scaletransfer.models.files import Entry
from scaletransfer.models.weights import architecture_of, first_difference, same_network
from scaletransfer.recognise import FORMS, HEAD, Found, recognise

PADDED = (1000, 10000)
"""Classes of ImageNet-1k, and what the published configuration of R152x4 has there, a defect: its head may be so."""


def network_of(found: Found, asked: str | None) -> str:
    """The name of the network that the tensors are of, after every shape has been compared.

    Raises ValueError that names the first tensor that differs, with both shapes.
    """
    named = asked or found.facts.model
    own = architecture_of(found.entries)
    wanted = named or own
    if wanted is None:
        first = next(iter(found.entries), "nothing")
        raise ValueError(
            f"{found.where} is of no BiT network (its first tensor is {first}): import reads BiT; another network of "
            "timm is fine-tuned from its file by --model-path with model.name"
        )
    if parse_name(wanted) is None:
        raise ValueError(f"--model {wanted} is no BiT network: give a name such as BiT-M-R50x1")
    with torch.device("meta"):
        skeleton = create_model(wanted, found.outputs or 1)
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    given = {name: entry.shape for name, entry in found.entries.items()}
    if not found.outputs:
        shapes = {name: shape for name, shape in shapes.items() if name not in HEAD}
        given = {name: shape for name, shape in given.items() if name not in HEAD}
    if difference := first_difference(given, shapes):
        by = "" if asked else f", which it should be by {found.facts.why}," if named else ""
        hint = f"; its tensors are those of {own}" if own is not None and not same_network(own, wanted) else ""
        raise ValueError(f"{found.where} does not hold {wanted}{by or ':'} {difference}{hint}")
    return wanted


def new_head(found: Found, mode: str, classes: int | None) -> tuple[dict[str, Entry], int, str]:
    """(tensors, outputs, a sentence): the head kept, or replaced by zeros, as BiT-HyperRule starts.

    Raises ValueError for a head that cannot be kept.
    """
    held = found.outputs
    wanted = classes or held
    if not wanted:
        raise ValueError(f"{found.where} has no head: say of how many outputs the new one is by --num-classes")
    if mode == "keep" and wanted != held:
        raise ValueError(f"--head keep, but {found.where} has {held} outputs and --num-classes is {wanted}: use new")
    if mode == "keep" or (mode == "auto" and wanted == held):
        return dict(found.entries), held, f"head of {held} outputs kept"
    width = found.entries["head.gn.weight"].shape[0]
    entries = {name: entry for name, entry in found.entries.items() if name not in HEAD}
    for name, shape in zip(HEAD, ((wanted, width, 1, 1), (wanted,)), strict=True):
        entries[name] = _zeros(shape)
    return entries, wanted, f"new head of {wanted} outputs, all zeros (the file has {held})"


def _zeros(shape: tuple[int, ...]) -> Entry:
    return Entry(shape=shape, dtype=torch.float32, read=lambda: torch.zeros(shape))


def import_model(
    given: str,
    to: Path,
    *,
    model: str | None = None,
    config: Path | None = None,
    labels: Sequence[str] | None = None,
    task: str | None = None,
    mean: float | list[float] | None = None,
    std: float | list[float] | None = None,
    transform: str | None = None,
    size: int | None = None,
    ws_eps: float | None = None,
    classes: int | None = None,
    head: str = "auto",
) -> list[str]:
    """Write the folder ``to``; what was found and inferred, a line each. The arguments are the command's options.

    Raises ValueError: a file that is not recognised or does not fit, a normalisation that is not known, labels that
    are not as many as outputs.
    """
    found = recognise(given, [to.name], config)
    name = network_of(found, model)
    facts = found.facts
    entries, outputs, head_said = new_head(found, head, classes)
    kept = head_said.endswith("kept")
    said = [f"{given}: {FORMS[found.form]}, {name}" + (f", epoch {found.epoch}" if found.epoch is not None else "")]
    said.append(head_said)
    if kept and facts.outputs is not None and facts.outputs != outputs:
        if labels is None and (facts.outputs, outputs) != PADDED:
            raise ValueError(
                f"{given} has {outputs} outputs, but by {facts.why} it has {facts.outputs}: give the --config that it "
                "was trained with, or its --labels"
            )
        facts = replace(facts, label_names=None, policy=None)
    mean, std = (facts.mean if mean is None else mean), (facts.std if std is None else std)
    if mean is None or std is None:
        raise ValueError(
            f"{given} does not say how its images were normalised, and its name is no published model's: give the "
            "configuration it was trained with by --config, or --mean and --std (0.5 and 0.5 of the published X-ray "
            "models)"
        )
    source = "as given" if (mean, std) != (facts.mean, facts.std) else f"from {facts.why}"
    said.append(f"normalisation: mean {mean}, std {std}, {source}")
    names, task, labels_said = _labels(facts, labels, task, outputs, kept)
    said += labels_said
    prepared = _transform(facts, transform, size)
    if prepared is None:
        said.append("transform: not known; give --transform and --size if evaluate, predict and features are to work")
    else:
        shown = f"{prepared['kind']}, {prepared['size']} pixels"
        said.append(f"transform: {shown}, {'as given' if transform or size else f'from {facts.why}'}")
    eps = found.ws_eps if ws_eps is None else ws_eps
    if eps is not None:
        why = "from its model.json" if found.form == "export" else "as timm computes"
        theirs = "" if found.form == "export" else "; the published code and Google's add 1e-10: --ws-eps 1e-10"
        said.append(f"weight standardisation: eps {eps:g}, {'as given' if ws_eps is not None else why + theirs}")
    card: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": name, "num_classes": outputs}
    card |= {"task": task} if task else {}
    card |= {"label_names": list(names)} if names is not None else {}
    card |= {"policy": facts.policy} if facts.policy and names == facts.label_names else {}
    card["normalisation"] = {"mean": mean, "std": std, "pixel_max": facts.pixel_max}
    card |= {"transform": prepared} if prepared else {}
    card |= {"ws_eps": eps} if eps is not None else {}
    imported: dict[str, Any] = {"file": Path(given).name, "form": found.form, "said": said[1:]}
    imported |= {"epoch": found.epoch} if found.epoch is not None else {}
    card["provenance"] = {**(found.provenance or {}), "imported": imported}
    with new_folder(to) as folder:
        card["sha256"] = write_weights(folder, to, entries)
        write_card(folder, card)
    return said


def _labels(
    facts: Facts, given: Sequence[str] | None, task: str | None, outputs: int, kept: bool
) -> tuple[tuple[str, ...] | None, str | None, list[str]]:
    """Label names, task, and sentences on both."""
    names = tuple(given) if given is not None else (facts.label_names if kept else None)
    if names is not None and len(names) != outputs:
        raise ValueError(f"{len(names)} label names for {outputs} outputs: give as many --labels as --num-classes")
    if names is not None and len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the label name {twice!r} is there twice: each output needs its own")
    said = []
    if given is not None:
        said.append(f"labels: {outputs} as given")
    elif names is None:
        said.append(f"labels: not known of these {outputs} outputs; give --labels if they are to have names")
    else:
        said += list(facts.notes) or [f"labels: {outputs} from {facts.why}"]
    chosen = task or (facts.task if kept or facts.task == "multilabel" else None)
    if chosen is None:
        said.append("task: not known; give --task multiclass or multilabel if evaluate and predict are to work")
    else:
        said.append(f"task: {chosen}, {'as given' if task else f'from {facts.why}'}")
    return names, chosen, said


def _transform(facts: Facts, kind: str | None, size: int | None) -> dict[str, Any] | None:
    """How images are prepared: as given, or as the facts say; None where neither says all of it."""
    known = facts.transform
    if kind is None and size is None:
        return known
    kind = kind or (known or {}).get("kind")
    size = size or (known or {}).get("size")
    if kind is None or size is None:
        return None
    if kind == "bit":
        xray = bool((known or {}).get("xray") or (known or {}).get("kind") == "xray")
        precrop = math.ceil(size * 512 / 480)
        return {"kind": kind, "precrop": precrop, "size": size, "square": True, "flip": 0.5, "xray": xray}
    return {"kind": kind, "size": size}


def read_labels(text: str) -> list[str]:
    """Names in a file (one a line, or a JSON list), or separated by commas."""
    path = Path(text)
    if not path.is_file():
        if "," not in text:
            raise ValueError(f"--labels {text}: there is no such file; give a file with one name a line, or a,b,c")
        return [name.strip() for name in text.split(",")]
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        names = json.loads(content)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} must be a JSON list of names")
        return names
    return [line.strip() for line in content.splitlines() if line.strip()]


def _numbers(option: str, text: str | None) -> float | list[float] | None:
    """One number of 0 to 1, or three separated by commas."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    low = 0.0 if option == "--mean" else 1e-6
    if len(values) not in (1, 3) or not all(low <= value <= 1 for value in values):
        raise ValueError(f"{option} {text}: give one number, or three separated by commas, of {low:g} to 1")
    return values[0] if len(values) == 1 else values


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(
        prog="scaletransfer import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="the checkpoint: a file, a folder, or a name of timm")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write: pretrained_models/NAME")
    parser.add_argument("--model", metavar="NAME", help="the network it must be, such as BiT-M-R50x1")
    parser.add_argument("--config", type=Path, metavar="FILE", help="pre-training configuration of a published model")
    parser.add_argument("--labels", metavar="FILE", help="label names in order: a file, one a line, or a,b,c")
    parser.add_argument("--task", choices=["multiclass", "multilabel"], help="softmax or a sigmoid for each label")
    parser.add_argument("--mean", metavar="X[,Y,Z]", help="what was subtracted from pixels of 0 to 1")
    parser.add_argument("--std", metavar="X[,Y,Z]", help="what they were then divided by")
    parser.add_argument("--transform", choices=["xray", "natural", "bit"], help="how images are prepared")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the image that the network gets")
    parser.add_argument(
        "--ws-eps", type=float, metavar="X", help="eps of weight standardisation (default: timm's, 1e-8)"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the imported model")
    parser.add_argument(
        "--head", choices=["auto", "keep", "new"], default="auto", help="auto: new where --num-classes is another"
    )
    options = parser.parse_args(argv)
    for flag, least in (("num_classes", 1), ("size", 8), ("ws_eps", 1e-30)):
        value = getattr(options, flag)
        if value is not None and not value >= least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}: give {least:g} or more")
    said = import_model(
        options.file,
        options.to,
        model=options.model,
        config=options.config,
        labels=None if options.labels is None else read_labels(options.labels),
        task=options.task,
        mean=_numbers("--mean", options.mean),
        std=_numbers("--std", options.std),
        transform=options.transform,
        size=options.size,
        ws_eps=options.ws_eps,
        classes=options.num_classes,
        head=options.head,
    )
    print("\n".join(said))
    print(f"{options.to}: model.safetensors, model.json")
    return 0
