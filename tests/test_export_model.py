"""Models go out in the forms of others and come back bit for bit."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers_models import published_state, scatter
from helpers_transfer import make_pretrained
from safetensors.torch import load_file, save_file

from scaletransfer.cli import main as cli
from scaletransfer.models import create_model
from scaletransfer.models.weights import load_into, load_pretrained

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("tiny") / "model", labels=CLASSES, mean=[0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """Timm's R50x1, and what an import made of it."""
    base = tmp_path_factory.mktemp("large")
    network = timm.create_model("resnetv2_50x1_bit", num_classes=3).eval()
    scatter(network)
    save_file(network.state_dict(), base / "resnetv2_50x1_bit.safetensors")
    argv = ["import", str(base / "resnetv2_50x1_bit.safetensors"), "--labels", "cat,dog,emu", "--task", "multiclass"]
    assert cli([*argv, "--to", str(base / "model")]) == 0
    return network, base / "model"


def export(capsys, *argv: Any) -> str:
    status = cli(["export", *map(str, argv)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


def refused(capsys, *argv: Any) -> str:
    assert cli(["export", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown
    return shown.err


@pytest.mark.parametrize("target", ["folder", "out.safetensors", "out.pth"])
def test_timm_loads_it_and_it_comes_back(tmp_path, capsys, large, target):
    network, model = large
    shown = export(capsys, model, "--to", tmp_path / target, "--format", "timm")
    assert "create_model('resnetv2_50x1_bit', num_classes=3" in shown and "note" not in shown
    file = tmp_path / target / "model.safetensors" if target == "folder" else tmp_path / target
    loaded = timm.create_model("resnetv2_50x1_bit", num_classes=3, checkpoint_path=str(file))
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert cli(["import", str(tmp_path / target), "--to", str(tmp_path / "back")]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    facts = json.loads((tmp_path / "back/model.json").read_text())
    assert facts["label_names"] == list(CLASSES) and facts["ws_eps"] == 1e-8
    state, _ = load_pretrained(tmp_path / target)  # what finetune --model-path reads
    assert all(torch.equal(state[name], value) for name, value in published_state(network).items())


def test_the_published_form_and_back(tmp_path, capsys, tiny):
    export(capsys, tiny, "--to", tmp_path / "out", "--format", "published")
    content = torch.load(tmp_path / "out" / "model.pth.tar", weights_only=True)
    theirs = create_model("BiT-tiny", 3)
    theirs.load_state_dict(content["model"], strict=True)
    assert all(torch.equal(v, content["model"][k]) for k, v in load_file(tiny / "model.safetensors").items())
    assert cli(["import", str(tmp_path / "out"), "--to", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in content["model"].items())
    facts, before = (json.loads((f / "model.json").read_text()) for f in (tmp_path / "back", tiny))
    for key in ("model", "label_names", "task", "normalisation", "transform", "policy"):
        assert facts[key] == before[key], key
    # elsewhere, without its model.json, it is what the published ones are: a file that says nothing of itself
    (tmp_path / "out" / "model.json").unlink()
    assert cli(["import", str(tmp_path / "out"), "--to", str(tmp_path / "no")]) == 2
    assert "does not say how its images were normalised" in capsys.readouterr().err


def test_a_model_with_another_eps_is_said_to_differ(tmp_path, capsys, large, tiny):
    assert "note: published standardises weights with eps 1e-10, this model was made with 1e-08" in export(
        capsys, large[1], "--to", tmp_path / "p", "--format", "published"
    )
    assert "timm has no network of BiT-tiny's size" in refused(capsys, tiny, "--to", tmp_path / "t", "--format", "timm")
    assert not (tmp_path / "t").exists()


def test_safetensors_of_a_model(tmp_path, capsys, tiny):
    export(capsys, tiny, "--to", tmp_path / "copy.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.json", "copy.safetensors"]
    state, facts = load_pretrained(tmp_path / "copy.safetensors")
    assert facts["label_names"] == list(CLASSES)
    assert all(torch.equal(state[name], value) for name, value in load_file(tiny / "model.safetensors").items())
    assert "is there already" in refused(capsys, tiny, "--to", tmp_path / "copy.safetensors")
    (tmp_path / "other.json").write_text("mine")
    assert "other.json is there already" in refused(capsys, tiny, "--to", tmp_path / "other.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    message = refused(capsys, tmp_path / "bare.safetensors", "--to", tmp_path / "x")
    assert "has no model.json of ours" in message and "scaletransfer import" in message


def test_onnx_computes_the_same_for_any_batch_and_size(tmp_path, capsys, tiny):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shown = export(capsys, tiny, "--to", tmp_path / "out", "--format", "onnx")
    assert "onnxruntime computes the same logits" in shown
    state, facts = load_pretrained(tiny)
    network = create_model(facts["model"], 3)
    load_into(network, state)
    session = ort.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 32), (5, 3, 48, 80)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = network.eval()(images).numpy()
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4, rtol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["label_names"]) == list(CLASSES)
    assert json.loads(said["normalisation"])["mean"] == [0.4, 0.5, 0.6]


def test_onnx_without_its_packages_names_the_extra(tmp_path, capsys, tiny, monkeypatch):
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    message = refused(capsys, tiny, "--to", tmp_path / "out", "--format", "onnx")
    assert "needs onnxruntime" in message and "pip install 'scaletransfer[onnx]'" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["safetensors", "published"])
def test_a_full_disk_is_said(tmp_path, capsys, tiny, small_disk, form):
    message = refused(capsys, tiny, "--to", tmp_path / "out", "--format", form)
    assert f"{tmp_path / 'out'}/model." in message and "cannot be written" in message
    assert not list(tmp_path.iterdir())
