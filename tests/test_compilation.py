"""Units through torch.compile: the same numbers, equal units once; and plainly, with a sentence, where it fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaletransfer.models import compilation, convolution, create_model, init_weights
from scaletransfer.models.bit import PreActBottleneck


@pytest.fixture(autouse=True)
def _as_new():
    compilation._failed.clear()
    compilation._compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compilation._failed.clear()
    compilation._compiled.cache_clear()


def _gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    network(images).square().sum().backward()
    return [p.grad.clone() for p in network.parameters()]


def _network(name: str = "BiT-tiny") -> nn.Module:
    network = create_model(name, 4).double()
    init_weights(network, 0)
    return network


def test_where_the_compiler_fails_a_unit_runs_plainly(monkeypatch, capsys):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=no_compiler, **options))
    network, images = _network(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = _gradients(network, images)
    network.set_compiled()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(_gradients(network, images), wanted, strict=True))
    said = capsys.readouterr().err
    assert said.count("warning: torch.compile failed") == 1 and "training goes on without it" in said


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equal_units_are_compiled_once_and_give_the_same(checkpointing, monkeypatch):
    made: list[int] = []

    def count(graph, inputs):
        made.append(1)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=count, **options))
    monkeypatch.setattr(convolution, "LARGE_WEIGHT", 10**12)  # products are not for the compiler
    network = create_model("BiT-S-R50x1", 4)
    init_weights(network, 0)
    images = torch.randn(1, 3, 32, 32)
    if checkpointing:
        network.set_grad_checkpointing()
    wanted = _gradients(network, images)
    network.set_compiled()
    found = _gradients(network, images)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert sum(isinstance(m, PreActBottleneck) for m in network.modules()) == 16
    assert len(made) == 8  # the first unit of each block, and the others
    with torch.no_grad():
        network.eval()(images)
    assert len(made) == 8


@pytest.mark.slow
def test_compiled_code_gives_the_gradients():
    network, images = _network(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = _gradients(network, images)
    network.set_compiled()
    for a, b in zip(_gradients(network, images), wanted, strict=True):
        assert float((a - b).norm()) <= 1e-9 * float(b.norm())
    assert not compilation._failed
