"""A running mean of the weights (Polyak and Juditsky 1992, as an exponential mean), kept beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scaletransfer.engine.pieces import Piece


class WeightAverage:
    """The mean over the updates so far of each trainable tensor, beginning with the weights that there are now.

    The arithmetic is torch's (``torch.optim.swa_utils``). Buffers are not averaged: the network's own are used.

    pieces: of an engine that holds every parameter whole (single, ddp). decay: share of the mean that an update keeps.
    """

    def __init__(self, pieces: list[Piece], decay: float) -> None:
        self._weights = [piece.holder for piece in pieces]
        self._names = [piece.name for piece in pieces]
        assert all(len(piece) == piece.holder.numel() for piece in pieces)
        self._mean = [weight.detach().clone() for weight in self._weights]
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Let the weights of now count. After every optimizer step."""
        self._update([*self._mean], [weight.detach() for weight in self._weights], 1)  # type: ignore[list-item]

    def of(self, name: str) -> Tensor:
        """The mean of a parameter, by name; the live tensor."""
        return self._mean[self._names.index(name)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the mean as its weights inside; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for number, weight in enumerate(self._weights):
            weight.data, self._mean[number] = self._mean[number], weight.data
