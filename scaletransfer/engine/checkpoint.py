"""Checkpoints: one form for all engines and numbers of ranks, no pickle anywhere.

    checkpoints/step-00000120/
        rank-00000.safetensors   the pieces that this rank owns: 1-D float32 tensors "model.<name>", "momentum.<name>"
        rank-00000.json          their ranges in the flattened parameters, and a sha256 of each piece's live bytes
        manifest.json            step, samples seen, run facts, every tensor's shape, every rank's pieces and file hash
        COMPLETE                 sha256 of the manifest; without it the folder is no checkpoint
    checkpoints/latest           name of the newest complete one, moved after that

The folder is written under a hidden name and renamed when complete. Ranks share the file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scaletransfer.engine.build import Engine
from scaletransfer.engine.pieces import Piece, momentum_of, set_momentum

FORMAT = "scaletransfer-checkpoint"
FORMAT_VERSION = 1
MARKER = "COMPLETE"
LATEST = "latest"


def folder_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def owned(engine: Engine) -> list[Piece]:
    """The pieces that this rank writes: what it holds, or an even share of it where other ranks hold the same."""
    shares = []
    if engine.rank == 0:
        shares = [Piece(name, tuple(b.shape), 0, b.numel(), b, 0) for name, b in engine.buffers().items()]
    replicas, replica = engine.strategy.replicas, engine.strategy.replica
    for piece in engine.pieces:
        first, last = (len(piece) * r // replicas for r in (replica, replica + 1))
        if last > first:
            start, stop = piece.start + first, piece.start + last
            shares.append(Piece(piece.name, piece.shape, start, stop, piece.holder, piece.offset + first))
    return shares


def save(
    engine: Engine, root: Path, step: int, facts: dict[str, Any], *, keep: int, with_momentum: bool = True
) -> Path:
    """Write checkpoint ``step`` below ``root``. All ranks must call this.

    Args:
        facts: JSON-able facts of the run that stand in the manifest (samples seen, order version, label names, ...).
        keep: number of complete checkpoints that stay.
        with_momentum: False for weights alone.

    Raises:
        OSError: disk full or not writable; the earlier checkpoints and ``latest`` stay as they are.
    """
    final = root / folder_name(step)
    temporary = root / f".{folder_name(step)}.tmp"
    if engine.rank == 0:
        for stale in root.glob(".step-*.tmp"):  # of a process that was killed while it saved
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
    engine.average_buffers()
    engine.barrier()
    _write_rank(engine, temporary, with_momentum)
    engine.barrier()
    if engine.rank == 0:
        _finish(engine, temporary, final, step, facts)
        _write(root / f".{LATEST}.tmp", final.name + "\n")
        os.replace(root / f".{LATEST}.tmp", root / LATEST)
        _fsync_folder(root)
        _prune(root, keep, final)
    engine.barrier()
    return final


def _write_rank(engine: Engine, folder: Path, with_momentum: bool) -> None:
    tensors: dict[str, np.ndarray] = {}
    listing = []
    for piece in owned(engine):
        parts = {"model": piece.value()}
        momentum = momentum_of(engine.optimizer, piece) if with_momentum else None
        if momentum is not None:
            parts["momentum"] = momentum
        for kind, values in parts.items():
            array = values.detach().to(device="cpu", dtype=torch.float32).numpy()
            name = f"{kind}.{piece.name}"
            assert name not in tensors, name
            tensors[name] = array
            digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
            listing.append({"tensor": name, "start": piece.start, "stop": piece.stop, "sha256": digest})
    path = folder / _rank_file(engine.rank)
    # Copies: slices of one flat partition share storage, which the format does not know.
    try:
        save_file({name: array.copy() for name, array in tensors.items()}, path)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise OSError(f"{path} cannot be written ({error}): the checkpoints before it stay as they are") from error
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    _write(path.with_suffix(".json"), json.dumps({"file_sha256": _sha256_file(path), "pieces": listing}))


def _finish(engine: Engine, temporary: Path, final: Path, step: int, facts: dict[str, Any]) -> None:
    ranks = []
    for rank in range(engine.world):
        path = (temporary / _rank_file(rank)).with_suffix(".json")
        ranks.append({"file": _rank_file(rank), **json.loads(path.read_text(encoding="utf-8"))})
    written = {entry["tensor"] for rank in ranks for entry in rank["pieces"]}
    tensors = {f"model.{name}": list(shape) for name, shape in engine.shapes.items()}
    # A parameter that never had a gradient has no momentum.
    tensors |= {f"momentum.{n}": list(s) for n, s in engine.shapes.items() if f"momentum.{n}" in written}
    tensors |= {f"model.{name}": list(buffer.shape) for name, buffer in engine.buffers().items()}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "engine": engine.strategy.engine,
        "world": engine.world,
        "facts": facts,
        "tensors": tensors,
        "ranks": ranks,
    }
    pieces_by_tensor(manifest, final)  # the ranges of all ranks tile every tensor, or nothing is called complete
    text = json.dumps(manifest, indent=1)
    _write(temporary / "manifest.json", text)
    _write(temporary / MARKER, hashlib.sha256(text.encode()).hexdigest() + "\n")
    _fsync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _fsync_folder(final.parent)


def _prune(root: Path, keep: int, newest: Path) -> None:
    """Keep ``newest`` and the ``keep`` - 1 before it. In ``best`` a later step may stand, left by an earlier run."""
    others = [p for p in _complete(root) if p != newest]
    for old in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(old)


def pieces_by_tensor(manifest: dict[str, Any], where: Path) -> dict[str, list[tuple[int, int, str, str]]]:
    """For each tensor its (start, stop, file, sha256), sorted. ValueError unless they tile the tensor exactly."""
    found: dict[str, list[tuple[int, int, str, str]]] = {name: [] for name in manifest["tensors"]}
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
    parts: dict[str, list[tuple[int, int, str, str]]]

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
        if name not in self.parts:
            raise ValueError(f"{self.folder} has no tensor {name}")
        shape = self.manifest["tensors"][name]
        whole = torch.empty(int(np.prod(shape, dtype=np.int64)), dtype=torch.float32)
        for start, stop, file, digest in self.parts[name]:
            path = self.folder / file
            try:
                with safe_open(path, framework="pt") as handle:
                    piece = handle.get_tensor(name)
            except (SafetensorError, FileNotFoundError, struct.error) as error:
                raise ValueError(
                    f"{path} is not a readable safetensors file ({error}): it is damaged or something else stands in "
                    "its place; delete this checkpoint and resume from an earlier one"
                ) from error
            fits = piece.dtype == torch.float32 and piece.shape == (stop - start,)
            if not fits or hashlib.sha256(piece.numpy().data).hexdigest() != digest:
                raise ValueError(
                    f"{path}: {name} differs from what the training process saved (sha256); delete this checkpoint and "
                    "resume from an earlier one"
                )
            whole[start:stop] = piece
        return whole.view(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a complete checkpoint. ValueError when it is not complete, damaged, or of another format."""
    marker, path = folder / MARKER, folder / "manifest.json"
    if not marker.exists() or not path.exists():
        raise ValueError(f"{folder} is not a complete checkpoint (no {MARKER} or manifest.json): use another one")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != marker.read_text(encoding="utf-8", errors="replace").strip():
        raise ValueError(
            f"{path} does not match {MARKER}: it is damaged; delete this checkpoint and resume from an earlier one"
        )
    try:
        manifest = json.loads(data)
        if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{folder} is not a {FORMAT} of version {FORMAT_VERSION}: use the release that wrote it")
        for number, rank in enumerate(manifest["ranks"]):
            if rank["file"] != _rank_file(number):
                raise ValueError(f"{path} names {rank['file']!r} where {_rank_file(number)} belongs: refused")
        found = Checkpoint(folder, manifest, pieces_by_tensor(manifest, folder))
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
    complete = _complete(root)
    return complete[-1] if complete else None


def _complete(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if (p / MARKER).exists())


@torch.no_grad()
def load_momentum(engine: Engine, checkpoint: Checkpoint) -> None:
    """Write the momentum from ``checkpoint`` into an engine whose weights came from ``checkpoint`` when it was built.

    Every rank calls this; nothing is communicated.
    """
    for piece in engine.pieces:
        if checkpoint.has(f"momentum.{piece.name}"):
            whole = checkpoint.read(f"momentum.{piece.name}")
            set_momentum(engine.optimizer, piece, whole.view(-1)[piece.start : piece.stop])


def model_values(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """``build_engine``'s values from a checkpoint."""
    return lambda name: checkpoint.read(f"model.{name}")


def check_same_shapes(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless the checkpoint's parameters and buffers are exactly these."""
    mine = {f"model.{name}": list(shape) for name, shape in shapes.items()}
    theirs = {n: s for n, s in checkpoint.manifest["tensors"].items() if n.startswith("model.")}
    for name in sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)):
        raise ValueError(
            f"{checkpoint.folder}: {name} has shape {theirs.get(name)} but the configured model has {mine.get(name)}: "
            "the run was made with another model or other labels; give the run another name"
        )
