"""What goes beyond the paper: frozen parts, AdamW, weight means, layer-wise rates, CutMix, smoothing, timm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_data import make_image_folder
from helpers_transfer import config, losses, make_pretrained, rows, weights
from safetensors.torch import save_file

from scaletransfer.config import FinetuneConfig, FinetuneOptimizerConfig, load_config
from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine.average import WeightAverage
from scaletransfer.engine.pieces import plain_pieces
from scaletransfer.engine.strategy import Strategy
from scaletransfer.evaluate import evaluate
from scaletransfer.finetune import finetune, main
from scaletransfer.losses import make_loss
from scaletransfer.models import create_model, head_names, init_weights
from scaletransfer.transfer.freezing import freeze
from scaletransfer.transfer.optimizers import check_engine, layer_scales, make
from scaletransfer.transfer.plan import make_plan

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=CLASSES, per_class=6)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.1")
CASES = {
    "probe": ("model.linear_probe=true",),
    "block3": ("model.freeze_through=block3",),
    "adamw": ADAMW,
    "ema": ("ema_decay=0.8",),
    "layers": ("optimizer.layer_decay=0.5", "label_smoothing=0.1"),
    "everything": (*ADAMW, "ema_decay=0.7", "model.freeze_through=block2", "cutmix=1", "optimizer.layer_decay=0.6"),
}


QUICK = ("probe", "everything")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(case, images, pretrained, tmp_path):
    cfg = config(f"data.images={images}", f"model.path={pretrained}", "checkpoint.keep=9", *CASES[case])
    finetune(tmp_path / "whole", cfg)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("model", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again" / "result.json").unlink()
    finetune(tmp_path / "again", cfg)
    for name in ("model/model.safetensors", "predictions.csv", "result.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert losses(tmp_path / "again")[-4:] == losses(tmp_path / "whole")[-4:]
    before = {**torch_file(pretrained / "model.safetensors")}
    after = weights(tmp_path / "whole")
    still = {name for name in after if name in before and torch.equal(after[name], before[name])}
    frozen = {
        "probe": {name for name in after if not name.startswith("head.conv")},
        "block3": {n for n in after if n.startswith(("root", "body.block1", "body.block2", "body.block3"))},
        "everything": {n for n in after if n.startswith(("root", "body.block1", "body.block2"))},
    }.get(case, set())
    assert still == frozen
    found = evaluate(tmp_path / "whole", images=images, workers=0, resamples=0)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["metrics"]["loss"], abs=1e-6)  # the exported model is what was scored


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_the_mean_is_that_of_timm(images, pretrained, tmp_path):
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    ours, theirs = WeightAverage(plain_pieces(network), 0.9), ModelEmaV3(network, decay=0.9)
    for _ in range(5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update()
        theirs.update(network)
    now = {name: p.clone() for name, p in network.named_parameters()}
    with ours.in_place():
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter, theirs.module.get_parameter(name), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(now[name], p) for name, p in network.named_parameters())
    # a run's model is the mean: neither the last weights nor the first
    cfg = config(f"data.images={images}", f"model.path={pretrained}", "ema_decay=0.5")
    finetune(tmp_path / "run", cfg)
    latest = checkpoints.find_latest(tmp_path / "run" / "checkpoints")
    saved = checkpoints.open_checkpoint(latest)
    name = "head.conv.weight"
    assert torch.equal(weights(tmp_path / "run")[name], saved.read(f"ema.{name}"))
    assert not torch.equal(saved.read(f"model.{name}"), saved.read(f"ema.{name}"))


def test_adamw_steps_as_torch_and_spares_vectors():
    network = create_model("BiT-tiny", 3)
    settings = FinetuneOptimizerConfig(name="adamw", lr=0.01, weight_decay=0.3, betas=[0.8, 0.95])
    made = make(settings, 0.01, network)
    assert type(made) is torch.optim.AdamW and made.defaults["betas"] == (0.8, 0.95)
    decayed = {id(p) for group in made.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in network.parameters() if p.dim() > 1}
    with pytest.raises(ValueError, match=r"optimizer\.lr must be a number with adamw"):
        load_config([], ["optimizer.name=adamw"], FinetuneConfig)


def test_layers_learn_at_rates_of_their_own():
    network = create_model("BiT-tiny", 3)
    scales = layer_scales(network, 0.5)
    named = {name: scales[id(p)] for name, p in network.named_parameters()}
    assert named["head.conv.weight"] == named["head.conv.bias"] == 1
    assert named["body.block4.unit01.conv1.weight"] == 2 * named["body.block3.unit01.conv1.weight"]
    order = [named[f"{part}.weight"] for part in ("root.conv", "body.block1.unit01.conv1", "body.block4.unit01.conv3")]
    assert order == sorted(order) and order[0] < order[1] < order[2] < 1
    for name in ("sgd", "sgd_agc"):
        made = make(FinetuneOptimizerConfig(name=name, layer_decay=0.5), 0.1, network)
        by_id = {id(p): group["lr_scale"] for group in made.param_groups for p in group["params"]}
        assert by_id == scales
        if name == "sgd_agc":
            free = {id(p) for group in made.param_groups if group["clipping"] is None for p in group["params"]}
            assert free == {id(network.get_parameter(head)) for head in head_names(network)}


def test_options_for_one_copy_a_rank_are_refused_elsewhere():
    zero = Strategy(engine="zero2", world=2, rank=0, local_rank=0, cpu=True, local_world=2)
    for words in (["ema_decay=0.9"], ["model.linear_probe=true"], ["optimizer.layer_decay=0.5"], list(ADAMW)):
        with pytest.raises(ValueError, match=r"is for one process or launch/ddp\.yaml, not zero2"):
            check_engine(load_config([], words, FinetuneConfig), zero)


def test_what_can_be_frozen():
    network = create_model("BiT-tiny", 3)
    with pytest.raises(
        ValueError, match=r"freeze_through is 'block9', but the network has root, block1, .*, head\.gn$"
    ):
        freeze(network, "block9", False)
    with pytest.raises(ValueError, match=r"leaves no classifier to train: .* up to one of root, .*block4, head\.gn$"):
        freeze(network, "head", False)
    resnet = freeze(create_model("resnet18", 3), "layer2", False).train()
    assert not resnet.layer2.training and resnet.layer3.training and resnet.training
    assert not resnet.conv1.weight.requires_grad and resnet.layer3[0].conv1.weight.requires_grad
    before = resnet.bn1.running_mean.clone()
    resnet(torch.randn(4, 3, 32, 32))
    assert torch.equal(resnet.bn1.running_mean, before) and resnet.layer3[0].bn1.num_batches_tracked == 1


def test_smoothing_counts_in_training_alone(images, pretrained, tmp_path):
    assert make_loss("multiclass", label_smoothing=0.1).label_smoothing == 0.1
    common = (f"data.images={images}", f"model.path={pretrained}", "optimizer.lr=0.000001", "steps=2")
    finetune(tmp_path / "smooth", config(*common, "label_smoothing=0.5"))
    finetune(tmp_path / "plain", config(*common))
    losses_ = [json.loads((tmp_path / n / "result.json").read_text())["metrics"]["loss"] for n in ("smooth", "plain")]
    assert losses_[0] == pytest.approx(losses_[1], abs=1e-4)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """A checkpoint as timm has it: its own names, no card."""
    network = create_model("resnet18", 7)
    init_weights(network, 3)
    path = tmp_path_factory.mktemp("timm") / "resnet18.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_a_network_of_timm_with_its_checkpoint(resnet, images, tmp_path, capsys):
    finetune(
        tmp_path / "run", config(f"data.images={images}", f"model.path={resnet}", "model.type=resnet18", "steps=2")
    )
    shown = capsys.readouterr().out
    assert "network resnet18 from" in shown and "mean [0.485, 0.456, 0.406]" in shown
    card = json.loads((tmp_path / "run/model/model.json").read_text())
    assert card["normalisation"]["std"] == [0.229, 0.224, 0.225]
    found = evaluate(tmp_path / "run", images=images, workers=0, resamples=0)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["metrics"]["loss"], abs=1e-6)
    first = next(row for row in rows(tmp_path / "run") if row["step"] == 1)
    assert first["loss"] == pytest.approx(1.0986123, abs=1e-6)  # a head of zeros
    named = (f"data.images={images}", f"model.path={resnet}", "model.type=resnet18")
    plan = make_plan(config(*named, "data.mean=0.5", "data.std=0.5", "model.activation_checkpointing=false"))
    assert (plan.cfg.data.mean, plan.cfg.data.std) == (0.5, 0.5)  # whoever knows better
    with pytest.raises(ValueError, match=r"resnet18\.safetensors does not fit resnet34"):
        finetune(tmp_path / "bad", config(f"data.images={images}", f"model.path={resnet}", "model.type=resnet34"))


def test_timms_own_weights_by_name_alone(images, tmp_path, monkeypatch):
    """From the cache that timm downloads to; without it one sentence."""
    for key, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(key, value)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cfg = config(f"data.images={images}", "model.type=resnet18", "steps=1")
    with pytest.raises(ValueError, match="timm has no weights of resnet18 at hand"):
        finetune(tmp_path / "none", cfg)


def test_a_network_of_one_image_size(images, tmp_path):
    words = [f"data.images={images}", "model.name=vit_tiny_patch16_224", "model.from_scratch=true"]
    with pytest.raises(ValueError, match="takes images of 224 x 224 pixels only"):
        finetune(tmp_path / "run", config(*words))


def test_the_options_of_the_command(images, pretrained, tmp_path, capsys):
    words = ["--images", str(images), "--model-path", str(pretrained), "--linear-probe", "--train-ratio", "0.5"]
    words += ["--valid-ratio", "0.2", "--valid-seed", "3", "--print-config"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for line in ("linear_probe: true", "train_ratio: 0.5", "valid_ratio: 0.2", "valid_seed: 3"):
        assert line in shown
    with pytest.raises(ValueError, match=r"model\.freeze_through must be null with model\.linear_probe"):
        main([*words, "--freeze-through", "block3"])
