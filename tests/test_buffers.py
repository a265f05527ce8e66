"""Buffers of timm's networks: what no checkpoint holds is filled, and ranks share what batch norm has seen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from scaletransfer.engine.build import Engine
from scaletransfer.engine.filling import fill_lasting
from scaletransfer.engine.strategy import Strategy


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("index", torch.arange(5), persistent=False)
        self.register_buffer("seen", torch.zeros(2))


def test_buffers_that_no_checkpoint_holds_are_filled_after_meta():
    with torch.device("meta"):
        network = Positions()
    network.to_empty(device="cpu")
    with torch.no_grad():
        network.index.fill_(77)
        network.seen.fill_(5)
    fill_lasting(network, Positions)
    assert network.index.tolist() == [0, 1, 2, 3, 4]
    assert network.seen.tolist() == [5, 5]  # those come by name from the checkpoint or the seed


def _worker(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = nn.Sequential(nn.BatchNorm1d(2))
    module(torch.full((4, 2), float(rank)) + torch.arange(4.0)[:, None])
    strategy = Strategy(engine="ddp", world=2, rank=rank, local_rank=rank, local_world=2, cpu=True)
    engine = Engine(
        strategy=strategy,
        accelerator=None,  # type: ignore[arg-type]  # nothing here asks for the device
        model=module,
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        zero=None,
        precision="fp32",
        micro_batch=4,
        accumulation=1,
        shapes={},
    )
    engine.average_buffers()
    torch.save({name: buffer.clone() for name, buffer in engine.buffers().items()}, f"{out}-{rank}")
    dist.destroy_process_group()


@pytest.mark.engine
def test_batch_norm_means_are_those_of_all_ranks(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_worker, (port, str(tmp_path / "buffers")), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"buffers-{rank}", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    # momentum 0.1 of the means 1.5 and 2.5
    assert first["0.running_mean"].tolist() == pytest.approx([0.2, 0.2])
    assert first["0.num_batches_tracked"].item() == 1
