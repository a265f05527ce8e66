"""Checkpoints: published forms load to equal tensors, what could execute is refused and does not run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from scaletransfer.models import create_model, init_weights
from scaletransfer.models.weights import from_timm, load_into, load_pretrained, to_timm


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A BiT-tiny with values that differ in every tensor."""
    model = create_model("BiT-tiny", 6)
    init_weights(model, 3)
    values = model.state_dict()
    for number, value in enumerate(values.values()):
        value += number * 1e-3
    return values


def _google(state: dict[str, Tensor], prefix: str = "resnet/") -> dict[str, np.ndarray]:
    """The .npz form, written by hand from the names in PROTOCOL and not through our own mapping."""
    arrays = {
        f"{prefix}root_block/standardized_conv2d/kernel": state["root.conv.weight"],
        f"{prefix}group_norm/gamma": state["head.gn.weight"],
        f"{prefix}group_norm/beta": state["head.gn.bias"],
        f"{prefix}head/conv2d/kernel": state["head.conv.weight"],
        f"{prefix}head/conv2d/bias": state["head.conv.bias"],
    }
    for block in (1, 2, 3, 4):
        ours, theirs = f"body.block{block}.unit01", f"{prefix}block{block}/unit01"
        for letter, digit in zip("abc", "123", strict=True):
            arrays[f"{theirs}/{letter}/standardized_conv2d/kernel"] = state[f"{ours}.conv{digit}.weight"]
            arrays[f"{theirs}/{letter}/group_norm/gamma"] = state[f"{ours}.gn{digit}.weight"]
            arrays[f"{theirs}/{letter}/group_norm/beta"] = state[f"{ours}.gn{digit}.bias"]
        arrays[f"{theirs}/a/proj/standardized_conv2d/kernel"] = state[f"{ours}.downsample.weight"]
    return {
        name: (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).contiguous().numpy()
        for name, value in arrays.items()
    }


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, value in right.items():
        assert torch.equal(left[name], value), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_pytorch_form(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    folder = tmp_path / "chexpert_bit50x1"
    folder.mkdir()
    optimizer = {
        "state": {0: {"momentum_buffer": torch.zeros(3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    content = {"model": {prefix + k: v for k, v in state.items()}, "optimizer": optimizer, "epoch": 89}
    torch.save(content, folder / "model.pth.tar")
    for path in (folder, folder / "model.pth.tar"):
        loaded, meta = load_pretrained(path)
        _assert_equal(loaded, state)
        assert meta == {"format": "pytorch", "epoch": 89, "ws_eps": 1e-8}
    model = create_model("BiT-tiny", 6)
    load_into(model, loaded)
    _assert_equal(model.state_dict(), state)


@pytest.mark.parametrize("prefix", ["resnet/", ""])
def test_google_form(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    np.savez(tmp_path / "BiT-M-tiny.npz", **_google(state, prefix))
    for path in (tmp_path, tmp_path / "BiT-M-tiny.npz"):
        loaded, meta = load_pretrained(path)
        _assert_equal(loaded, state)
        assert meta == {"format": "google-npz", "ws_eps": 1e-8}


def test_google_form_of_r50x1_gives_timms_logits(tmp_path: Path) -> None:
    """The twin of timm reads the same .npz by its own code."""
    model = create_model("BiT-M-R50x1", 4, ws_eps=1e-8)
    init_weights(model, 0)
    ours = model.state_dict()
    arrays = {}
    for name, value in to_timm(ours).items():
        parts = name.split(".")
        if parts[0] == "stages":
            letter = "a" if parts[4] == "downsample" else "abc"[int(parts[4][-1]) - 1]
            kind = {"weight": "gamma", "bias": "beta"}[parts[-1]]
            leaf = f"group_norm/{kind}" if parts[4].startswith("norm") else "standardized_conv2d/kernel"
            proj = "proj/" if parts[4] == "downsample" else ""
            key = f"block{int(parts[1]) + 1}/unit{int(parts[3]) + 1:02d}/{letter}/{proj}{leaf}"
        else:
            key = {
                "stem.conv.weight": "root_block/standardized_conv2d/kernel",
                "norm.weight": "group_norm/gamma",
                "norm.bias": "group_norm/beta",
                "head.fc.weight": "head/conv2d/kernel",
                "head.fc.bias": "head/conv2d/bias",
            }[name]
        arrays[f"resnet/{key}"] = (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).contiguous().numpy()
    file = tmp_path / "BiT-M-R50x1.npz"
    np.savez(file, **arrays)
    loaded, _ = load_pretrained(file)
    _assert_equal(loaded, ours)
    twin = timm.create_model("resnetv2_50x1_bit", num_classes=4).eval()
    twin.load_pretrained(str(file))
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (twin.double()(image.double()) - model.double()(image.double())).abs().max() < 1e-9


def test_safetensors_with_and_without_json(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "model.safetensors")
    loaded, meta = load_pretrained(tmp_path / "model.safetensors")
    _assert_equal(loaded, state)
    assert meta == {"ws_eps": 1e-8}
    (tmp_path / "model.json").write_text(json.dumps({"model": "BiT-tiny", "label_names": ["a"]}))
    assert load_pretrained(tmp_path, model_name="BiT-tiny")[1]["label_names"] == ["a"]
    with pytest.raises(ValueError, match="holds BiT-tiny, but BiT-M-R50x1"):
        load_pretrained(tmp_path, model_name="BiT-M-R50x1")
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json is not valid JSON"):
        load_pretrained(tmp_path)


class _Planted:
    """A pickle of this writes a file when it is loaded by plain pickle or an unsafe reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def test_planted_pickles_are_refused_and_do_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    planted = _Planted(mark)
    with_torch, plain, array = (
        tmp_path / "model.pth.tar",
        tmp_path / "plain.pth",
        tmp_path / "BiT-M-R50x1.npz",
    )
    torch.save({"model": planted, "epoch": 1}, with_torch)
    plain.write_bytes(pickle.dumps(planted, protocol=2))
    np.savez(array, **{"resnet/group_norm/gamma": np.array([planted], dtype=object)})
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps(planted, protocol=2))
    for file in (with_torch, plain, array, disguised):
        with pytest.raises(ValueError) as error:
            load_pretrained(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)
        assert not mark.exists()
    with pytest.raises(ValueError, match="refused and nothing in it was run"):
        load_pretrained(with_torch)
    # The plant is real: it does run where pickles are trusted.
    pickle.loads(plain.read_bytes())  # noqa: S301
    assert mark.exists()


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path, state: dict[str, Tensor]) -> None:
    good = tmp_path / "good.pth"
    torch.save({"model": state}, good)
    np.savez(tmp_path / "good.npz", **_google(state))
    save_file(state, tmp_path / "good.safetensors")
    for name in ("good.pth", "good.npz", "good.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for count, length in enumerate((0, 5, len(whole) // 2)):
            file = tmp_path / f"cut{count}{Path(name).suffix}"
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=file.name) as error:
                load_pretrained(file)
            assert "\n" not in str(error.value)
    np.savez(tmp_path / "foreign.npz", **{"conv1/kernel": np.zeros(3)})
    with pytest.raises(ValueError, match="'conv1/kernel' has no place"):
        load_pretrained(tmp_path / "foreign.npz")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="not tensors"):
        load_pretrained(tmp_path / "numbers.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="neither a state_dict"):
        load_pretrained(tmp_path / "list.pth")
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="unknown kind of checkpoint"):
        load_pretrained(tmp_path / "model.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_pretrained(tmp_path / "nowhere")


def test_load_into_lists_every_problem_and_touches_nothing(state: dict[str, Tensor]) -> None:
    model = create_model("BiT-tiny", 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = dict(state)
    del broken["head.gn.weight"]
    broken["extra"] = torch.zeros(1)
    broken["body.block1.unit01.gn1.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        load_into(model, broken)
    assert str(error.value) == (
        "The checkpoint does not fit the model: missing head.gn.weight; unexpected extra; "
        "wrong shape of body.block1.unit01.gn1.bias (7,) instead of (32,)."
    )
    _assert_equal(model.state_dict(), before)


def test_head_is_strict_or_replaced(state: dict[str, Tensor]) -> None:
    model = create_model("BiT-tiny", 9)
    own = model.head.conv.weight.detach().clone()
    with pytest.raises(ValueError, match=r"head\.conv\.weight \(6, 1024, 1, 1\) instead of \(9, .*head='replace'"):
        load_into(model, state)
    load_into(model, state, head="replace")
    assert torch.equal(model.head.conv.weight, own)
    assert torch.equal(model.body.block4.unit01.conv3.weight, state["body.block4.unit01.conv3.weight"])
    headless = {name: value for name, value in state.items() if not name.startswith("head.conv")}
    load_into(model, headless, head="replace")
    with pytest.raises(ValueError, match=r"missing head\.conv\.weight, head\.conv\.bias"):
        load_into(model, headless)
    # The same number of classes is no reason to keep the checkpoint's head.
    twin = create_model("BiT-tiny", 6)
    own = twin.head.conv.weight.detach().clone()
    load_into(twin, state, head="replace")
    assert torch.equal(twin.head.conv.weight, own)
    timm_model = create_model("resnet18", 5)
    load_into(timm_model, create_model("resnet18", 3).state_dict(), head="replace")


def test_timm_names_go_there_and_back(state: dict[str, Tensor]) -> None:
    _assert_equal(from_timm(to_timm(state)), state)
    with pytest.raises(ValueError, match="not the name of a BiT tensor"):
        to_timm({"stem.conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the name of a tensor of timm"):
        from_timm({"root.conv.weight": torch.zeros(1)})
