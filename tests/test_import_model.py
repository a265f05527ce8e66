"""Models of others come in as they are: the same tensors, the same logits, and what is known of them, said."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers_models import google_arrays, published_state, scatter, with_optimizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scaletransfer.cli import main as cli
from scaletransfer.labels import CHEXPERT_FINDINGS
from scaletransfer.models import create_model, init_weights
from scaletransfer.models.weights import load_into, load_pretrained, network_options


@pytest.fixture(scope="module")
def twin() -> torch.nn.Module:
    """Timm's own R50x1 with drawn values and five classes."""
    network = timm.create_model("resnetv2_50x1_bit", num_classes=5).eval()
    scatter(network)
    return network


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    network = create_model("BiT-tiny", 6)
    init_weights(network, 3)
    return network.state_dict()


def run(capsys, *argv: Any) -> str:
    """What a successful `scaletransfer import` prints."""
    status = cli(["import", *map(str, argv)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out


def refused(capsys, *argv: Any) -> str:
    """The one sentence of a refused one."""
    assert cli(["import", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown
    return shown.err


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.json").read_text())


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Of an imported model, or of an R50x1's file as it came, built from what is known of it."""
    state, facts = load_pretrained(path)
    network = create_model("BiT-M-R50x1", len(state["head.conv.bias"]), **network_options(facts))
    load_into(network, state)
    with torch.no_grad():
        return network.eval()(images)


def test_google_published_and_timm_give_timms_logits(tmp_path, capsys, twin):
    """Each form of one network by the default options, and as it came, against timm's own, to the last bit."""
    np.savez(tmp_path / "BiT-M-R50x1.npz", **google_arrays(twin))
    with_optimizer({f"module.{k}": v for k, v in published_state(twin).items()}, tmp_path / "p" / "model.pth.tar")
    torch.save(twin.state_dict(), tmp_path / "resnetv2_50x1_bit.pth")
    save_file(twin.state_dict(), tmp_path / "resnetv2_50x1_bit.safetensors")
    reader = timm.create_model("resnetv2_50x1_bit", num_classes=5).eval()
    reader.load_pretrained(str(tmp_path / "BiT-M-R50x1.npz"))  # timm's own reader of Google's names
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reader(images)
    files = {
        "npz": (tmp_path / "BiT-M-R50x1.npz",),
        "published": (tmp_path / "p" / "model.pth.tar", "--mean", "0.5", "--std", "0.5"),
        "pth": (tmp_path / "resnetv2_50x1_bit.pth",),
        "safetensors": (tmp_path / "resnetv2_50x1_bit.safetensors",),
    }
    for name, argv in files.items():
        shown = run(capsys, *argv, "--to", tmp_path / "out" / name)
        assert "normalisation: mean 0.5, std 0.5" in shown and "BiT-" in shown
        assert card(tmp_path / "out" / name)["ws_eps"] == 1e-8 and "--ws-eps 1e-10" in shown
        for path in (tmp_path / "out" / name, argv[0]):
            assert torch.equal(logits(path, images), expected), path
        state = load_file(tmp_path / "out" / name / "model.safetensors")
        assert all(torch.equal(state[k], v) for k, v in published_state(twin).items())
    # and eps is what decides: with the published one the same weights give other logits, in every form the same
    for name, argv in files.items():
        assert "eps 1e-10, as given" in run(capsys, *argv, "--ws-eps", "1e-10", "--to", tmp_path / "plain" / name)
        assert torch.equal(logits(tmp_path / "plain" / name, images), logits(tmp_path / "plain" / "npz", images))
    assert (logits(tmp_path / "plain" / "npz", images) - expected).abs().max() > 1e-5


def test_a_published_model_is_known_by_its_folders_name(tmp_path, capsys):
    network = create_model("BiT-S-R50x1", 13)
    with_optimizer(network.state_dict(), tmp_path / "chexpert_bit50x1" / "model.pth.tar")
    shown = run(capsys, tmp_path / "chexpert_bit50x1", "--to", tmp_path / "mine")
    assert "chexpert_bit50x1 (configs/chexpert_bit50x1.yaml)" in shown and "epoch 89" in shown
    facts = card(tmp_path / "mine")
    assert facts["model"] == "BiT-S-R50x1" and facts["task"] == "multilabel"
    assert facts["label_names"] == list(CHEXPERT_FINDINGS) and facts["policy"]["name"] == "paper"
    assert facts["normalisation"] == {"mean": 0.5, "std": 0.5, "pixel_max": 255}
    assert facts["transform"] == {"kind": "xray", "size": 224}
    assert facts["provenance"]["imported"]["epoch"] == 89
    # its name says R50x1 with 13 outputs: another network, or another head, is no such model
    tiny = create_model("BiT-tiny", 13).state_dict()
    with_optimizer(tiny, tmp_path / "mimic_bit50x1" / "model.pth.tar")
    message = refused(capsys, tmp_path / "mimic_bit50x1", "--to", tmp_path / "other")
    assert "root.conv.weight is (32, 3, 7, 7) in the file and (64, 3, 7, 7) in the network" in message
    assert "those of BiT-tiny" in message
    with_optimizer(network.state_dict(), tmp_path / "nih_bit50x1" / "model.pth.tar")
    assert "has 13 outputs, but by its name nih_bit50x1" in refused(
        capsys, tmp_path / "nih_bit50x1", "--to", tmp_path / "other"
    )
    assert not (tmp_path / "other").exists()


def test_imagenets_labels_are_its_synsets_in_order(tmp_path, capsys):
    network = timm.create_model("resnetv2_50x1_bit", num_classes=1000)
    np.savez(tmp_path / "BiT-S-R50x1.npz", **google_arrays(network))
    save_file(network.state_dict(), tmp_path / "resnetv2_50x1_bit.goog_in21k_ft_in1k.safetensors")
    for file in ("BiT-S-R50x1.npz", "resnetv2_50x1_bit.goog_in21k_ft_in1k.safetensors"):
        shown = run(capsys, tmp_path / file, "--to", tmp_path / file[:7])
        facts = card(tmp_path / file[:7])
        assert facts["label_names"][0] == "n01440764" and facts["label_names"][999] == "n15075141"
        assert facts["label_names"] == sorted(facts["label_names"]) and facts["task"] == "multiclass"
        assert "imagenet-1k" in shown
    assert facts["transform"]["size"] == 448  # timm's configuration of that name


def test_a_hub_folder_of_timm_says_it_itself(tmp_path, capsys, twin):
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(twin.state_dict(), folder / "model.safetensors")
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "input_size": [3, 96, 96], "crop_pct": 0.875}
    content = {"architecture": "resnetv2_50x1_bit", "num_classes": 5, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps({**content, "label_names": list("vwxyz")}))
    assert "config.json" in run(capsys, folder, "--to", tmp_path / "out")
    facts = card(tmp_path / "out")
    assert facts["normalisation"] == {"mean": [0.4, 0.5, 0.6], "std": 0.2, "pixel_max": 255}
    assert facts["label_names"] == list("vwxyz") and facts["transform"] == {"kind": "natural", "size": 96}


def test_what_cannot_be_known_is_asked_for(tmp_path, capsys, tiny):
    torch.save({"model": tiny}, tmp_path / "thing.pth.tar")
    message = refused(capsys, tmp_path / "thing.pth.tar", "--to", tmp_path / "out")
    assert "does not say how its images were normalised" in message and "--mean" in message
    given = ("--mean", "0.5", "--std", "0.25")
    shown = run(capsys, tmp_path / "thing.pth.tar", *given, "--to", tmp_path / "out")
    assert "labels: not known" in shown and "task: not known" in shown and "transform: not known" in shown
    assert not {"label_names", "task", "transform"} & set(card(tmp_path / "out"))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    more = ("--labels", tmp_path / "names.txt", "--task", "multilabel", "--transform", "xray", "--size", "32")
    run(capsys, tmp_path / "thing.pth.tar", *given, *more, "--to", tmp_path / "full")
    facts = card(tmp_path / "full")
    assert (facts["label_names"], facts["task"]) == (list("abcdef"), "multilabel")
    assert facts["transform"] == {"kind": "xray", "size": 32} and facts["normalisation"]["std"] == 0.25
    message = refused(capsys, tmp_path / "thing.pth.tar", *given, "--labels", "a,b", "--to", tmp_path / "no")
    assert "2 label names for 6 outputs" in message
    twice = ("--labels", "a,b,c,d,e,a")
    assert "'a' is there twice" in refused(capsys, tmp_path / "thing.pth.tar", *given, *twice, "--to", tmp_path / "no")


def test_the_head_is_kept_or_replaced_as_asked(tmp_path, capsys, tiny):
    torch.save({"model": tiny}, tmp_path / "thing.pth")
    base = (tmp_path / "thing.pth", "--mean", "0.5", "--std", "0.5")
    run(capsys, *base, "--num-classes", "6", "--to", tmp_path / "kept")
    assert torch.equal(load_file(tmp_path / "kept/model.safetensors")["head.conv.weight"], tiny["head.conv.weight"])
    shown = run(capsys, *base, "--num-classes", "3", "--labels", "x,y,z", "--to", tmp_path / "three")
    assert "new head of 3 outputs, all zeros (the file has 6)" in shown
    state = load_file(tmp_path / "three/model.safetensors")
    assert state["head.conv.weight"].shape == (3, 1024, 1, 1) and not state["head.conv.weight"].any()
    assert card(tmp_path / "three")["num_classes"] == 3
    run(capsys, *base, "--head", "new", "--to", tmp_path / "new")
    assert not load_file(tmp_path / "new/model.safetensors")["head.conv.bias"].any()
    body = {k: v for k, v in state.items() if not k.startswith("head.conv")}
    assert all(torch.equal(v, tiny[k]) for k, v in body.items())
    assert "has 6 outputs" in refused(capsys, *base, "--num-classes", "3", "--head", "keep", "--to", tmp_path / "no")
    torch.save(body, tmp_path / "headless.pth")
    headless = (tmp_path / "headless.pth", "--mean", "0.5", "--std", "0.5", "--to", tmp_path / "no")
    assert "has no head" in refused(capsys, *headless)
    run(capsys, *headless[:-1], tmp_path / "headed", "--num-classes", "4")
    assert load_file(tmp_path / "headed/model.safetensors")["head.conv.bias"].shape == (4,)


def test_a_wrong_network_is_named_by_its_first_tensor(tmp_path, capsys, tiny):
    torch.save({"model": tiny}, tmp_path / "thing.pth")
    argv = (tmp_path / "thing.pth", "--mean", "0.5", "--std", "0.5", "--to", tmp_path / "no")
    message = refused(capsys, *argv, "--model", "BiT-M-R50x1")
    assert "root.conv.weight is (32, 3, 7, 7) in the file and (64, 3, 7, 7) in the network" in message
    broken = {k: v for k, v in tiny.items() if k != "body.block2.unit01.gn2.bias"}
    torch.save(broken, tmp_path / "thing.pth")
    assert "body.block2.unit01.gn2.bias (64,) is missing" in refused(capsys, *argv)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "thing.pth")
    assert "is of no BiT network (its first tensor is conv1.weight)" in refused(capsys, *argv)
    assert not (tmp_path / "no").exists()


class _Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, capsys, tiny):
    mark = tmp_path / "it-ran"
    torch.save({"model": dict(tiny), "optimizer": _Planted(mark), "epoch": 1}, tmp_path / "model.pth.tar")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Planted(mark), protocol=2))
    np.savez(tmp_path / "BiT-M-R50x1.npz", **{"resnet/group_norm/gamma": np.array([_Planted(mark)], dtype=object)})
    for name in ("model.pth.tar", "plain.pth", "BiT-M-R50x1.npz"):
        message = refused(capsys, tmp_path / name, "--to", tmp_path / "out")
        assert name in message and "weights_only" not in message
        assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_damaged_file_leaves_nothing(tmp_path, capsys, tiny):
    """One bit in the middle of a tensor: the archive's checksum is compared."""
    file = tmp_path / "chexpert" / "model.pth.tar"
    with_optimizer(tiny, file)
    data = bytearray(file.read_bytes())
    place = data.find(tiny["body.block3.unit01.conv2.weight"].numpy().tobytes()[:64])
    assert place > 0
    data[place + 40] ^= 4
    file.write_bytes(data)
    argv = (file, "--mean", "0.5", "--std", "0.5", "--to", tmp_path / "out")
    assert "damaged" in refused(capsys, *argv)
    assert not list(tmp_path.glob("*out*"))


def test_a_name_of_timm_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    message = refused(capsys, "resnetv2_50x1_bit.goog_in21k", "--to", tmp_path / "out")
    assert "timm cannot fetch resnetv2_50x1_bit.goog_in21k here (no route to the hub)" in message
    assert "no file or folder resnetv2_50y1" in refused(capsys, "resnetv2_50y1", "--to", tmp_path / "out")
    assert "is not one of timm's resnetv2_*_bit" in refused(capsys, "resnet50", "--to", tmp_path / "out")


def test_a_name_of_timm_that_is_at_hand(tmp_path, capsys, monkeypatch, twin):
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: twin if pretrained else None)
    shown = run(capsys, "resnetv2_50x1_bit", "--to", tmp_path / "out")
    assert "timm's configuration of resnetv2_50x1_bit" in shown
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[k], v) for k, v in published_state(twin).items())


MEMORY = """\
import sys
from pathlib import Path
from scaletransfer.import_model import main

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before, peak())
"""


def peak_of_import(file: Path, to: Path) -> tuple[int, int]:
    """Bytes by which an import in a process of its own grows it, and its whole peak."""
    argv = [sys.executable, "-c", MEMORY, str(file), "--to", str(to), "--mean", "0.5", "--std", "0.5"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    grown, whole = done.stdout.splitlines()[-1].split()
    return int(grown), int(whole)


def test_an_import_with_an_optimizer_takes_a_part_of_the_models_memory(tmp_path):
    with torch.no_grad():
        state = create_model("BiT-M-R50x1", 2000).state_dict()
    size = sum(4 * value.numel() for value in state.values())
    with_optimizer(state, tmp_path / "model.pth.tar")
    grown, _ = peak_of_import(tmp_path / "model.pth.tar", tmp_path / "out")
    assert grown < 1.3 * size, (grown, size)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= size


@pytest.mark.slow
def test_the_largest_network_with_its_optimizer(tmp_path):
    """R152x4: 3.7 GB of weights in a file of 7.5 GB; the process's whole peak counts, its libraries included."""
    if shutil.disk_usage(tmp_path).free < 13e9:
        pytest.skip("needs 13 GB of disk")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in create_model("BiT-M-R152x4", 1000).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}  # pages of zeros, which take no memory
    state["root.conv.weight"] += 1.5
    size = sum(4 * value.numel() for value in state.values())
    with_optimizer(state, tmp_path / "model.pth.tar")
    assert (tmp_path / "model.pth.tar").stat().st_size > 2 * size
    _, whole = peak_of_import(tmp_path / "model.pth.tar", tmp_path / "out")
    print(f"peak {whole / 1e9:.2f} GB, weights {size / 1e9:.2f} GB, file {2 * size / 1e9:.2f} GB")
    assert whole < 1.3 * size, (whole, size)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("root.conv.weight").eq(1.5).all()
        assert set(file.keys()) == set(shapes)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "model.pth.tar").unlink()
