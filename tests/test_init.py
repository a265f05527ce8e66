"""Initial values depend on the seed, the name and the shape, and on nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from scaletransfer.models import create_model, init_weights, initial_tensors, initial_value


def test_values_are_those_of_the_rule() -> None:
    model = create_model("BiT-tiny", 5)
    init_weights(model, 0)
    state = model.state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            bound = value[0].numel() ** -0.5
            assert bound * 0.9 < value.abs().max() <= bound, name
            assert abs(value.double().mean()) < 5 * bound / (3 * value.numel()) ** 0.5, name
        elif ".gn" in name:
            assert torch.all(value == (1 if name.endswith("weight") else 0)), name
    bias, bound = state["head.conv.bias"], 1024**-0.5
    assert 0 < bias.abs().max() <= bound and len(bias.unique()) == 5


def test_neither_classes_nor_seeded_state_nor_device_change_the_body() -> None:
    first = create_model("BiT-tiny", 5)
    init_weights(first, 7)
    torch.manual_seed(123)
    with torch.device("meta"):
        tensor = initial_tensors(create_model("BiT-tiny", 300), 7)
        names = [name for name, _ in first.named_parameters()]
        # Drawn in the other order, inside a meta context.
        drawn = {name: tensor(name) for name in reversed(names)}
    for name, value in first.state_dict().items():
        assert drawn[name].device.type == "cpu" and drawn[name].dtype == torch.float32
        if not name.startswith("head.conv"):
            assert torch.equal(drawn[name], value), name
    assert drawn["head.conv.weight"].shape[0] == 300
    other = create_model("BiT-tiny", 5)
    init_weights(other, 8)
    assert not torch.equal(other.root.conv.weight, first.root.conv.weight)
    assert not torch.equal(initial_value("a", (4, 4), "uniform", 0), initial_value("b", (4, 4), "uniform", 0)), (
        "tensors of equal shape must not be equal"
    )


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_value("x", (100,), "uniform", 1, fan_in=4)
    assert torch.equal(torch.rand(3), expected)


def test_checksum() -> None:
    """Stored, so that a new release of torch or of ours that changes initial values is noticed."""
    model = create_model("BiT-tiny", 13)
    init_weights(model, 0)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    assert digest.hexdigest() == "da9675f7c0a4776b90f0afec88e828c7a0173c976bfac2e3382dc22d60cf6d38"


def test_filled_in_the_dtype_of_the_model() -> None:
    model = create_model("BiT-tiny", 5).double()
    init_weights(model, 0)
    assert torch.equal(model.root.conv.weight, initial_tensors(model, 0)("root.conv.weight").double())


def test_timm_models_by_the_same_rule() -> None:
    model = create_model("resnet18", 3)
    nn.init.constant_(model.bn1.running_mean, 5)
    init_weights(model, 0)
    assert torch.all(model.bn1.weight == 1) and torch.all(model.bn1.bias == 0)
    assert torch.all(model.bn1.running_mean == 0) and torch.all(model.bn1.running_var == 1)
    assert torch.all(model.fc.bias == 0) and model.fc.weight.abs().max() <= 512**-0.5
    convnext = create_model("convnext_atto.d2_in1k", 3, ls_init_value=1.0)
    init_weights(convnext, 0)
    gammas = [value for name, value in convnext.named_parameters() if name.endswith("gamma")]
    assert gammas and all(torch.all(gamma == 1e-5) for gamma in gammas)


def test_refusals() -> None:
    with torch.device("meta"):
        model = create_model("BiT-tiny", 3)
    with pytest.raises(ValueError, match="lies on meta"):
        init_weights(model, 0)
    with pytest.raises(KeyError):
        initial_tensors(model, 0)("head.conv.weights")
    with pytest.raises(ValueError, match="unknown kind 'normal'"):
        initial_value("x", (2, 2), "normal", 0)
    with pytest.raises(ValueError, match="needs fan_in"):
        initial_value("x", (2,), "uniform", 0)
    sharded = create_model("BiT-tiny", 3)
    sharded.root.conv.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="before sharding"):
        initial_tensors(sharded, 0)
    strange = nn.Module()
    strange.register_parameter("temperature", nn.Parameter(torch.zeros(())))
    with pytest.raises(ValueError, match="No rule gives the parameter temperature"):
        initial_tensors(strange, 0)
