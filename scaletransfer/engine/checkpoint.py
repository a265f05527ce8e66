"""Checkpoints: one form for all engines and numbers of ranks, no pickle anywhere. Here they are read.

    checkpoints/step-00000120/
        rank-00000.safetensors   the pieces that this rank owns: 1-D float32 tensors "model.<name>", "momentum.<name>",
                                 and the states of its random generators as bytes, "rng.<kind>"
        rank-00000.json          their ranges in the flattened parameters, and a sha256 of each piece's live bytes
        manifest.json            step, samples seen, run facts, every tensor's shape, every rank's pieces and file hash
        COMPLETE                 sha256 of the manifest; without it the folder is no checkpoint
    checkpoints/latest           name of the newest complete one, moved after that

``checkpoint_save`` writes the folder under a hidden name and renames it when complete. Ranks share the file system.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from scaletransfer.engine.build import Engine
from scaletransfer.engine.pieces import STATES, set_state

FORMAT = "scaletransfer-checkpoint"
FORMAT_VERSION = 1
MARKER = "COMPLETE"
MANIFEST = "manifest.json"
LATEST = "latest"
CHUNK = 1 << 22
"""Elements that are read at once (16 MiB): what reading holds beside its result."""

Parts = dict[str, list[tuple[int, int, str, str]]]
"""For each tensor its pieces (start, stop, file, sha256), sorted."""


def folder_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Name of the file with a rank's pieces."""
    return f"rank-{rank:05d}.safetensors"


def pieces_by_tensor(manifest: dict[str, Any], where: Path | str) -> Parts:
    """The pieces of each tensor. ValueError unless they tile the tensor exactly."""
    found: Parts = {name: [] for name in manifest["tensors"]}
    for rank in manifest["ranks"]:
        for entry in rank["pieces"]:
            if entry["tensor"] not in found:
                raise ValueError(f"{where}: {rank['file']} holds {entry['tensor']}, which the manifest does not list")
            found[entry["tensor"]].append((entry["start"], entry["stop"], rank["file"], entry["sha256"]))
    for name, parts in found.items():
        parts.sort()
        position = 0
        for start, stop, _, _ in parts:
            if start != position:
                raise ValueError(
                    f"{where}: {name} has a gap or an overlap at element {position}: the save was not sound"
                )
            position = stop
        if position != int(np.prod(manifest["tensors"][name], dtype=np.int64)):
            raise ValueError(f"{where}: {name} ends at element {position} of {manifest['tensors'][name]}")
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, opened for reading by name."""

    folder: Path
    manifest: dict[str, Any]
    parts: Parts

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.manifest["facts"])

    def has(self, name: str) -> bool:
        return name in self.parts

    def read(self, name: str) -> torch.Tensor:
        """The whole float32 tensor ``model.<p>`` or ``momentum.<p>``; each piece is checked against its sha256.

        Raises:
            ValueError: no such tensor, a file that is no safetensors file (a pickle is never opened as one), or bytes
                that are not those that the training process had in memory.
        """
        self._check_has(name)
        shape = self.manifest["tensors"][name]
        return self.read_range(name, 0, int(np.prod(shape, dtype=np.int64))).view(shape)

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D float32; raises what ``read`` raises.

        A sha256 is of a whole piece: the pieces that overlap with the range are read to their ends, but only the range
        and one chunk of 16 MiB are in memory.
        """
        self._check_has(name)
        size = self.parts[name][-1][1] if self.parts[name] else 0
        assert 0 <= start <= stop <= size, (name, start, stop, size)
        found = torch.empty(stop - start, dtype=torch.float32)
        target = found.numpy()
        for piece in self.parts[name]:
            if piece[0] < stop and start < piece[1]:
                for at, values in self.chunks(name, piece):
                    first, last = max(at, start), min(at + len(values), stop)
                    if first < last:
                        target[first - start : last - start] = values[first - at : last - at]
        return found

    def chunks(self, name: str, piece: tuple[int, int, str, str]) -> Iterator[tuple[int, np.ndarray]]:
        """(place in the flattened tensor, float32 values) of a piece, cut into chunks.

        What comes is proven only when the last has come: ValueError then where the sha256 differs, so that nothing may
        be used before.
        """
        start, stop, file, digest = piece
        path, seen = self.folder / file, hashlib.sha256()
        for place in range(0, stop - start, CHUNK):
            values = _slice(path, name, stop - start, place, min(CHUNK, stop - start - place))
            if values is None:
                break
            seen.update(values.data)
            yield start + place, values
        if seen.hexdigest() != digest:
            raise ValueError(
                f"{path}: {name} differs from what the training process saved (sha256); delete this checkpoint and "
                "resume from an earlier one"
            )

    def _check_has(self, name: str) -> None:
        if name not in self.parts:
            raise ValueError(f"{self.folder} has no tensor {name}")


def _slice(path: Path, name: str, length: int, start: int, size: int) -> np.ndarray | None:
    """Elements of a 1-D float32 tensor of ``length`` in a file; None where it is of another length or type.

    The file is opened anew for each: pages of a mapped file count as the process's memory until it is closed.
    """
    try:
        with safe_open(path, framework="np") as handle:
            found = handle.get_slice(name)
            if found.get_dtype() != "F32" or found.get_shape() != [length]:
                return None
            return np.ascontiguousarray(found[start : start + size])
    except (SafetensorError, FileNotFoundError, struct.error) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it is damaged or something else stands in "
            "its place; delete this checkpoint and resume from an earlier one"
        ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a complete checkpoint. ValueError when it is not complete, damaged, or of another format."""
    marker, path = folder / MARKER, folder / MANIFEST
    if not marker.exists() or not path.exists():
        raise ValueError(f"{folder} is not a complete checkpoint (no {MARKER} or {MANIFEST}): use another one")
    return parse(folder, path.read_bytes(), marker.read_bytes())


def parse(folder: Path, data: bytes, marker: bytes, where: str | None = None) -> Checkpoint:
    """The checkpoint whose manifest and marker hold these bytes.

    Args:
        where: what sentences call the folder, where its path is not what a person knows it by.

    Raises:
        ValueError: they do not belong together, or are not of this format.
    """
    shown = str(folder) if where is None else where
    path = f"{shown}/{MANIFEST}"
    if hashlib.sha256(data).hexdigest() != marker.decode("utf-8", errors="replace").strip():
        raise ValueError(
            f"{path} does not match {MARKER}: it is damaged; delete this checkpoint and resume from an earlier one"
        )
    try:
        manifest = json.loads(data)
        if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{shown} is not a {FORMAT} of version {FORMAT_VERSION}: use the release that wrote it")
        for number, rank in enumerate(manifest["ranks"]):
            if rank["file"] != rank_file(number):
                raise ValueError(f"{path} names {rank['file']!r} where {rank_file(number)} belongs: refused")
        found = Checkpoint(folder, manifest, pieces_by_tensor(manifest, shown))
        assert isinstance(found.facts, dict) and found.step >= 0
        return found
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what a run writes ({error!r}): the checkpoint is damaged, use another"
        ) from error


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``, or None. ``latest`` is a hint; the marker decides.

    A marker over a manifest that is torn or gone was left by no kill (both are synced before the folder gets its name)
    but by damage: ``open_checkpoint`` refuses it, rather than that a run silently starts from further back.
    """
    found = complete(root)
    return found[-1] if found else None


def complete(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted(p for p in root.glob("step-*") if (p / MARKER).exists())


@torch.no_grad()
def load_momentum(engine: Engine, checkpoint: Checkpoint) -> None:
    """Write the optimizer's state (and the weights' mean, if one is kept) from ``checkpoint`` into an engine whose
    weights came from ``checkpoint`` when it was built.

    Every rank calls this and reads what it holds; nothing is communicated.
    """
    for piece in engine.pieces:
        for kind in STATES:
            if checkpoint.has(name := f"{kind}.{piece.name}"):
                set_state(engine.optimizer, piece, kind, checkpoint.read_range(name, piece.start, piece.stop))
        if checkpoint.has(f"exp_avg.{piece.name}"):
            engine.optimizer.state[piece.holder]["step"] = torch.tensor(float(checkpoint.facts["updates"]))
        if engine.average is not None:
            mean = engine.average.of(piece.name)
            mean.copy_(checkpoint.read(f"ema.{piece.name}"))


class CheckpointValues:
    """``build_engine``'s values from a checkpoint: called with a name, the whole tensor."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(f"model.{name}")

    def range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, for engines that need no more."""
        return self._checkpoint.read_range(f"model.{name}", start, stop)


@dataclass(frozen=True)
class _Averaged(Checkpoint):
    """A checkpoint whose ``model.*`` are the weights' means, where it holds them."""

    def chunks(self, name: str, piece: tuple[int, int, str, str]) -> Iterator[tuple[int, np.ndarray]]:
        mean = name.replace("model.", "ema.", 1)
        return super().chunks(mean if name.startswith("model.") and mean in self.parts else name, piece)


def for_use(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the weights that a finished model has: the running means, where the run kept them."""
    means = {name.replace("ema.", "model.", 1): parts for name, parts in checkpoint.parts.items() if name[:4] == "ema."}
    if not means:
        return checkpoint
    return _Averaged(checkpoint.folder, checkpoint.manifest, {**checkpoint.parts, **means})


def model_values(checkpoint: Checkpoint) -> CheckpointValues:
    """``build_engine``'s values from a checkpoint."""
    return CheckpointValues(checkpoint)


def generator_states(checkpoint: Checkpoint, rank: int, world: int) -> dict[str, bytes]:
    """The states of this rank's random generators ("cpu", "cuda"), of which dropout draws; {} for another number of
    ranks than the checkpoint's, where each rank has other images and nothing would continue.

    Raises:
        ValueError: bytes that are not those that the training process had.
    """
    if checkpoint.manifest["world"] != world:
        return {}
    entry = checkpoint.manifest["ranks"][rank]
    path, found = checkpoint.folder / entry["file"], {}
    for kind, digest in entry.get("rng", {}).items():
        try:
            with safe_open(path, framework="np") as handle:
                content = handle.get_tensor(f"rng.{kind}").tobytes()
        except (SafetensorError, FileNotFoundError, struct.error) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): use another checkpoint") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path}: rng.{kind} differs from what the training process saved: use another checkpoint")
        found[kind] = content
    return found


def check_same_shapes(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the checkpoint's parameters and buffers are exactly these."""
    mine = {f"model.{name}": list(shape) for name, shape in shapes.items()}
    theirs = {n: s for n, s in checkpoint.manifest["tensors"].items() if n.startswith("model.")}
    for name in sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)):
        raise ValueError(
            f"{checkpoint.folder}: {name} has shape {theirs.get(name)} but the configured model has {mine.get(name)}: "
            "the run was made with another model or other labels; give the run another name"
        )
