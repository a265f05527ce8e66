"""What a rank writes into a checkpoint, and the copy of it that a save in the background works from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scaletransfer.engine.build import Engine
from scaletransfer.engine.checkpoint import CHUNK
from scaletransfer.engine.pieces import Piece, states_of
from scaletransfer.shares import COPY_BLOCK

BLOCK = COPY_BLOCK
"""Elements of a block of host memory: torch rounds pinned blocks up to a power of two."""


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of the flattened tensor ``name``; ``values`` is a live 1-D view of them."""

    name: str
    start: int
    stop: int
    values: Tensor


def owned(engine: Engine) -> list[Piece]:
    """The pieces that this rank writes: what it holds, or an even share of it where other ranks hold the same."""
    shares = []
    if engine.rank == 0:
        fixed = {**engine.buffers(), **engine.frozen()}
        shares = [Piece(name, tuple(b.shape), 0, b.numel(), b, 0) for name, b in fixed.items()]
    replicas, replica = engine.strategy.replicas, engine.strategy.replica
    for piece in engine.pieces:
        first, last = (len(piece) * r // replicas for r in (replica, replica + 1))
        if last > first:
            start, stop = piece.start + first, piece.start + last
            shares.append(Piece(piece.name, piece.shape, start, stop, piece.holder, piece.offset + first))
    return shares


@torch.no_grad()
def parts(engine: Engine, with_momentum: bool) -> list[Part]:
    """What this rank writes, as views of the live tensors. with_momentum: False for weights alone."""
    found = []
    for piece in owned(engine):
        found.append(Part(f"model.{piece.name}", piece.start, piece.stop, piece.value().detach()))
        kept = states_of(engine.optimizer, piece) if with_momentum else {}
        for kind, values in kept.items():
            found.append(Part(f"{kind}.{piece.name}", piece.start, piece.stop, values.detach()))
        if engine.average is not None and piece.name in engine.shapes:
            mean = piece.of(engine.average.of(piece.name))
            found.append(Part(f"ema.{piece.name}", piece.start, piece.stop, mean.detach()))
    names = [part.name for part in found]
    assert len(set(names)) == len(names), names
    return found


def generator_bytes(engine: Engine) -> dict[str, bytes]:
    """The states of the random generators that dropout draws from: torch's on the CPU and on the device."""
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return {kind: state.numpy().tobytes() for kind, state in states.items()}


def set_generators(states: dict[str, bytes], device: torch.device) -> None:
    """Let the generators go on from ``generator_bytes``'s states, but for a device that is not there."""
    for kind, content in states.items():
        state = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        if kind == "cpu":
            torch.set_rng_state(state)
        elif device.type == "cuda":
            torch.cuda.set_rng_state(state, device)


@torch.no_grad()
def streamed(chosen: Sequence[Part]) -> Iterator[Iterator[np.ndarray]]:
    """float32 chunks of each part, from the live tensors: nothing may change them meanwhile."""

    def chunks(values: Tensor) -> Iterator[np.ndarray]:
        for start in range(0, len(values), CHUNK):
            yield values[start : start + CHUNK].to(device="cpu", dtype=torch.float32).numpy()

    for part in chosen:
        yield chunks(part.values)


class Staging:
    """Host memory for a float32 copy of this rank's parts, kept from one save to the next.

    On CUDA it is pinned, and the copies run on a stream of their own: the host does not wait, and what the device does
    next waits for them there. Used by one save at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        return sum(4 * block.numel() for block in self._blocks)

    def _views(self, sizes: Sequence[int]) -> list[list[Tensor]]:
        """For each size 1-D tensors of together so many elements; each lies in one block."""
        lacking = sum(sizes) - self.bytes // 4
        while lacking > 0:
            size = min(BLOCK, lacking)
            self._blocks.append(torch.empty(size, dtype=torch.float32, pin_memory=self._stream is not None))
            lacking -= size
        block, place, found = 0, 0, []
        for size in sizes:
            views = []
            while size:
                if place == self._blocks[block].numel():
                    block, place = block + 1, 0
                taken = min(size, self._blocks[block].numel() - place)
                views.append(self._blocks[block][place : place + taken])
                place, size = place + taken, size - taken
            found.append(views)
        return found

    @torch.no_grad()
    def copy(self, chosen: Sequence[Part]) -> tuple[list[list[np.ndarray]], Callable[[], None]]:
        """For each part the arrays of its copy, and a function that waits until they hold it (any thread may call it).

        What changes the tensors after this returns, on the device's current stream or on the host, changes no copy.
        """
        views = self._views([len(part.values) for part in chosen])
        arrays = [[view.numpy() for view in of_part] for of_part in views]
        if self._stream is None:
            self._fill(chosen, views)
            return arrays, lambda: None
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._fill(chosen, views)
        copied = torch.cuda.Event()
        copied.record(self._stream)
        current.wait_event(copied)
        return arrays, copied.synchronize

    @staticmethod
    def _fill(chosen: Sequence[Part], views: Sequence[Sequence[Tensor]]) -> None:
        for part, of_part in zip(chosen, views, strict=True):
            place = 0
            for view in of_part:
                source = part.values[place : place + view.numel()]
                # converted where it lies: a copy that changes the type on its way to the host would block
                view.copy_(source.to(torch.float32), non_blocking=True)
                place += view.numel()
