"""What a run folder and options that do not belong together are told, and what a restart may not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import FAST, config, losses, make_pretrained

from scaletransfer.finetune import finetune, main
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source
from scaletransfer.transfer import plan as plan_module
from scaletransfer.transfer.network import title_of
from scaletransfer.transfer.plan import make_plan


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "animals", classes=("cat", "dog", "emu"), per_class=4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images, pretrained) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    finetune(folder, config(f"data.images={images}", f"model.path={pretrained}"))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.clipping=0.5", r"optimizer_settings.clipping 0.01, but this run has 0.5"),
        ("optimizer.nesterov=true", r"optimizer_settings.nesterov false, but this run has true"),
        ("optimizer.eps=0.1", r"optimizer_settings.eps 0.001, but this run has 0.1"),
        ("optimizer.head_exempt=paper", r"optimizer_settings.head_exempt"),
        ("mixup=0.3", r"transfer.mixup 0.0, but this run has 0.3"),
        ("class_weights=balanced", r"transfer.class_weights"),
    ],
)
def test_what_changes_training_cannot_change_on_the_way(finished, images, pretrained, change, message):
    """The sentence names the one fact that differs and both values."""
    with pytest.raises(ValueError, match=message):
        finetune(finished, config(f"data.images={images}", f"model.path={pretrained}", change))


def test_changed_images_are_noticed(finished, images, pretrained, tmp_path):
    other = tmp_path / "animals"
    shutil.copytree(images, other)
    make_image_folder(other, classes=("cat",), per_class=6)
    with pytest.raises(ValueError, match=r"data\[0\].index_sha256"):
        finetune(finished, config(f"data.images={other}", f"model.path={pretrained}"))


def test_a_result_without_checkpoints_is_not_trained_over(finished, images, pretrained, tmp_path):
    """Else the old model would stay beside a new result."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "result.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds result.json and model but no checkpoint"):
        finetune(folder, config(f"data.images={images}", f"model.path={pretrained}", "seed=1"))
    assert (folder / "result.json").read_bytes() == before and not (folder / "checkpoints").exists()


def test_a_model_of_another_run_is_not_taken_for_this_ones(finished, images, pretrained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    finetune(folder, config(f"data.images={images}", f"model.path={pretrained}"))  # its own: proven and kept
    assert (folder / "result.json").read_bytes() == (finished / "result.json").read_bytes()
    (folder / "result.json").unlink()
    shutil.copy(pretrained / "model.safetensors", folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="holds something else than this run's model"):
        finetune(folder, config(f"data.images={images}", f"model.path={pretrained}"))
    assert not (folder / "result.json").exists()


def test_the_folder_of_a_pretraining_run_is_refused_before_its_first_checkpoint(images, pretrained, tmp_path):
    (tmp_path / "config.yaml").write_text("name: chexpert\nglobal_batch: 8\n")
    with pytest.raises(ValueError, match="is not the configuration of a fine-tuning run"):
        finetune(tmp_path, config(f"data.images={images}", f"model.path={pretrained}"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_folder_among_the_classes_is_refused(images, pretrained):
    cfg = config(f"data.images={images / 'train'}", f"model.path={pretrained}")
    with pytest.raises(ValueError, match="where its own folders would be classes"):
        finetune(images / "train" / "run", cfg)
    assert not (images / "train" / "run").exists()


def test_options_for_multi_class_leave_nothing_behind(pretrained, tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=20, valid=6, seed=1)
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "shards")
    for option in ("class_weights=balanced", "oversampling=true"):
        with pytest.raises(ValueError, match=f"{option.split('=')[0]} is for multi-class targets"):
            finetune(tmp_path / "run", config(f"data.shards={tmp_path / 'shards'}", f"model.path={pretrained}", option))
        assert not (tmp_path / "run").exists()


def test_free_memory_does_not_decide_what_is_trained_on(images, pretrained, monkeypatch):
    """An automatic micro-batch larger than the training set does not switch to draws with replacement."""
    cfg = config(f"data.images={images}", f"model.path={pretrained}", "micro_batch=null", "global_batch=64")
    plan = make_plan(cfg)
    assert plan.cfg.micro_batch == 64 and plan.cfg.sampling == "permutation"
    assert make_plan(config(*_words(images, pretrained), "micro_batch=64", "global_batch=64")).cfg.sampling == (
        "replacement"
    )
    chosen = set()
    cfg = config(*_words(images, pretrained), "micro_batch=null", "global_batch=64", "data.resolution=[128,128]")
    monkeypatch.setattr(plan_module.memory, "installed", lambda: 600 * 2**20)
    for free in (100, 400, 5000):  # MB: what happens to be free does not matter, but is said
        monkeypatch.setattr(plan_module.memory, "available", lambda device, free=free: free * 2**20)
        plan = make_plan(cfg)
        chosen.add(plan.cfg.micro_batch)
        assert any(line.startswith("note: only") for line in plan.says) == (free == 100)
    assert len(chosen) == 1 and chosen != {64}


def _words(images: Path, pretrained: Path) -> tuple[str, str]:
    return f"data.images={images}", f"model.path={pretrained}"


def test_a_micro_batch_chosen_before_the_first_checkpoint_stays(images, pretrained, tmp_path, monkeypatch):
    """A run killed early, started again with less free memory, trains the same bytes."""
    from scaletransfer.config import to_yaml

    cfg = config(
        *_words(images, pretrained), "micro_batch=null", "global_batch=64", "steps=1", "data.resolution=[128,128]"
    )
    resolved = make_plan(cfg).cfg
    assert resolved.micro_batch == 64
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolved))
    monkeypatch.setattr(plan_module.memory, "installed", lambda: 600 * 2**20)
    finetune(tmp_path / "run", cfg)
    assert "\nmicro_batch: 64\n" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["x #1", "[a]", "a: b", "ünï 'q\" 😀"])
def test_a_path_on_the_command_line_is_taken_as_it_is(images, pretrained, tmp_path, name):
    """As YAML, "x #1" is the folder x."""
    shutil.copytree(images, tmp_path / name / "animals")
    where = tmp_path / name
    arguments = ["--images", str(where / "animals"), "--model-path", str(pretrained), "--logdir", str(where / "run")]
    assert main([*arguments, *FAST, "--steps", "1"]) == 0
    assert len(losses(where / "run")) == 1


def test_classes_without_training_samples_are_named(images, pretrained, tmp_path, capsys):
    first = tmp_path / "first"
    finetune(first, config(*_words(images, pretrained), "steps=1"))
    other = tmp_path / "animals"
    shutil.copytree(images, other)
    make_image_folder(other, classes=("zebra",), per_class=2)
    capsys.readouterr()
    cfg = config(*_words(other, pretrained), "steps=1", f"selection={first / 'selection.json'}")
    finetune(tmp_path / "second", cfg)
    assert "no training sample has zebra" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("pretrained_models/chexpert/model.pth.tar", "chexpert"),
        ("runs/tb/model/model.safetensors", "tb"),
        ("google/BiT-M-R50x1.npz", "BiT-M-R50x1"),
        ("runs/tb/model", "tb"),
        ("exported/zero2", "zero2"),
    ],
)
def test_the_name_of_a_model_in_results(tmp_path, path, title):
    where = tmp_path / path
    if where.suffix:
        where.parent.mkdir(parents=True)
        where.touch()
    else:
        where.mkdir(parents=True)
    assert title_of(where) == title


@pytest.mark.parametrize(
    "change",
    [{"normalisation": None}, {"normalisation": {"mean": 0.5}}, {"transform": None}, {"label_names": 5}, {"model": 7}],
)
def test_a_damaged_model_card_is_one_sentence(images, pretrained, tmp_path, change):
    folder = tmp_path / "damaged"
    shutil.copytree(pretrained, folder)
    card = json.loads((folder / "model.json").read_text()) | change
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=f"the field '{next(iter(change))}' of its model.json must be"):
        finetune(tmp_path / "run", config(f"data.images={images}", f"model.path={folder}"))


def test_a_missing_model_is_missing_from_scratch_too(images, tmp_path):
    """Its normalisation would be another one, in silence."""
    cfg = config(f"data.images={images}", "model.path=nowhere", "model.from_scratch=true", "model.name=BiT-tiny")
    with pytest.raises(ValueError, match="there is no pre-trained model nowhere"):
        finetune(tmp_path / "run", cfg)
