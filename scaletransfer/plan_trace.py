"""What a micro-batch needs beside an engine's state, and how many operations it takes: measured on fake tensors.

The network is run forward and backward as the engine would run it, in a ledger of every storage that comes and goes
(``ledger.record``): under FSDP2 on fake ranks, with its gathered blocks and reduced gradients. Two micro-batches give
all others, as in ``memory``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scaletransfer.fake_ranks import fake_mesh, fake_ranks, shard
from scaletransfer.ledger import fake_network, record
from scaletransfer.memory import fullest, moments
from scaletransfer.models.convolution import without_products

Create = Callable[[], nn.Module]
Gradients = Literal["there", "new", "taken"]
LOW, HIGH = 2, 3
"""Not 1: batch norm refuses a single value a channel."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Bytes beside the state at each moment of a micro-batch."""

    moments: tuple[tuple[int, int], ...]
    """(fixed bytes, bytes an image), of those moments that are the fullest for some micro-batch."""

    forward: tuple[int, int] = (0, 0)
    """The same at the end of forward."""

    def kept(self, micro_batch: int) -> int:
        """Bytes at the end of forward."""
        return self.forward[0] + micro_batch * self.forward[1]

    def live(self, micro_batch: int) -> int:
        """Bytes at the fullest moment."""
        return max(fixed + micro_batch * each for fixed, each in self.moments)


class Cast(nn.Module):
    """Hands a network of bf16 weights bf16 images, as the engine does for DeepSpeed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, h, w] float -> [b, classes] bf16."""
        return self.network(images.to(torch.bfloat16))


@dataclass(frozen=True, kw_only=True)
class Images:
    """What the network gets, and where."""

    channels: int
    size: int
    device_type: str
    """"cuda" or "cpu", whose autocast differ."""


def trace(
    create: Create, images: Images, *, autocast: bool, native: bool, gradients: Gradients, kept: float = 0.0
) -> Trace:
    """A network whose parameters are whole.

    Args:
        create: makes it. autocast: float32 weights under bf16 autocast. native: bf16 weights.
        gradients, kept: as for ``ledger.record``; those that come new are part of the trace, those that are there not.
    """

    def made() -> nn.Module:
        return Cast(create().to(torch.bfloat16)) if native else create()

    with fake_network(made) as network:
        return _trace(network, images, autocast, gradients, kept)


def trace_fsdp(
    create: Create, images: Images, *, world: int, shards: int, precision: str, gradients: Gradients
) -> Trace:
    """A network under FSDP2 on rank 0 of ``world`` fake ranks, of which ``shards`` share the state."""
    with fake_fsdp(create, world, shards, precision) as network:
        return _trace(network, images, False, gradients)


@contextmanager
def fake_fsdp(create: Create, world: int, shards: int, precision: str) -> Iterator[nn.Module]:
    """The sharded network of fake tensors, ready to train; collectives move nothing."""
    with fake_ranks(world):
        with torch.device("meta"):
            network = create().train()
        shard(network, fake_mesh(world, shards), precision)
        # FSDP2 makes some small tensors of its own outside the network's operations
        with FakeTensorMode(allow_non_fake_inputs=True):
            network.to_empty(device="cpu")
            yield network


def _trace(network: nn.Module, images: Images, autocast: bool, gradients: Gradients, kept: float = 0.0) -> Trace:
    found = [
        record(
            network,
            micro_batch,
            images.channels,
            images.size,
            bf16=autocast,
            device_type=images.device_type,
            gradients=gradients,
            kept=kept,
        )
        for micro_batch in (LOW, HIGH)
    ]
    sums = moments(found[0][0], found[1][0], LOW, HIGH)
    return Trace(moments=fullest(sums), forward=sums[found[0][1]])


def flops_per_image(create: Create, images: Images) -> int:
    """Operations (a multiplication and an addition are two) of forward and backward of one image.

    Counted by torch's FlopCounterMode over the network as it runs, recomputation included: convolutions and matrix
    products; norms and additions, some per cent of the time, are not.
    """
    with fake_network(create) as network, without_products():
        counts = []
        for micro_batch in (LOW, HIGH):
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(micro_batch, images.channels, images.size, images.size)).sum().backward()
            counts.append(counter.get_total_flops())
            network.zero_grad(set_to_none=True)
    return counts[1] - counts[0]
