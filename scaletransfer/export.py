"""A run's network as model.safetensors and model.json.

What is written is proven against the training process: every piece is compared with the sha256 that the process took
of its live memory when it saved, once when it is read and once more in the finished file. Nothing is held whole: a
network of any size needs some 16 MiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from scaletransfer.engine.checkpoint import CHUNK, Checkpoint, find_latest, for_use
from scaletransfer.model_folder import FORMAT, FORMAT_VERSION, WEIGHTS, new_folder, write_card
from scaletransfer.tensor_file import locate, write_tensors


def choose(run: Path, which: str) -> Path:
    """The checkpoint folder that ``which`` ("latest", "best" or a step) names in the run folder.

    Raises:
        ValueError: no such run, or no such complete checkpoint.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder: give the folder that pretrain made (runs/<name>)")
    root = run / ("best" if which == "best" else "checkpoints")
    found = root / f"step-{int(which):08d}" if which.isdigit() else find_latest(root)
    if found is None or not found.is_dir():
        raise ValueError(f"{root} has no complete checkpoint for --which {which}: let the run reach one first")
    return found


def describe(checkpoint: Checkpoint, digest: str) -> dict[str, Any]:
    """The content of model.json."""
    facts = checkpoint.facts
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": facts["model"],
        "num_classes": len(facts["label_names"]),
        "task": facts["task"],
        "label_names": facts["label_names"],
        "policy": facts["policy"],
        "normalisation": facts["normalisation"],
        "transform": facts["transform"],
        **({"ws_eps": facts["ws_eps"]} if facts.get("ws_eps") is not None else {}),
        "provenance": {
            "step": checkpoint.step,
            "samples_seen": facts["samples_seen"],
            "seed": facts["seed"],
            "global_batch": facts["global_batch"],
            "data": facts["data"],
            "optimizer": facts["optimizer"],
            "engine": checkpoint.manifest["engine"],
            "world": checkpoint.manifest["world"],
            "validation": facts.get("validation"),
        },
        "sha256": digest,
    }


def export(checkpoint: Checkpoint, to: Path) -> None:
    """Write ``to``/model.safetensors and model.json: complete, or not at all.

    Raises:
        ValueError: ``to`` holds something already, or bytes that differ from what the training process had.
    """
    checkpoint = for_use(checkpoint)
    with new_folder(to) as folder:
        path = folder / WEIGHTS
        shapes = checkpoint.manifest["tensors"]
        names = [name for name in checkpoint.parts if name.startswith("model.")]
        layout = {name.removeprefix("model."): ("F32", shapes[name]) for name in names}
        try:
            digest = write_tensors(path, layout, _values(checkpoint, names))
        except OSError as error:
            raise OSError(
                f"{to / path.name} cannot be written ({error.strerror or error}): nothing was exported"
            ) from error
        prove(checkpoint, path)
        write_card(folder, describe(checkpoint, digest))


def _values(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[np.ndarray]:
    """Chunks of the tensors, one after the other; ValueError at the end of a piece that is not what was saved."""
    for name in names:
        for piece in checkpoint.parts[name]:
            for _, values in checkpoint.chunks(name, piece):
                yield values


def prove(checkpoint: Checkpoint, path: Path) -> int:
    """Compare every piece in the finished file with the hash taken by the training process; the number of pieces.

    Raises:
        ValueError: a tensor that differs. SafetensorError: not a safetensors file. OSError: it cannot be read.
    """
    compared = 0
    with safe_open(path, framework="np"):
        pass  # the library checks the header, on which what follows relies
    places = locate(path)
    with path.open("rb") as file:
        for name, parts in checkpoint.parts.items():
            if not name.startswith("model."):
                continue
            kind, shape, begin = places.get(name.removeprefix("model."), ("", (), 0))
            file.seek(begin)
            for start, stop, _, digest in parts:  # they tile the tensor
                seen, left = hashlib.sha256(), 4 * (stop - start)
                while left and (data := file.read(min(left, 4 * CHUNK))):
                    seen.update(data)
                    left -= len(data)
                same = kind == "F32" and list(shape) == checkpoint.manifest["tensors"][name]
                if not same or seen.hexdigest() != digest:
                    raise ValueError(f"{path}: {name} differs from what the training process saved: not exported")
                compared += 1
    return compared
