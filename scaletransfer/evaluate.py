"""Evaluate a model on labelled images: loss, accuracy, scores of each class, intervals, every prediction.

    scaletransfer evaluate MODEL --images DIR --split test
    scaletransfer evaluate MODEL --shards shards/chexpert --split valid --out results/chexpert
    scaletransfer evaluate --predictions results/chexpert/predictions.csv

MODEL is an exported folder (model.safetensors and model.json), or a fine-tuning run. Its file says how images are
prepared and what its outputs mean; data with other labels is refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletransfer import keys
from scaletransfer.cli import CommandParser, callable_module, run_command
from scaletransfer.engine.build import resolve_precision
from scaletransfer.engine.evaluate import Inference, predict, titles_of
from scaletransfer.engine.rehearsal import end_group, make_accelerator
from scaletransfer.engine.strategy import asked
from scaletransfer.files import json_bytes, write_atomically
from scaletransfer.fused import Fused, build_fused
from scaletransfer.image_check import check_images
from scaletransfer.index import from_records, load_index
from scaletransfer.labels import LabelPolicy
from scaletransfer.loader import EvalSampler, ShardDataset
from scaletransfer.models import create_model
from scaletransfer.models.weights import load_into, load_pretrained, network_options
from scaletransfer.sources import named_values
from scaletransfer.sources.image_folder import ImageFolder
from scaletransfer.streams import batches, dead_workers_named, make_loader
from scaletransfer.transfer.data import Target, default_split, forced, make_target, open_official, shortened
from scaletransfer.transfer.network import check_card
from scaletransfer.transfer.predictions import PREDICTIONS, Part, read_predictions, write_predictions
from scaletransfer.transfer.scores import lines, summarise
from scaletransfer.transforms import Normalizer, bit_transform, build_transform

METRICS = "metrics.json"


def evaluate(
    model: str | Path,
    *,
    images: str | Path | None = None,
    shards: str | Path | Sequence[str | Path] | None = None,
    source: str | None = None,
    root: str | Path | None = None,
    protocol: str | None = None,
    views: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    salt_file: str | Path | None = None,
    multilabel_force_classification: bool = False,
    split: str | None = None,
    out: str | Path | None = None,
    batch: int = 32,
    workers: int = 4,
    precision: str = "auto",
    resamples: int = 1000,
) -> dict[str, Any]:
    """Scores of a model on one split, as ``transfer.scores.summarise`` has them; ``out`` gets them as metrics.json and
    every prediction as predictions.csv.

    shards: one folder or several, which are scored together and each alone. protocol, views, options, salt_file: of
    ``source``, as ``make_shards`` has them; None takes those that the model was fine-tuned with, if that was on the
    same source, since another split may hold what it was trained on. split: None is valid, or test where there is no
    valid. multilabel_force_classification: as in fine-tuning.

    Raises:
        ValueError: a model without model.json, data whose labels are not the model's, unreadable images.
    """
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    path, state, card = open_model(Path(model))
    policy = LabelPolicy(**card["policy"]) if card.get("policy") else LabelPolicy()
    given: dict[str, Any] = {"protocol": protocol, "views": views, "options": options, "salt_file": salt_file}
    said = as_trained(card, source, given)
    several = [shards] if shards is None or isinstance(shards, str | Path) else list(shards)
    targets = []
    for folder in several:
        target = open_labelled(images=images, shards=folder, source=source, root=root, policy=policy, given=given)
        if multilabel_force_classification:
            target = forced(target)
        said += target.notes
        if split is None:
            split, note = default_split(target.index, source)
            said += [note] if note else []
        target, note = fit_labels(path, card, target, split)
        said += [note] if note else []
        targets.append(target)
    strategy = asked(cuda=torch.cuda.is_available())
    if said and strategy.rank == 0:
        print("\n".join(said))
    assert split is not None
    accelerator = make_accelerator(strategy)
    network = create_model(card["model"], card["num_classes"], **network_options(card))
    load_into(network, state)
    network.to(accelerator.device).eval()
    chosen = resolve_precision(precision, strategy)
    inference = Inference(
        module=network, device=accelerator.device, precision=chosen, world=strategy.world, rank=strategy.rank
    )
    transform, channels = prepare(card["transform"], targets[0])
    depth = 8 if channels == 3 else targets[0].depth
    data = ShardDataset([target.source(split) for target in targets], None, transform, channels, 0, depth=depth)
    if targets[0].index.in_memory and strategy.rank == 0:
        rows = [torch.arange(len(data)).numpy()]
        check_images(data.sources, rows, channels=channels, depth=depth, workers=workers)
    normal = card["normalisation"]
    normalize = Normalizer(normal["mean"], normal["std"], data.pixel_max).to(accelerator.device)
    sampler = EvalSampler(len(data), strategy.rank, strategy.world, batch)
    with dead_workers_named():
        stream = batches(make_loader(data, sampler, min(workers, os.cpu_count() or 1)))
        predicted = predict(inference, normalize, stream, progress=strategy.rank == 0)
    found = score_parts(data, predicted, resamples)
    if strategy.rank == 0:
        print(f"{path} ({card['model']}) on the split {split} of {' and '.join(t.index.where for t in targets)}")
        print(lines(found, targets[0].names))
        if out is not None:
            write_scores(Path(out), found)
            write_predictions(Path(out) / PREDICTIONS, card["task"], parts_of(data, predicted), targets[0].names)
            print(f"{out}: {PREDICTIONS}, {METRICS}")
    return found


def parts_of(data: ShardDataset, predicted: dict[str, np.ndarray]) -> list[Part]:
    """What was predicted of each source, with positions that are rows of its table."""
    which, rows = data.locate(predicted["position"])
    whole = {**predicted, "position": rows}
    return [
        ({key: values[which == number] for key, values in whole.items()}, source.index, source.split)
        for number, source in enumerate(data.sources)
    ]


def score_parts(data: ShardDataset, predicted: dict[str, np.ndarray], resamples: int) -> dict[str, Any]:
    """``summarise`` of all sources together, and of each where there are several."""
    which, rows = data.locate(predicted["position"])
    groups, first = np.full(len(which), -1, dtype=np.int64), 0
    for number, source in enumerate(data.sources):
        patients = source.index.table(source.split)["patient"][rows[which == number]].astype(np.int64)
        groups[which == number] = np.where(patients < 0, -1, patients + first)
        first += int(source.index.table(source.split)["patient"].max(initial=-1)) + 1
    titles = titles_of([source.index.source for source in data.sources])
    return summarise(
        predicted["logits"],
        predicted["target"],
        data.sources[0].names,
        data.sources[0].index.task,
        groups=groups,
        sources=[titles[number] for number in which],
        resamples=resamples,
    )


def evaluate_predictions(path: str | Path, *, out: str | Path | None = None, resamples: int = 1000) -> dict[str, Any]:
    """The scores of a predictions file, without model and images: ``transfer.scores.summarise``, and metrics.json in
    ``out``.

    Raises:
        ValueError: no such file, or one that is none.
    """
    read = read_predictions(Path(path))
    found = summarise(
        read.probability,
        read.target,
        read.names,
        read.task,
        groups=read.groups,
        sources=read.sources,
        resamples=resamples,
        from_logits=False,
    )
    print(f"{path}: {len(read.keys)} images, {len(read.names)} {'labels' if read.task == 'multilabel' else 'classes'}")
    print(lines(found, read.names))
    if out is not None:
        write_scores(Path(out), found)
        print(f"{out}: {METRICS}")
    return found


def write_scores(folder: Path, found: dict[str, Any]) -> None:
    """Write metrics.json into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / METRICS, json_bytes(found))


def load_model(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(folder, tensors, model.json, {} if there is none) of an exported model, or of a fine-tuning run's.

    Raises ValueError for a pre-training run, and what `check_card` raises.
    """
    if (path / "model" / "model.safetensors").is_file():
        path = path / "model"
    elif (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} is a run, not a model: write its model first with scaletransfer export {path} --to DIR"
        )
    state, card = load_pretrained(path)
    check_card(card, path)
    return path, state, card


def open_model(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(folder, tensors, content of model.json) of an exported model, or of a fine-tuning run's.

    Raises ValueError where model.json does not say what is needed.
    """
    path, state, card = load_model(path)
    for key in ("model", "num_classes", "label_names", "task", "transform", "normalisation"):
        if key not in card:
            raise ValueError(
                f"{path} does not say its {key}: evaluate reads exported models (model.safetensors with model.json)"
            )
    return path, state, card


def open_labelled(
    *,
    images: str | Path | None,
    shards: str | Path | None,
    source: str | None,
    root: str | Path | None,
    policy: LabelPolicy,
    given: Mapping[str, Any],
) -> Target:
    """The data that one of the arguments names; ValueError unless exactly one does. given: protocol, views, options
    and salt_file of a source."""
    if sum(value is not None for value in (images, shards, source)) != 1:
        raise ValueError("give the data by exactly one of --images DIR, --shards DIR, or --source NAME --root DIR")
    others = (given["views"], given["options"], given["salt_file"])
    if source is None and (given["protocol"] not in (None, "corrected") or any(others)):
        raise ValueError(
            "--protocol, --views, --option and --salt-file are for --source: leave them out with --images and --shards"
        )
    if images is not None:
        if not Path(images).expanduser().is_dir():
            raise ValueError(f"there is no folder {images}: correct --images")
        folder = ImageFolder(images)
        return make_target(from_records(folder, keys.PUBLIC_SALT), Path(images).resolve().name, policy)
    if shards is not None:
        return make_target(load_index(shards), Path(shards).resolve().name, policy)
    if root is None:
        raise ValueError("--source needs --root, the folder of that data set")
    assert source is not None
    return open_official(source, root, policy, **{**given, "protocol": given["protocol"] or "corrected"})


def as_trained(card: Mapping[str, Any], source: str | None, given: dict[str, Any]) -> list[str]:
    """Fill what `given` leaves open (None or empty) with the settings of the model's own data, where that was the same
    source; what was filled in, in words."""
    data = card.get("provenance", {}).get("data", ())
    own = next((entry for entry in data if entry["source"] == source and "protocol" in entry), None)
    if own is None:
        return []
    taken = {key: own[key] for key in ("protocol", "views", "options") if own[key] and not given[key]}
    given.update(taken)
    shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in taken.items())
    return [f"note: {shown}, as the model was trained"] if taken else []


def fit_labels(path: Path, card: dict[str, Any], target: Target, split: str) -> tuple[Target, str]:
    """The data with the model's labels, and a sentence where it has more than these.

    Raises:
        ValueError: another task, other label names or another order of them, or no such split.
    """
    named, names = tuple(card["label_names"]), target.names
    if card["task"] != target.task:
        more = " (--multilabel-force-classification makes classes of it)" if card["task"] == "multiclass" else ""
        raise ValueError(f"{path} is a {card['task']} model but {target.index.where} is {target.task}{more}")
    note = ""
    if target.task == "multilabel" and set(named) < set(names):
        note = f"note: {len(named)} of the {len(names)} labels of {target.index.where} are the model's and are scored"
        target = replace(target, names=named)
    if named != target.names:
        raise ValueError(
            f"label names do not fit: {path} has {shortened(named)}; {target.index.where} has "
            f"{shortened(names)}; evaluate on data with the same labels in the same order, or fine-tune first"
        )
    if split not in target.index.splits:
        raise ValueError(
            f"{target.index.where} has no split {split!r}, only {', '.join(target.index.splits)}: give one by --split"
        )
    return target, note


def prepare(transform: dict[str, Any], target: Target) -> tuple[Callable[[Any], Tensor] | Fused, int]:
    """How the model's images are prepared in evaluation, and the channels that it takes."""
    if transform["kind"] == "bit":
        size = int(transform["size"])
        return bit_transform(False, int(transform["precrop"]), size, square=True, flip=0.0), target.channels
    kind, size = transform["kind"], int(transform["size"])
    return build_fused(kind, False, size) or build_transform(kind, False, size), 1 if kind == "xray" else 3


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    import argparse

    parser = CommandParser(
        prog="scaletransfer evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", metavar="MODEL", help="exported model folder, or a fine-tuning run"
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="F.csv", help="score a predictions file again, without model and images"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder of images, one folder a class")
    parser.add_argument(
        "--shards",
        action="append",
        metavar="DIR",
        help="a folder made by make_shards, or its URL; given again: several are scored together and each alone",
    )
    parser.add_argument("--source", metavar="NAME", help="a data set read from its own files in --root")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the folder of that data set")
    parser.add_argument("--protocol", choices=["corrected", "paper"], help="splits of --source (default: the model's)")
    parser.add_argument("--views", help="views of --source, such as PA,AP, or all (default: the model's)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="another option of --source"
    )
    parser.add_argument(
        "--salt-file", type=Path, metavar="F", help="secret that keys of --source are made with (default: yours)"
    )
    parser.add_argument(
        "--multilabel-force-classification",
        action="store_true",
        help="of a multi-label set the images with exactly one label, as classes",
    )
    parser.add_argument("--split", help="train, valid or test (default: valid, or test where there is no valid)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for predictions.csv and metrics.json")
    parser.add_argument("--batch", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read and decode (default 4)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: bf16 on CUDA")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals; 0: none")
    options = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    for name, least in (("batch", 1), ("workers", 0), ("bootstrap", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}: give {least} or more")
    if options.predictions is not None:
        if options.model is not None or options.images or options.shards or options.source:
            raise ValueError("--predictions has all that is needed: leave MODEL and the data out")
        evaluate_predictions(options.predictions, out=options.out, resamples=options.bootstrap)
        return 0
    if options.model is None:
        raise ValueError("which model? Give MODEL and its data, or --predictions F.csv")
    evaluate(
        options.model,
        images=options.images,
        shards=options.shards,
        source=options.source,
        root=options.root,
        protocol=options.protocol,
        views=options.views,
        options=named_values(options.option),
        salt_file=options.salt_file,
        multilabel_force_classification=options.multilabel_force_classification,
        split=options.split,
        out=options.out,
        batch=options.batch,
        workers=options.workers,
        precision=options.precision,
        resamples=options.bootstrap,
    )
    end_group()
    return 0


callable_module(__name__, evaluate)

if __name__ == "__main__":
    sys.exit(run_command(main))
