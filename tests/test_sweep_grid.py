"""The runs of a sweep file, and what is refused before any of them starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_data import make_image_folder
from helpers_transfer import make_pretrained

from scaletransfer.config.sweep import read_sweep
from scaletransfer.sweep import main, part
from scaletransfer.sweep_folder import check_asked, write_asked
from scaletransfer.sweep_grid import Run, check_grid, make_grid


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = make_image_folder(tmp_path_factory.mktemp("images") / "animals", per_class=3)
    (root / "train" / "emu" / "img_2.jpg").unlink()
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("models") / "pre")


def grid(folder: Path, content: dict[str, Any], given: dict[str, Any] | None = None) -> list[Run]:
    """The checked runs of a sweep file with this content."""
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    sweep = read_sweep(folder / "sweep.yaml")
    return check_grid(sweep, make_grid(sweep, folder / "out", given or {}))


def test_the_grid_and_what_wins(images, pretrained, tmp_path):
    (tmp_path / "common.yaml").write_text("steps: 9\nglobal_batch: 64\nseed: 77\ndata: {flip: 0.1}\n")
    (tmp_path / "target.yaml").write_text(f"global_batch: 32\ndata: {{images: {images}}}\n")
    runs = grid(
        tmp_path,
        {
            "models": [
                "scratch",
                {"name": "good", "path": str(pretrained), "overrides": {"optimizer.lr": 0.2, "mixup": 0.4}},
            ],
            "targets": [
                str(images),
                {
                    "name": "again",
                    "config": str(tmp_path / "target.yaml"),
                    "shots": ["full"],
                    "overrides": {"optimizer": {"lr": 0.3}, "bootstrap": 5},
                },
            ],
            "shots": [1, "full"],
            "seeds": [5, 3],
            "config": str(tmp_path / "common.yaml"),
            "overrides": {"optimizer.lr": 0.1, "bootstrap": 3, "data": {"flip": 0.2}},
        },
        {"data.workers": 0, "steps": 4},
    )
    assert [run.title for run in runs] == [
        *(f"animals/{m}/{s}/seed{k}" for k in (5, 3) for s in ("1_shot", "full_shot") for m in ("scratch", "good")),
        *(f"again/{m}/full_shot/seed{k}" for k in (5, 3) for m in ("scratch", "good")),
    ]
    assert [run.folder for run in runs] == [tmp_path / "out" / "runs" / run.title for run in runs]
    first, good, last = runs[0].cfg, runs[1].cfg, runs[-1].cfg
    assert (first.seed, first.examples_per_class, first.steps, first.global_batch) == (5, 1, 9, 64)
    assert (first.optimizer.lr, good.optimizer.lr, runs[-2].cfg.optimizer.lr, last.optimizer.lr) == (0.1, 0.2, 0.3, 0.2)
    assert (first.bootstrap, last.bootstrap, last.global_batch, last.mixup, last.data.flip) == (3, 5, 32, 0.4, 0.2)
    assert first.model.from_scratch and first.model.path == str(pretrained) and first.data.workers == 0
    assert (first.model.title, first.data.dataset, last.data.dataset) == ("scratch", "animals", "again")
    assert runs[0].weights == "" and len(runs[1].weights) == 64 == len(runs[0].index)


def test_shots_that_a_class_cannot_give(images, pretrained, tmp_path):
    content = {"models": [str(pretrained)], "targets": [str(images)], "shots": [2, 3, "full"], "seeds": [0]}
    two, three, full = grid(tmp_path, content)
    assert not two.skipped and not full.skipped
    assert "'emu' has 2 training samples, 3 were asked for" in three.skipped
    assert not any(run.skipped for run in grid(tmp_path, {**content, "overrides": {"allow_fewer": True}}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"modells": []}, r"unknown key modells \(did you mean models\?\)"),
        ({"models": []}, "models must be a list of one or more"),
        ({"models": [{"nome": "x"}]}, r"models\[0\]: unknown key nome \(did you mean name\?\)"),
        ({"models": [3]}, r"models\[0\] must be text or a mapping"),
        ({"models": ["PRE", {"name": "PRE", "path": "PRE"}]}, "is to be a folder's name"),
        ({"models": ["PRE", {"name": "Pre", "path": "PRE"}]}, "two models are called Pre"),
        ({"targets": ["IMAGES", "IMAGES"]}, "two targets are called animals"),
        ({"models": ["PRE/nothing"]}, "model nothing: .*PRE/nothing"),
        ({"targets": ["IMAGES/nothing"]}, "target nothing: .*nothing"),
        ({"models": ["scratch"]}, "model scratch: from scratch, but which network"),
        ({"models": ["PRE", {"path": "scratch", "like": "pra"}]}, r"like 'pra', .*\(did you mean pre\?\)"),
        ({"models": ["PRE", {"name": "x", "path": "PRE", "like": "pre"}]}, "both path and like"),
        ({"shots": [0]}, "shots must be different numbers of 1 or more, or full"),
        ({"shots": ["few"]}, "shots must be different numbers"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"overrides": {"seed": 3}}, "overrides set seed, which a sweep sets itself: use seeds"),
        ({"overrides": {"optimiser.lr": 3}}, r"unknown key optimiser \(did you mean optimizer\?\)"),
        ({"overrides": {"steps": "many"}}, "steps must be a whole number or null"),
        ({"config": "nowhere.yaml"}, "there is no configuration file nowhere.yaml"),
        ({"overrides": {"model.head": "keep"}}, "model pre on target animals: model.head is keep"),
    ],
)
def test_refusals_come_before_anything_starts(change, sentence, images, pretrained, tmp_path, monkeypatch):
    content = {"models": ["PRE"], "targets": ["IMAGES"], "seeds": [0], **change}
    text = yaml.safe_dump(content).replace("name: PRE", "name: a/b")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text.replace("PRE", str(pretrained)).replace("IMAGES", str(images)))
    with pytest.raises((ValueError, OSError), match=sentence.replace("PRE", str(pretrained))) as caught:
        main(["sweep.yaml", "--out", "out"])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_scratch_that_could_be_of_two_networks(images, tmp_path):
    for name, network in (("one", "BiT-tiny"), ("two", "BiT-S-R50x1")):
        make_pretrained(tmp_path / name, model=network)
    models = ["scratch", str(tmp_path / "one"), str(tmp_path / "two")]
    content: dict[str, Any] = {"models": models, "targets": [str(images)], "seeds": [0]}
    with pytest.raises(ValueError, match="model scratch is drawn, but the others are of several networks"):
        grid(tmp_path, content)
    content["models"] = [{"name": f"scratch_{n}", "path": "scratch", "like": n} for n in ("two", "one")] + models[1:]
    runs = grid(tmp_path, content)
    assert [Path(run.cfg.model.path or "").name for run in runs] == ["two", "one", "one", "two"]


def test_a_run_of_another_sweep_is_not_taken_for_this_ones(images, pretrained, tmp_path):
    content = {"models": [str(pretrained)], "targets": [str(images)], "shots": [1], "seeds": [0]}
    (run,) = grid(tmp_path, {**content, "overrides": {"optimizer.lr": 0.1}})
    check_asked(run)
    write_asked(run)
    (run.folder / "selection.json").write_text("{}")  # it has begun
    check_asked(run)
    free = {"optimizer.lr": 0.1, "data.workers": 3, "checkpoint.every_steps": 7, "data.cache": str(tmp_path)}
    check_asked(grid(tmp_path, {**content, "overrides": free})[0])
    with pytest.raises(ValueError, match=r"made before optimizer.lr changed from 0.1 to 0.2: take another --out"):
        check_asked(grid(tmp_path, {**content, "overrides": {"optimizer.lr": 0.2}})[0])
    make_image_folder(tmp_path / "other" / "animals", per_class=3, seed=1)
    with pytest.raises(ValueError, match="made before the images of the target changed from what they were"):
        changed = {**content, "targets": [str(tmp_path / "other" / "animals")]}
        check_asked(grid(tmp_path, {**changed, "overrides": {"optimizer.lr": 0.1}})[0])
    (run.folder / "sweep.json").unlink()
    with pytest.raises(ValueError, match="holds a run that no sweep made"):
        check_asked(run)


def test_parts_of_a_grid():
    assert part("2/3") == (2, 3)
    for text in ("3/3", "1", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="--index must be I/N"):
            part(text)


def test_a_folder_of_other_things_is_refused(images, pretrained, tmp_path):
    (tmp_path / "sweep.yaml").write_text(f"models: [{pretrained}]\ntargets: [{images}]\n")
    with pytest.raises(ValueError, match="holds other things and no sweep"):
        main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path)])
