"""Weights that are standardised once give the logits of those that are standardised in every forward, bit for bit."""

from __future__ import annotations

import pytest
import torch

from scaletransfer.models import create_model, init_weights
from scaletransfer.models.convolution import StdConv2d
from scaletransfer.models.folding import folded


@pytest.mark.parametrize(
    "name", ["BiT-tiny", "resnetv2_50x1_bit", pytest.param("vit_small_r26_s32_224", marks=pytest.mark.slow)]
)
def test_the_same_logits(name):
    network = create_model(name, 3)
    if name == "BiT-tiny":
        init_weights(network, 1)
    side = 224 if name.startswith("vit") else 64
    images = torch.randn(2, 3, side, side)
    network.eval()
    with torch.no_grad():
        before = network(images)
        with folded(network):
            assert torch.equal(network(images), before)
        assert torch.equal(network(images), before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = network(images)
            with folded(network):
                assert torch.equal(network(images), low)
    network.train()
    assert network(images).requires_grad


def test_the_weights_are_standardised_once(monkeypatch):
    from scaletransfer.models import convolution, folding

    network = create_model("BiT-tiny", 3).eval()
    layers = sum(isinstance(module, StdConv2d) for module in network.modules())
    calls = []
    right = convolution.standardize
    monkeypatch.setattr(folding, "standardize", lambda *a: calls.append(1) or right(*a))
    monkeypatch.setattr(convolution, "_standardized", lambda *a, f=convolution._standardized: calls.append(2) or f(*a))
    with torch.no_grad(), folded(network):
        for _ in range(3):
            network(torch.randn(1, 1, 32, 32))
    assert calls.count(1) == layers == calls.count(2)  # once each, by the folding alone
    assert all(module.standard is None for module in network.modules() if isinstance(module, StdConv2d))


def test_an_error_inside_leaves_nothing_behind():
    network = create_model("resnetv2_50x1_bit", 3)
    with pytest.raises(KeyError), folded(network):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in network.modules())
