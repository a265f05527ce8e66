"""Every fast way through the network against the plain one of plain_bit.py, in float64 and over steps in float32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from plain_bit import PlainBiT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from scaletransfer.models import convolution as convolutions
from scaletransfer.models import create_model, init_weights
from scaletransfer.models.convolution import OnceAStep, StdConv2d, without_products
from scaletransfer.models.folding import folded


def _network(checkpointing: bool = False) -> nn.Module:
    """Values with filters away from zero and norms away from 1, in float64."""
    network = create_model("BiT-tiny", 5)
    init_weights(network, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator) + 0.02)
    if checkpointing:
        network.set_grad_checkpointing()
    return network.double()


def _batches(count: int, size: int = 4, side: int = 32, channels: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        images = torch.randn(size, channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
        yield images, torch.randint(5, (size,), generator=generator)


def _gradients(network: nn.Module, run: nn.Module, batches: list[tuple[Tensor, Tensor]], once: bool) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    held = OnceAStep(network) if once else None
    with held.step() if held else nullcontext():
        for number, (images, target) in enumerate(batches):
            if held and number == len(batches) - 1:
                held.last()
            cross_entropy(run(images), target).backward()
    return [p.grad.clone() for p in network.parameters()]


def _close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-9 * float(b.norm())


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each weight that goes through a product."""
    seen: list[int] = []
    right = StdConv2d._multiplied
    monkeypatch.setattr(StdConv2d, "_multiplied", lambda self, *a: seen.append(self.out_channels) or right(self, *a))
    return seen


@pytest.mark.parametrize(
    ("products", "once", "checkpointing", "channels"),
    [
        (False, False, True, 1),
        (False, True, False, 3),
        (False, True, True, 1),
        (True, False, False, 3),
        (True, True, True, 3),
    ],
)
def test_logits_and_gradients_equal_the_plain_ones(products, once, checkpointing, channels, monkeypatch):
    monkeypatch.setattr(convolutions, "PIECE", 300_000)  # several pieces of the larger weights, and a rest
    if products:
        monkeypatch.setattr(convolutions, "LARGE_WEIGHT", 5000)
    seen = _spy(monkeypatch)
    network = _network(checkpointing=checkpointing)
    plain = PlainBiT(network)
    batches = list(_batches(2, channels=channels))
    for images, _ in batches:
        assert float((network(images) - plain(images)).detach().abs().max()) < 1e-9
    _close(_gradients(network, network, batches, once), _gradients(network, plain, batches, False))
    assert bool(seen) == products
    assert all(m.standard is None and not m.joined for m in network.modules() if isinstance(m, StdConv2d))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("side", [7, 8])
def test_a_product_is_the_convolution(kernel, stride, side, monkeypatch):
    monkeypatch.setattr(convolutions, "LARGE_WEIGHT", 1)
    products = _spy(monkeypatch)
    layer = StdConv2d(6, 10, kernel, stride=stride, ws_eps=1e-10).double()
    layers = list(layer.parameters())
    x = torch.randn(3, 6, side, side, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *layers], grad)
    assert products == [10]
    with without_products():
        other = layer(x)
        wanted = torch.autograd.grad(other, [x, *layers], grad)
    assert products == [10]
    assert torch.allclose(out, other, rtol=0, atol=1e-12)
    _close(list(found), list(wanted))
    many = layer(torch.randn(200, 6, side, side, dtype=torch.float64))
    assert products == [10] and many.shape[1:] == out.shape[1:]


def test_evaluation_is_equal_to_the_last_bit_with_products(monkeypatch):
    monkeypatch.setattr(convolutions, "LARGE_WEIGHT", 5000)
    network = _network().float().eval()
    images = next(_batches(1, dtype=torch.float32))[0]
    with torch.no_grad():
        before = network(images)
        with folded(network):
            assert torch.equal(network(images), before)


def test_one_backward_through_standardisation_a_step(monkeypatch):
    monkeypatch.setattr(convolutions, "PIECE", 2**30)
    network = _network()
    calls: list[int] = []
    right = convolutions._backward
    monkeypatch.setattr(convolutions, "_backward", lambda *a: calls.append(1) or right(*a))
    seen: dict[str, int] = {}
    for name, p in network.named_parameters():  # as DDP and DeepSpeed wait for gradients
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.update({name: seen.get(name, 0) + 1}))
    _gradients(network, network, list(_batches(4)), once=True)
    layers = sum(isinstance(m, StdConv2d) for m in network.modules())
    assert len(calls) == layers
    assert {count for name, count in seen.items() if "conv" in name and "head" not in name} == {1}
    assert seen["head.conv.weight"] == 4


def test_frozen_weights_get_no_gradient():
    network = _network()
    network.root.conv.weight.requires_grad_(False)
    held = OnceAStep(network)
    with held.step():
        for number, (images, target) in enumerate(_batches(2)):
            if number:
                held.last()
            cross_entropy(network(images), target).backward()
    assert network.root.conv.weight.grad is None
    assert network.body.block1.unit01.conv1.weight.grad is not None


def test_an_error_in_a_step_leaves_nothing_behind():
    network = _network()
    held = OnceAStep(network)
    images, target = next(_batches(1))
    wanted = _gradients(network, network, [(images, target)], False)
    with pytest.raises(KeyError), held.step():
        cross_entropy(network(images), target).backward()
        raise KeyError
    _close(_gradients(network, network, [(images, target)], False), wanted)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.01)
    wanted = _gradients(network, PlainBiT(network), [(images, target)] * 2, False)
    network.zero_grad()
    with held.step():  # with the weights of now
        cross_entropy(network(images), target).backward()
        held.last()
        cross_entropy(network(images), target).backward()
    _close([p.grad for p in network.parameters()], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("products", [False, True])
def test_fifty_steps_stay_with_the_plain_ones(products, monkeypatch):
    if products:
        monkeypatch.setattr(convolutions, "LARGE_WEIGHT", 5000)
    losses = []
    for fast in (True, False):
        network = _network().float()
        run = network if fast else PlainBiT(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        batches = list(_batches(4, dtype=torch.float32))
        found = []
        for step in range(50):
            group = [batches[step % 4], batches[(step + 1) % 4]]
            held = OnceAStep(network) if fast else None
            optimizer.zero_grad()
            total = 0.0
            with held.step() if held else nullcontext():
                for number, (images, target) in enumerate(group):
                    if held and number:
                        held.last()
                    loss = cross_entropy(run(images), target)
                    loss.backward()
                    total += loss.item()
            optimizer.step()
            found.append(total / 2)
        losses.append(found)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
