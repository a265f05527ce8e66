"""The BiT network: names, sizes, arithmetic against timm, checkpointing and what it keeps in memory."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaletransfer.models import PUBLISHED, PreActBottleneck, create_model, head_names, init_weights
from scaletransfer.models.convolution import StdConv2d, standardize
from scaletransfer.models.weights import from_timm, to_timm


def _randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values with norms' scales and biases away from 1 and 0, so that a swapped name would show."""
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


COUNTS = {  # PROTOCOL: 1000, 21842 and 13 classes
    "R50x1": (25_549_352, 68_254_610, 23_526_989),
    "R101x1": (44_541_480, 87_246_738, 42_519_117),
    "R50x3": (217_319_080, 345_393_170, 211_253_965),
    "R152x4": (936_533_224, 1_107_291_730, 928_446_733),
}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("kind", ["S", "M"])
def test_parameter_counts(size: str, kind: str) -> None:
    with torch.device("meta"):
        for classes, expected in zip((1000, 21842, 13), COUNTS[size], strict=True):
            model = create_model(f"BiT-{kind}-{size}", classes)
            assert sum(p.numel() for p in model.parameters()) == expected
            assert model.published


@pytest.mark.parametrize(
    ("size", "twin"),
    [("101x3", "resnetv2_101x3_bit"), ("152x2", "resnetv2_152x2_bit"), ("152x4", "resnetv2_152x4_bit")],
)
def test_shapes_of_large_sizes_equal_timm(size: str, twin: str) -> None:
    with torch.device("meta"):
        ours = create_model(f"BiT-M-R{size}", 7).state_dict()
        theirs = timm.create_model(twin, num_classes=7).state_dict()
    assert {k: v.shape for k, v in to_timm(ours).items()} == {k: v.shape for k, v in theirs.items()}
    assert set(from_timm(theirs)) == set(ours)


@pytest.mark.parametrize("size", ["50x1", "101x1"])
def test_logits_equal_timm(size: str) -> None:
    model = _randomize(create_model(f"BiT-M-R{size}", 5, ws_eps=1e-8).double())
    twin = timm.create_model(f"resnetv2_{size}_bit", num_classes=5).double().eval()
    twin.load_state_dict(to_timm(model.state_dict()))
    # An odd size shows differences in padding and pooling that even ones hide.
    for side in (64, 75):
        image = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            ours, theirs = model(image), twin(image)
        assert theirs.abs().max() > 0.1
        assert (ours - theirs).abs().max() < 1e-9


def test_default_eps_is_1e_10_and_differs_from_timm() -> None:
    model = _randomize(create_model("BiT-tiny", 5).double())
    other = create_model("BiT-tiny", 5, ws_eps=1e-8).double()
    other.load_state_dict(model.state_dict())
    assert {m.ws_eps for m in model.modules() if isinstance(m, StdConv2d)} == {1e-10}
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0 < (model(image) - other(image)).abs().max() < 1e-2


def test_names_are_the_published_ones() -> None:
    with torch.device("meta"):
        state = create_model("BiT-M-R50x1", 1000).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert len(shapes) == 1 + 16 * 9 + 4 + 4
    expected = {
        "root.conv.weight": (64, 3, 7, 7),
        "body.block1.unit01.gn1.weight": (64,),
        "body.block1.unit01.gn1.bias": (64,),
        "body.block1.unit01.conv1.weight": (64, 64, 1, 1),
        "body.block1.unit01.conv2.weight": (64, 64, 3, 3),
        "body.block1.unit01.conv3.weight": (256, 64, 1, 1),
        "body.block1.unit01.downsample.weight": (256, 64, 1, 1),
        "body.block2.unit01.downsample.weight": (512, 256, 1, 1),
        "body.block3.unit06.conv2.weight": (256, 256, 3, 3),
        "body.block4.unit03.gn3.bias": (512,),
        "head.gn.weight": (2048,),
        "head.conv.weight": (1000, 2048, 1, 1),
        "head.conv.bias": (1000,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "body.block1.unit02.downsample.weight" not in shapes
    unit = r"body\.block[1-4]\.unit\d\d\.(gn[123]\.(weight|bias)|conv[123]\.weight|downsample\.weight)"
    assert all(re.fullmatch(unit, n) or n.startswith(("root.conv", "head.gn", "head.conv")) for n in shapes)


def test_other_sizes_are_unpublished_and_tiny_is_small() -> None:
    with torch.device("meta"):
        other, tiny = create_model("BiT-S-R152x1", 4), create_model("BiT-tiny", 13)
    assert not other.published and not tiny.published
    assert 1_900_000 < sum(p.numel() for p in tiny.parameters()) < 2_100_000
    assert type(next(m for m in tiny.modules() if isinstance(m, PreActBottleneck))).__name__ == "PreActBottleneck"
    assert len(PUBLISHED) == 12


def test_standardize_against_numpy_arithmetic() -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.3
    rows = weight.numpy().reshape(6, -1)
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.var(1, keepdims=True) + 1e-3) ** 0.5
    result = standardize(weight, 1e-3)
    assert result.shape == weight.shape
    assert abs(result.numpy().reshape(6, -1) - expected).max() < 1e-12
    # A shard of whole rows, also an empty one, gives the same rows.
    assert torch.equal(standardize(weight[2:5], 1e-3), result[2:5])
    assert standardize(weight[:0], 1e-3).shape == (0, 4, 3, 3)


def test_standardize_computes_bf16_weights_in_float32() -> None:
    weight = torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(1)).mul(0.05).bfloat16()
    result = standardize(weight, 1e-10)
    assert result.dtype == torch.float32
    assert (result - standardize(weight.double(), 1e-10)).abs().max() < 1e-5
    convolution = StdConv2d(64, 8, 3, ws_eps=1e-10).bfloat16()
    assert convolution(torch.zeros(1, 64, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bf16_autocast_runs_and_is_near_float32() -> None:
    model = create_model("BiT-tiny", 5)
    init_weights(model, 0)
    image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(image)
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_grey_is_repeated_and_wrong_channels_are_refused() -> None:
    model = create_model("BiT-tiny", 3)
    init_weights(model, 0)
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.double()
        assert (model(grey.double()) - model(grey.repeat(1, 3, 1, 1).double())).abs().max() < 1e-12
        model.float()
    with pytest.raises(ValueError, match=r"3 channels \(or 1\), not 2"):
        model(torch.zeros(1, 2, 64, 64))
    single = create_model("BiT-tiny", 3, in_channels=1)
    assert single(grey).shape == (2, 3)


def test_output_is_no_view() -> None:
    logits = create_model("BiT-tiny", 4)(torch.zeros(2, 1, 64, 64))
    assert logits.shape == (2, 4) and not logits._is_view() and logits.is_contiguous()


def _gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(image).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_checkpointing_changes_neither_names_nor_gradients() -> None:
    model = _randomize(create_model("BiT-tiny", 4).double())
    names = list(model.state_dict())
    image = torch.randn(2, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = _gradients(model, image)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.body.block1.unit01.conv2.register_forward_hook(count)
    model.set_grad_checkpointing()
    recomputed = _gradients(model, image)
    assert calls == 2, "the unit was not computed again in backward"
    assert list(model.state_dict()) == names
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    model.set_grad_checkpointing(False)
    calls = 0
    _gradients(model, image)
    assert calls == 1


def _kept(model: nn.Module, image: Tensor) -> list[Tensor]:
    """What autograd keeps from forward for backward, parameters themselves left out."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(image).sum()
    return kept


def test_no_standardised_weight_lives_from_forward_to_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("BiT-tiny", 4)
    init_weights(model, 0)
    image = torch.zeros(1, 1, 64, 64)
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 4}
    weights |= {(p.shape[0], p[0].numel()) for p in model.parameters() if p.ndim == 4}  # as rows
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        assert not weights & {tuple(t.shape) for t in _kept(model, image)}
    model.set_grad_checkpointing(False)
    monkeypatch.setattr(StdConv2d, "forward", _by_autograd)
    body = {tuple(p.shape) for n, p in model.named_parameters() if n.startswith("body") and p.ndim == 4}
    assert body <= {tuple(t.shape) for t in _kept(model, image)}, "the check would not see a kept weight"


def test_forward_compiles_to_one_graph() -> None:
    model = create_model("BiT-tiny", 3)
    init_weights(model, 0)
    image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(image), model(image), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("BiT-M-R50x0", "BiT-M-R50x"),
        ("bit-m-r50x1", "BiT-M-R50x1"),
        ("BiT-M-R51x1", "BiT-M-R"),
        ("resnet5O", "resnet50"),
        ("hf-hub:someone/model", "did you mean"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="Unknown model") as error:
        create_model(name, 3)
    assert hint in str(error.value)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        create_model("BiT-tiny", 0)
    with pytest.raises(ValueError, match="no option zero_haed"):
        create_model("BiT-tiny", 3, zero_haed=True)
    with pytest.raises(ValueError, match="not downloaded"):
        create_model("resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="refuses the options"):
        create_model("resnet18", 3, no_such_option=1)


def test_timm_model_takes_grey_and_keeps_its_names() -> None:
    model = create_model("resnet18", 3).eval()
    assert set(model.state_dict()) == set(timm.create_model("resnet18", num_classes=3).state_dict())
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.double()
        assert (model(grey.double()) - model(grey.repeat(1, 3, 1, 1).double())).abs().max() < 1e-12
        model.float()


def test_head_names() -> None:
    assert head_names(create_model("BiT-tiny", 3)) == ("head.conv.weight", "head.conv.bias")
    assert head_names(create_model("resnet18", 3)) == ("fc.weight", "fc.bias")
    assert head_names(nn.Linear(2, 2)) == ()


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"scaletransfer\[timm\]"):
        create_model("resnet18", 3)


def test_group_norm_stays_in_bf16_under_autocast() -> None:
    """As accurate as bf16 allows, and less memory than fp32 where autocast has CUDA's rules."""
    from scaletransfer.memory import estimate
    from scaletransfer.models.bit import GroupNorm

    norm = GroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 64, 9, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    exact = torch.nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), exact, rtol=2**-6, atol=2**-7)
    assert torch.equal(norm(x.float()), torch.nn.functional.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps))
    per_image = {
        precision: estimate(
            lambda: create_model("BiT-tiny", 10), 3, 64, precision=precision, activation_checkpointing=False
        ).activation_bytes_per_image
        for precision in ("fp32", "bf16")
    }
    assert per_image["bf16"] < 0.6 * per_image["fp32"]


def _by_autograd(layer: StdConv2d, x: Tensor) -> Tensor:
    """The same convolution, its backward left to autograd."""
    x = x.expand(-1, layer.in_channels, -1, -1)
    return F.conv2d(x, standardize(layer.weight, layer.ws_eps).to(x.dtype), None, layer.stride, layer.padding)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_gradients_of_a_standardised_convolution(kernel: int, stride: int, dtype: torch.dtype, tolerance: float):
    torch.manual_seed(kernel)
    layer = StdConv2d(6, 8, kernel, stride=stride, ws_eps=1e-8).to(dtype)
    found = []
    for forward in (layer, partial(_by_autograd, layer)):
        x = torch.randn(2, 6, 15, 15, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = forward(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, layer.weight.grad))
        layer.weight.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradients_of_a_standardised_convolution_under_autocast_and_where_one_is_not_wanted():
    layer = StdConv2d(6, 8, 3, ws_eps=1e-8)
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert (out - _by_autograd(layer, x)).abs().max() < 0.01 * out.abs().max()
    layer.weight.grad = None
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and x.grad.abs().max() > 0
    layer.weight.requires_grad_(True)
    layer(x.detach()).square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
