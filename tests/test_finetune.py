"""Fine-tuning runs from a folder of images and from shards, in this process and as commands."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import FAST, config, losses, make_pretrained, rows, weights

import scaletransfer
from scaletransfer.config import FinetuneConfig, load_config
from scaletransfer.finetune import finetune, main
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=CLASSES, per_class=6)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images, pretrained) -> Path:
    """A run to the end by the command alone."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["--images", str(images), "--model-path", str(pretrained), "--logdir", str(folder), "--seed", "3"]
    assert main([*arguments, *FAST]) == 0
    return folder


def test_a_head_of_zeros_gives_zero_logits(finished):
    """The first loss is exactly that of equal logits, and the rate of the first update is 0."""
    first = next(row for row in rows(finished) if row["step"] == 1)
    assert first["loss"] == pytest.approx(math.log(3), rel=1e-6) and first["lr"] == 0.0
    assert losses(finished)[1] == pytest.approx(math.log(3), rel=1e-6)
    assert len(losses(finished)) == 6 and losses(finished)[-1] != losses(finished)[0]


def test_logits_are_exactly_zero(images, pretrained, tmp_path):
    from scaletransfer.engine.strategy import asked
    from scaletransfer.transfer import run
    from scaletransfer.transfer.plan import make_plan

    for protocol, zero in (("bit", True), ("paper", False)):
        cfg = config(f"data.images={images}", f"model.path={pretrained}", f"protocol={protocol}")
        trainer = run.build(make_plan(cfg), asked(env={}, cuda=False), tmp_path / protocol)
        logits = trainer.predict()["logits"]
        assert np.array_equal(logits, np.zeros_like(logits)) == zero
        trainer.held.close()


def test_what_a_run_leaves(finished, images):
    result = json.loads((finished / "result.json").read_text())
    assert result["dataset"] == "animals" and result["pretrained_model"] == "pre" and result["shot"] is None
    assert (result["seed"], result["steps"], result["train_samples"], result["valid_samples"]) == (3, 6, 18, 18)
    assert set(result["metrics"]["classes"]) == set(CLASSES) and result["metric"] == "accuracy"
    low, high = result["metrics"]["intervals"]["accuracy"]
    assert 0 <= low <= result["metrics"]["accuracy"] <= high <= 1
    with open(finished / "predictions.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 18 and {row["label"] for row in table} == set(CLASSES)
    for row in table:
        assert row["label"] in row["image"] and (images / row["image"]).is_file()
        p = {name: float(row[f"p:{name}"]) for name in CLASSES}
        assert sum(p.values()) == pytest.approx(1, abs=1e-4) and max(p, key=p.get) == row["predicted"]
    right = sum(row["label"] == row["predicted"] for row in table) / 18
    assert right == pytest.approx(result["metrics"]["accuracy"])
    card = json.loads((finished / "model" / "model.json").read_text())
    assert card["label_names"] == list(CLASSES) and card["transform"]["kind"] == "bit"
    assert "6 steps" not in (finished / "log.txt").read_text() and "step 6/6" in (finished / "log.txt").read_text()
    resolved = load_config(finished / "config.yaml", (), FinetuneConfig)
    assert resolved.steps == 6 and resolved.model.name == "BiT-tiny" and resolved.data.mean == 0.5


def test_tensorboard_tags_are_the_published_ones(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"test/acc", "test/mean_auc", "test/mean_average_precision", "test/loss", "train/loss"}
    for name in ("AUC_class", "average_precision_class", "precision", "recall", "f1"):
        wanted |= {f"test/{name}_{k}" for k in range(3)}
    assert wanted <= tags
    assert [event.step for event in events.Scalars("test/acc")] == [3, 6]


def test_the_same_seed_gives_the_same_bytes_and_another_one_not(finished, images, pretrained, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for folder, seed in ((again, 3), (other, 4)):
        finetune(folder, config(f"data.images={images}", f"model.path={pretrained}", f"seed={seed}"))
    for name in ("model/model.safetensors", "predictions.csv", "selection.json", "result.json"):
        same = (again / name).read_bytes() == (finished / name).read_bytes()
        assert same, name
    assert losses(again) == losses(finished) != losses(other)


def test_micro_batches_change_rounding_alone(finished, images, pretrained, tmp_path):
    cfg = config(f"data.images={images}", f"model.path={pretrained}", "seed=3", "micro_batch=8", "sampling=permutation")
    finetune(tmp_path / "run", cfg)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), abs=1e-5)


def test_a_finished_run_is_not_run_again(finished, images, pretrained, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    arguments = ["--images", str(images), "--model-path", str(pretrained), "--logdir", str(finished), "--seed", "3"]
    main([*arguments, *FAST])
    assert "is complete" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with seed 3, but this run has 5"):
        main([*arguments, *FAST, "--seed", "5"])


def test_an_interrupted_run_ends_with_the_same_weights(finished, images, pretrained, tmp_path):
    """SIGKILL in the middle, before and after the checkpoint of step 4 is complete; the same command again."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "scaletransfer.finetune", "--images", str(images), "--model-path", str(pretrained)]
    command += ["--logdir", str(folder), "--seed", "3", *FAST]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = (
        "import os, pathlib, signal, sys, time\n"
        "from scaletransfer.engine import trainer; right = trainer.Trainer._step\n"
        "def step(self, number, *rest):\n"
        "    saved = pathlib.Path(FOLDER, 'checkpoints', 'latest')\n"
        "    while number > 4 and not saved.exists(): time.sleep(0.01)\n"  # a thread of its own writes it
        "    if number == DIE: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return right(self, number, *rest)\n"
        "trainer.Trainer._step = step; from scaletransfer.finetune import main\n"
        "DIE, FOLDER, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]; main(arguments)"
    )
    for step in ("4", "6"):
        words = [sys.executable, "-c", code, step, str(folder), *command[3:]]
        died = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=200)
        assert died.returncode == -9, died.stderr[-2000:]
        assert not (folder / "result.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training from" in done.stdout and "(step 4)" in done.stdout
    assert (folder / "model/model.safetensors").read_bytes() == (finished / "model/model.safetensors").read_bytes()
    assert losses(folder) == losses(finished)
    assert (folder / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()


def test_few_shot_is_nested_and_replayed(images, pretrained, tmp_path):
    common = ["--images", str(images), "--model-path", str(pretrained), "--seed", "2", *FAST]
    for shot in (1, 2):
        assert main([*common, "--examples_per_class", str(shot), "--logdir", str(tmp_path / str(shot))]) == 0
    one, two = (json.loads((tmp_path / n / "selection.json").read_text())["keys"] for n in "12")
    assert len(one) == 3 and len(two) == 6 and set(one) < set(two)
    replay = ["--selection", str(tmp_path / "2" / "selection.json"), "--logdir", str(tmp_path / "replay")]
    assert main([*common, *replay]) == 0
    assert losses(tmp_path / "replay") == losses(tmp_path / "2")
    with pytest.raises(ValueError, match="class 'cat' has 6 training samples, 7 were asked for"):
        main([*common, "--examples-per-class", "7", "--logdir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_from_scratch_draws_the_body_by_seed(images, pretrained, tmp_path):
    for number, seed in enumerate((1, 1, 2)):
        cfg = config(f"data.images={images}", f"model.path={pretrained}", "model.from_scratch=true", f"seed={seed}")
        result = finetune(tmp_path / str(number), cfg)
        assert result["pretrained_model"] == "scratch"
    runs = [losses(tmp_path / name) for name in "012"]
    assert runs[0] == runs[1] != runs[2]


def test_pretraining_config_names_model_and_normalisation(images, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {name: BiT-tiny}\ndata: {train: nowhere, mean: 0.5, std: 0.5}\n")
    arguments = ["--pretrain-config-file", "mine.yaml", "--images", str(images), "--logdir", "run", *FAST]
    with pytest.raises(ValueError, match=r"there is no pretrained_models/mine"):
        main(arguments)
    make_pretrained(tmp_path / "pretrained_models" / "mine")
    assert main(arguments) == 0
    assert json.loads(Path("run/result.json").read_text())["pretrained_model"] == "mine"


def test_shards_and_their_folder_train_alike(images, pretrained, tmp_path):
    """The same keys in both, so the same selection, order and pixels: bit-equal losses."""
    from scaletransfer import keys

    build(plan_shards(open_source("image_folder", images), keys.PUBLIC_SALT, shard_size=5), tmp_path / "shards")
    for name, where in (("files", f"data.images={images}"), ("shards", f"data.shards={tmp_path / 'shards'}")):
        finetune(tmp_path / name, config(where, f"model.path={pretrained}", "examples_per_class=4", "data.flip=0.5"))
    assert losses(tmp_path / "files") == losses(tmp_path / "shards")


def test_masked_labels_from_shards(pretrained, tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=40, valid=12, seed=1)
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    cfg = config(f"data.shards={tmp_path / 'shards'}", f"model.path={pretrained}", "mixup=0.2")
    result = finetune(tmp_path / "run", cfg)
    assert result["task"] == "multilabel" and result["metric"] == "mean_auroc"
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), rel=1e-6)
    with open(tmp_path / "run" / "predictions.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert "image" not in table[0] and {row["label:Effusion"] for row in table} <= {"0", "1", ""}
    assert result["metrics"]["intervals"]["unit"] == "patient"


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("oversampling=true", True),
        ("sampling=replacement", True),
        ("mixup=0.1", True),
        ("protocol=paper", True),
        ("data.flip=0", True),
        ("optimizer.nesterov=true", True),
        ("class_weights=balanced", False),  # the classes are equally large
        ("allow_fewer=true", False),
    ],
)
def test_an_option_changes_the_training_where_it_should(finished, images, pretrained, tmp_path, option, changes):
    finetune(tmp_path / "run", config(f"data.images={images}", f"model.path={pretrained}", "seed=3", option))
    found = losses(tmp_path / "run")
    assert all(math.isfinite(loss) for loss in found) and (found != losses(finished)) == changes


def test_few_shot_knows_no_oversampling_and_says_so(images, pretrained, tmp_path, capsys):
    """The published configurations with oversampling serve few-shot runs as well."""
    common = (f"data.images={images}", f"model.path={pretrained}", "seed=3", "examples_per_class=1", "micro_batch=1")
    finetune(tmp_path / "plain", config(*common))
    assert "no oversampling" not in capsys.readouterr().out
    finetune(tmp_path / "run", config(*common, "oversampling=true"))
    assert "no oversampling, which is for full training sets" in capsys.readouterr().out
    assert losses(tmp_path / "plain") == losses(tmp_path / "run")


def test_seed_keys_of_the_published_configurations(images, pretrained, tmp_path):
    path = tmp_path / "target.yaml"
    path.write_text(f"train_dir: {images}/train\nval_dir: {images}/val\nnb_classes: 3\n")
    common = ["--finetune-config-file", str(path), "--model-path", str(pretrained), *FAST]
    assert main([*common, "--logdir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["dataset"] == "animals"
    with pytest.raises(ValueError, match=r"nb_classes is 4 but .* has 3 classes"):
        main([*common, "--logdir", str(tmp_path / "run2"), "nb_classes=4"])


def test_a_class_weight_is_least_over_own_count(tmp_path, pretrained):
    from scaletransfer.transfer.plan import make_plan
    from scaletransfer.transfer.run import _class_weights, datasets

    folder = make_image_folder(tmp_path / "few", classes=("a", "b"), per_class=2)
    make_image_folder(tmp_path / "few", classes=("b",), per_class=6)
    cfg = config(f"data.images={folder}", f"model.path={pretrained}", "class_weights=balanced", "oversampling=true")
    plan = make_plan(cfg)
    assert _class_weights(plan) == (1.0, pytest.approx(2 / 6))
    order = datasets(plan)[0].order
    labels = plan.target.targets("train")[order.rows]
    assert order.weights.tolist() == [8 / (2 if label == 0 else 6) for label in labels]


def test_the_python_api(finished):
    assert scaletransfer.finetune is sys.modules["scaletransfer.finetune"]
    assert callable(scaletransfer.finetune) and callable(scaletransfer.evaluate)


def test_without_deepspeed_and_pandas(images, pretrained, tmp_path):
    """Imports of both fail as if they were not installed."""
    code = (
        "import sys; sys.modules.update(deepspeed=None, pandas=None, timm=None, matplotlib=None, transformers=None)\n"
        "from scaletransfer.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    run = tmp_path / "run"
    commands = [
        ["finetune", "--images", str(images), "--model-path", str(pretrained), "--logdir", str(run), *FAST],
        ["evaluate", str(run), "--images", str(images), "--workers", "0", "--bootstrap", "10"],
    ]
    for command in commands:
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "result.json").is_file()


def test_the_new_head_and_the_body_were_trained(finished, pretrained):
    from safetensors.torch import load_file

    before, after = load_file(pretrained / "model.safetensors"), weights(finished)
    assert after["head.conv.weight"].shape[0] == 3 and after["head.conv.weight"].abs().sum() > 0
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("body."))
