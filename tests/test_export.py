"""Export of a real run: the same network, the same numbers, everything a user of it must know; complete or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_run import make_shards, rows, run_single, write_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scaletransfer import labels
from scaletransfer.cli import main as cli
from scaletransfer.engine.checkpoint import open_checkpoint
from scaletransfer.engine.checkpoint_save import Job, hidden
from scaletransfer.engine.trainer import Trainer
from scaletransfer.export import prove
from scaletransfer.export_model import main as export
from scaletransfer.index import load_index
from scaletransfer.models import create_model
from scaletransfer.models.bit import StdConv2d
from scaletransfer.models.weights import load_pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Trainer, Path]:
    """A finished run of 8 steps, with its Trainer."""
    base = tmp_path_factory.mktemp("export")
    config = write_config(base, make_shards(base))
    overrides = ["epochs=2", "validate.every_epochs=1", "data.workers=0", "data.expect_labels=null"]
    return run_single(config, "name=tiny", *overrides), base / "runs" / "tiny"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "tiny"))


def images(trainer: Trainer) -> torch.Tensor:
    assert trainer.valid is not None
    return trainer.normalize(trainer.valid.__getitems__(list(range(8)))["image"])


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a refused `scaletransfer export`."""
    assert cli(["export", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown
    return shown.err


def test_the_exported_network_gives_the_logits_of_the_training_engine(made, tmp_path):
    trainer, run = made
    assert export([str(run), "--to", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    network = create_model(facts["model"], facts["num_classes"])
    network.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    trainer.engine.model.eval()
    with torch.no_grad():
        expected, found = trainer.engine.forward(images(trainer)), network.eval()(images(trainer))
    assert expected.abs().max() > 0 and torch.equal(found, expected)


def test_the_folder_is_what_model_init_from_reads(made, tmp_path):
    export([str(made[1]), "--to", str(tmp_path / "out")])
    state, _ = load_pretrained(str(tmp_path / "out"), model_name="BiT-tiny")
    for name, tensor in made[0].engine.module.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_a_run_computes_with_the_eps_of_what_it_began_from(made, tmp_path):
    """Also when it goes on after that file has gone; and the exported folder says which eps it was."""
    config = write_config(tmp_path, Path(made[0].cfg.data.valid_folders[0]))
    torch.save(made[0].engine.module.state_dict(), tmp_path / "model.pth.tar")
    words = [f"model.init_from={tmp_path / 'model.pth.tar'}", "data.workers=0", "data.expect_labels=null"]
    for steps in (1, 2):
        trainer = run_single(config, "name=more", *words, f"max_steps={steps}")
        assert {m.ws_eps for m in trainer.engine.module.modules() if isinstance(m, StdConv2d)} == {1e-8}
        (tmp_path / "model.pth.tar").unlink(missing_ok=True)
    export([str(tmp_path / "runs" / "more"), "--to", str(tmp_path / "out")])
    assert load_pretrained(tmp_path / "out")[1]["ws_eps"] == 1e-8


def test_model_json_says_what_a_user_must_know(made, tmp_path):
    trainer, run = made
    export([str(run), "--to", str(tmp_path / "out")])
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["format"] == "scaletransfer-model" and facts["format_version"] == 1
    assert (facts["model"], facts["task"], facts["num_classes"]) == ("BiT-tiny", "multilabel", 13)
    assert facts["label_names"] == list(labels.CHEXPERT_FINDINGS)
    assert facts["policy"] == {"name": "corrected", "uncertain": "ignore", "blank": "ignore", "per_label": {}}
    assert facts["normalisation"] == {"mean": 0.5, "std": 0.5, "pixel_max": 255}
    assert facts["transform"]["kind"] == "xray" and facts["transform"]["size"] == 32
    history = facts["provenance"]
    assert (history["step"], history["samples_seen"], history["seed"], history["global_batch"]) == (8, 128, 3, 16)
    assert (history["engine"], history["world"], history["optimizer"]) == ("single", 1, "sgd_agc")
    index = load_index(trainer.cfg.data.valid_folders[0])
    assert history["data"] == [{"source": "chexpert", "split": "train", "index_sha256": index.digest}]
    path = tmp_path / "out" / "model.safetensors"
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_best_is_the_checkpoint_of_the_best_validation(made, tmp_path):
    trainer, run = made
    validations = [row for row in rows(run) if row.get("event") == "validation"]
    assert len(validations) == 2
    top = max(validations, key=lambda row: (row["mean_auroc"], -row["step"]))
    export([str(run), "--to", str(tmp_path / "best"), "--which", "best"])
    facts = json.loads((tmp_path / "best" / "model.json").read_text())
    assert facts["provenance"]["step"] == top["step"]
    assert facts["provenance"]["validation"] == {"loss": top["loss"], "mean_auroc": top["mean_auroc"]}
    assert trainer.best == top["mean_auroc"]
    export([str(run), "--to", str(tmp_path / "same"), "--which", str(top["step"])])
    same, best = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "best"))
    assert same.keys() == best.keys() and all(torch.equal(same[name], best[name]) for name in same)
    export([str(run), "--to", str(tmp_path / "other"), "--which", str(12 - top["step"])])
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(other["root.conv.weight"], best["root.conv.weight"])


def test_an_empty_target_folder_will_do(made, tmp_path):
    (tmp_path / "out").mkdir()
    assert export([str(made[1]), "--to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.json").exists()


# ---- refusals


def test_a_target_that_holds_something(made, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(capsys, str(made[1]), "--to", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("which", "words"),
    [("7", "not a complete checkpoint|no complete checkpoint"), ("newest", "must be latest, best or a step number")],
)
def test_a_checkpoint_that_is_not_there(made, tmp_path, capsys, which, words):
    assert re.search(words, refused(capsys, str(made[1]), "--to", str(tmp_path / "out"), "--which", which))
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert "is not a run folder" in refused(capsys, str(tmp_path / "nothing"), "--to", str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint" in refused(capsys, str(tmp_path / "empty"), "--to", str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


WEIGHT = "model.body.block1.unit01.conv1.weight"


def change_one_bit(path: Path, name: str) -> None:
    """The lowest bit of one number of a tensor, in a file that stays a good safetensors file."""
    state = load_file(path)
    state[name].view(torch.int32)[7] ^= 1
    save_file(state, path)


def test_a_changed_weight_is_not_exported(run, tmp_path, capsys):
    path = run / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    change_one_bit(path, WEIGHT)
    message = refused(capsys, str(run), "--to", str(tmp_path / "out"))
    assert str(path) in message and WEIGHT in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny"]
    assert export([str(run), "--to", str(tmp_path / "out"), "--which", "4"]) == 0  # an earlier one is sound


def test_a_changed_manifest_is_not_exported(run, tmp_path, capsys):
    path = run / "checkpoints" / "step-00000008" / "manifest.json"
    path.write_text(path.read_text().replace("Edema", "Oedema"))
    assert "damaged" in refused(capsys, str(run), "--to", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_finished_file_is_compared_too(made, tmp_path):
    export([str(made[1]), "--to", str(tmp_path / "out")])
    checkpoint = open_checkpoint(made[1] / "checkpoints" / "step-00000008")
    path = tmp_path / "out" / "model.safetensors"
    state = made[0].engine.module.state_dict()
    assert prove(checkpoint, path) == len(state)
    name = WEIGHT.removeprefix("model.")
    written = load_file(path)
    written[name].view(-1).view(torch.int32)[7] ^= 1
    save_file(written, path)
    with pytest.raises(ValueError, match=rf"{WEIGHT} differs"):
        prove(checkpoint, path)


def test_a_full_disk_leaves_nothing(made, tmp_path, capsys, small_disk):
    message = refused(capsys, str(made[1]), "--to", str(tmp_path / "out"))
    assert "model.safetensors" in message and "File too large" in message
    assert not list(tmp_path.iterdir())


def test_the_library_reads_the_file_and_its_order_is_the_networks(made, tmp_path):
    export([str(made[1]), "--to", str(tmp_path / "out")])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() is None
        assert set(handle.keys()) == set(made[0].engine.module.state_dict())


MEMORY = """\
import resource, sys
from pathlib import Path
from scaletransfer.engine.checkpoint import open_checkpoint
from scaletransfer.export import export

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

checkpoint = open_checkpoint(Path(sys.argv[1]))
before = peak()
export(checkpoint, Path(sys.argv[2]))
print(peak() - before)
"""


def test_an_export_needs_a_small_part_of_the_networks_memory(tmp_path):
    """300 MB, 220 of them one tensor that three ranks hold parts of."""
    sizes, world = {"model.a": [6, 1000, 1000], "model.b": [55, 1000, 1000], "model.c": [14, 1000, 1000]}, 3
    facts = {"model": "none", "label_names": [], "samples_seen": 0}
    names = ("task", "policy", "normalisation", "transform", "seed", "global_batch", "data", "optimizer")
    facts |= dict.fromkeys(names, "")
    expected = {}
    for rank in reversed(range(world)):
        parts = [(name, 10**6 * s[0] * rank // world, 10**6 * s[0] * (rank + 1) // world) for name, s in sizes.items()]
        arrays = [np.full(stop - start, rank + 0.5, np.float32) for _, start, stop in parts]
        expected[rank] = parts[1]
        hidden(tmp_path, 5, "x").mkdir(exist_ok=True)
        Job(
            root=tmp_path,
            step=5,
            token="x",
            rank=rank,
            world=world,
            keep=1,
            names=parts,
            data=lambda arrays=arrays: [[array] for array in arrays],
            generators={},
            head={"engine": "none", "world": world, "facts": facts},
            shapes=sizes,
            timeout=60,
        ).run()
    del arrays
    folder, out = tmp_path / "step-00000005", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(out)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100e6, done.stdout
    with safe_open(out / "model.safetensors", framework="np") as handle:
        found = handle.get_slice("b")
        assert found.get_shape() == [55, 1000, 1000]
        for rank, (_, start, stop) in expected.items():
            assert found[start // 10**6].reshape(-1)[start % 10**6] == rank + 0.5
            assert found[(stop - 1) // 10**6].reshape(-1)[(stop - 1) % 10**6] == rank + 0.5
    shutil.rmtree(tmp_path / "out")
