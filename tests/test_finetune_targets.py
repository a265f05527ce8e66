"""Fine-tuning directly from the files of every data set, by every configuration that comes along."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from helpers_transfer import losses, make_pretrained

from scaletransfer.config import FinetuneConfig, load_config
from scaletransfer.evaluate import main as evaluate
from scaletransfer.finetune import finetune, main
from scaletransfer.keys import PUBLIC_SALT
from scaletransfer.labels import LabelPolicy
from scaletransfer.padchest_labels import FINDINGS
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import SOURCES, open_source, source_options
from scaletransfer.transfer.data import choose_resolution, open_official, open_target

ROOT = Path(__file__).parents[1]
TINY = (
    "model.from_scratch=true",
    "model.name=BiT-tiny",
    "model.activation_checkpointing=false",
    "precision=fp32",
    "steps=2",
    "global_batch=4",
    "micro_batch=2",
    "data.resolution=[36,32]",
    "data.workers=0",
    "validate.every_steps=null",
    "validate.batch=16",
    "checkpoint.every_steps=null",
    "bootstrap=2",
)
# One to two seconds each: what is drawn, small enough, and options without which a source has no second split.
DRAWN: dict[str, dict[str, Any]] = {
    "cifar10": {"train": 10, "test": 10},
    "cifar100": {"train": 100, "test": 100},
    "flowers": {"test": 1},
    "pets": {"trainval": 1},
    "padchest": {"patients": 27, "place": "zips"},
}
CONFIGS = {
    "cifar10": ("cifar10", 10),
    "cifar100": ("cifar100", 100),
    "covidx_cxr2": ("covidx", 2),
    "flowers": ("flowers", 102),
    "flowers_high_lr": ("flowers", 102),
    "flowers_oversampling": ("flowers", 102),
    "padchest": ("padchest", 27),
    "padchest_cl": ("padchest", 27),
    "pets": ("pets", 37),
    "tuberculosis_full": ("tuberculosis", 2),
}
TRAIN_ALONE = "imagenet21k"
TEMPLATES = ("template_image_folder", "template_shards")


def shipped(name: str) -> Path:
    return ROOT / "configs" / "finetune" / f"{name}.yaml"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The root of a tiny data set in its official layout, drawn once."""
    made: dict[str, Path] = {}

    def root(source: str) -> Path:
        if source not in made:
            base = tmp_path_factory.mktemp("official")
            if source == "chexpert":
                made[source] = make_chexpert(base / "CheXpert-v1.0", rows=20, valid=8)
            elif source == "image_folder":
                made[source] = make_image_folder(base / "animals")
            else:
                write = getattr(import_module(f"official.{source}"), f"write_{source}")
                made[source] = write(base / source, **DRAWN.get(source, {}))
        return made[source]

    return root


@pytest.fixture
def configured(official: Callable[[str], Path]) -> Callable[..., FinetuneConfig]:
    """A shipped configuration on a drawn data set, tiny."""

    def load(name: str, *overrides: str) -> FinetuneConfig:
        return load_config(
            shipped(name), [f"data.root={official(CONFIGS[name][0])}", *TINY, *overrides], FinetuneConfig
        )

    return load


def target_of(source: str, root: Path, *overrides: str) -> Any:
    return open_target(load_config([], [f"data.source={source}", f"data.root={root}", *overrides], FinetuneConfig))


def selected(folder: Path) -> list[str]:
    keys: list[str] = json.loads((folder / "selection.json").read_text())["keys"]
    return keys


def test_every_configuration_is_run_here():
    names = {path.stem for path in (ROOT / "configs" / "finetune").glob("*.yaml")}
    assert names == {*CONFIGS, *TEMPLATES, "demo"}


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_each_configuration(name, official, configured, tmp_path):
    """In a process: finite losses, the classes and splits of the source, samples of the source alone."""
    source, classes = CONFIGS[name]
    cfg = configured(name)
    assert (cfg.data.source, cfg.nb_classes, cfg.protocol) == (source, classes, "paper")
    result = finetune(tmp_path / "run", cfg)
    found = losses(tmp_path / "run")
    assert len(found) == 2 and all(math.isfinite(loss) for loss in found)
    options = {**cfg.data.options}
    if "protocol" in source_options(source):
        options["protocol"] = cfg.data.protocol
    opened = open_source(source, official(source), **options)
    splits = Counter(record.split for record in opened)
    names = FINDINGS if source == "padchest" else opened.label_names
    assert result["label_names"] == list(names) and len(names) == classes
    assert result["dataset"] == name and math.isfinite(result["metrics"]["loss"])
    valid = "valid" if splits["valid"] else "test"
    assert (result["train_samples"], result["valid_samples"]) == (splits["train"], splits[valid])
    resolved = load_config(tmp_path / "run" / "config.yaml", (), FinetuneConfig)
    assert resolved.data.valid_split == valid and resolved.data.protocol == cfg.data.protocol
    keys = selected(tmp_path / "run")
    assert len(keys) == splits["train"] and all(re.fullmatch(rf"{source}-[0-9a-f]{{16}}", key) for key in keys)
    assert result["task"] == ("multilabel" if name == "padchest" else "multiclass")
    assert resolved.sampling == ("replacement" if "oversampling" in name or name == "covidx_cxr2" else "permutation")


@pytest.mark.parametrize("source", SOURCES)
def test_the_size_of_images_is_read_wherever_they_lie(source, official):
    """Drawn images are all below 96 x 96 pixels."""
    target = open_official(source, official(source), LabelPolicy())
    size, why = choose_resolution(target, "train")
    assert size == (160, 128) and re.fullmatch(r"images of about [2-9][0-9] x [2-9][0-9]", why)


def test_what_the_published_configurations_say():
    """PROTOCOL: batch 128 in micro-batches of 64 (CIFAR) or 4, SGD_AGC with momentum 0.9, the rate for 128 images."""
    for name in CONFIGS:
        cfg = load_config(shipped(name), (), FinetuneConfig)
        assert (cfg.global_batch, cfg.micro_batch) == (128, 64 if name.startswith("cifar") else 4)
        assert (cfg.optimizer.name, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == ("sgd_agc", 0.9, 0.0)
        assert (
            cfg.optimizer.lr == (0.01 if name == "flowers_high_lr" else 0.001) and cfg.optimizer.head_exempt == "paper"
        )
        assert cfg.oversampling == (name in ("covidx_cxr2", "flowers_oversampling"))
        assert cfg.validate.every_steps == 100 and cfg.data.dataset == name
        published = name.startswith(("flowers", "padchest"))
        assert cfg.data.protocol == ("paper" if published else "corrected")
        assert cfg.data.policy.name == ("paper" if name.startswith("padchest") else "corrected")


def test_the_templates_run(official, tmp_path):
    animals = official("image_folder")
    folders = [f"train_dir={animals}/train", f"val_dir={animals}/val"]
    result = finetune(
        tmp_path / "folder", load_config(shipped("template_image_folder"), [*folders, *TINY], FinetuneConfig)
    )
    assert (result["train_samples"], result["valid_samples"], result["dataset"]) == (12, 12, "animals")
    build(plan_shards(open_source("chexpert", official("chexpert")), SALT), tmp_path / "shards")
    cfg = load_config(shipped("template_shards"), [f"data.shards={tmp_path / 'shards'}", *TINY], FinetuneConfig)
    result = finetune(tmp_path / "shard_run", cfg)
    assert result["task"] == "multilabel" and math.isfinite(losses(tmp_path / "shard_run")[-1])


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in {of for of, _ in CONFIGS.values()}])
def test_every_other_source_is_a_target_too(source, official, tmp_path):
    cfg = load_config([], [*TINY, f"data.source={source}", f"data.root={official(source)}"], FinetuneConfig)
    if source == TRAIN_ALONE:
        with pytest.raises(
            ValueError, match="no split valid or test, only train: scores need another split than the one"
        ):
            finetune(tmp_path / "run", cfg)
        return
    result = finetune(tmp_path / "run", cfg)
    assert result["dataset"] == source and all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert all(key.startswith(f"{source}-") for key in selected(tmp_path / "run"))


@pytest.mark.parametrize("source", ["covidx", "tuberculosis", "padchest", "nih", "mimic", "chexpert"])
def test_no_identifier_of_a_patient_gets_into_a_run_folder(source, official, tmp_path):
    cfg = load_config([], [*TINY, f"data.source={source}", f"data.root={official(source)}"], FinetuneConfig)
    finetune(tmp_path / "run", cfg)
    records = list(open_source(source, official(source)))
    secrets = {Path(r.image.rpartition("//")[2]).stem for r in records} | {
        r.patient for r in records if len(r.patient) > 4
    }
    secrets |= {r.source_id for r in records}
    if source == "chexpert":  # a file is called view1_frontal, which names nobody
        secrets = {s for s in secrets if not s.startswith("view")} | {f"/{r.patient}" for r in records}
    assert len(secrets) > 10
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path
    with open(tmp_path / "run" / "predictions.csv", newline="") as stream:
        assert "image" not in next(csv.reader(stream))


def test_predictions_of_a_public_set_name_their_files(official, configured, tmp_path):
    finetune(tmp_path / "run", configured("pets"))
    with open(tmp_path / "run" / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all((official("pets") / row["image"]).is_file() for row in rows)


def test_files_and_shards_of_a_source_train_alike(official, configured, tmp_path):
    """The same keys in both, so the same selection, order and pixels: bit-equal losses."""
    finetune(tmp_path / "files", configured("pets", "examples_per_class=1"))
    build(plan_shards(open_source("pets", official("pets")), PUBLIC_SALT), tmp_path / "shards")
    shards = [f"data.shards={tmp_path / 'shards'}", "data.source=null", "data.root=null"]
    finetune(tmp_path / "from_shards", configured("pets", "examples_per_class=1", *shards))
    assert losses(tmp_path / "files") == losses(tmp_path / "from_shards")
    assert selected(tmp_path / "files") == selected(tmp_path / "from_shards")


# ---- splits, protocol, views, options


def test_without_a_validation_split_the_test_split_is_used_and_said(official, tmp_path, capsys):
    words = ["data.source=pets", f"data.root={official('pets')}"]
    main(["--logdir", str(tmp_path / "run"), *TINY, *words])
    said = capsys.readouterr().out
    assert "note: pets has no split valid: scores are on its split test" in said
    assert "training on 37 of 37 images (all), validating on 37" in said
    held = target_of("covidx", official("covidx"), "data.options={valid_share: 0.4}")
    assert held.valid_split == "valid" and not any("no split valid" in note for note in held.notes)
    assert target_of("flowers", official("flowers")).valid_split == "valid"
    assert target_of("flowers", official("flowers"), "data.valid_split=test").valid_split == "test"
    with pytest.raises(ValueError, match=r"data.valid_split is 'valid' but .* has only train, test"):
        target_of("pets", official("pets"), "data.valid_split=valid")
    with pytest.raises(ValueError, match=r"data\.train_split and data\.valid_split are both 'test'"):
        target_of("pets", official("pets"), "data.train_split=test")


def test_a_source_with_training_images_alone_says_what_to_do(official, tmp_path):
    root = make_image_folder(tmp_path / "flat", splits=("train",)) / "train"
    with pytest.raises(
        ValueError, match="no split valid or test, only train: hold a share of it out by the option valid"
    ):
        target_of("image_folder", root)
    assert target_of("image_folder", root, "data.options={valid_share: 0.5}").valid_split == "valid"


def test_an_image_folder_does_not_fall_back_to_its_test_images(tmp_path):
    """Those are for evaluate: a share of training is held out, as ever."""
    root = make_image_folder(tmp_path / "animals", splits=("train", "test"), per_class=12)
    target = open_target(load_config([], [f"data.images={root}"], FinetuneConfig))
    assert target.valid_split == "valid" and set(target.index.splits) == {"train", "valid", "test"}


def test_notes_and_rows_left_out_are_printed(official, configured, tmp_path, capsys):
    finetune(tmp_path / "flowers", configured("flowers"))
    assert "note: the protocol paper swaps the official splits" in capsys.readouterr().out
    opened = open_source("padchest", official("padchest"))
    assert list(opened) and opened.left_out
    finetune(tmp_path / "padchest", configured("padchest", "data.protocol=corrected"))
    said = capsys.readouterr().out
    for reason, rows in opened.left_out.items():
        assert f"left out: {rows} rows, {reason}" in said


def test_protocol_views_and_options_reach_the_source(official):
    root = official("flowers")
    sizes = {
        protocol: {
            split: info.samples
            for split, info in target_of("flowers", root, f"data.protocol={protocol}").index.splits.items()
        }
        for protocol in ("corrected", "paper")
    }
    assert sizes == {"corrected": {"train": 102, "valid": 102, "test": 102}, "paper": {"train": 102, "test": 204}}
    few = target_of("padchest", official("padchest"), "data.views=[PA]")
    text = target_of("padchest", official("padchest"), "data.views=PA")
    assert few.index.views == text.index.views == ("PA",)
    assert set(target_of("padchest", official("padchest"), "data.views=all").index.views) > {"PA", "L"}
    single = target_of("padchest", official("padchest"), "data.options={single_label: true}")
    assert single.task == "multiclass" and single.names == tuple(FINDINGS)
    assert (few.depth, few.channels) == (16, 1)


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("pets", ["data.protocol=paper"], "the protocol paper was asked for, but the source pets has only one"),
        ("pets", ["data.views=PA"], "The source pets has no option 'views'; it has none"),
        (
            "covidx",
            ["data.options={valid_shar: 0.1}"],
            r"covidx has no option 'valid_shar' \(did you mean 'valid_share'",
        ),
        ("covidx", ["data.options={valid_share: 2}"], "valid_share must be a number from 0 to below 1, not 2"),
        ("covidx", ["data.views=PA"], "covidx has no option 'views'; it has valid_share, seed"),
        ("padchest", ["data.views=[front]"], "There is no view 'front'"),
        ("flowers", ["data.protocol=papr"], r"data.protocol must be one of corrected, paper, not 'papr'"),
        ("flowers", ["data.options={protocol: paper}"], "data.options must be without protocol: that is data.protocol"),
        ("flowrs", [], r"There is no source 'flowrs' \(did you mean 'flowers'"),
    ],
)
def test_what_a_source_does_not_have_is_refused(official, source, overrides, message):
    root = official(source if source in SOURCES else "pets")
    with pytest.raises(ValueError, match=message) as caught:
        target_of(source, root, *overrides)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def restarted(official: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on PadChest-Cl."""
    folder = tmp_path_factory.mktemp("runs") / "restarted"
    words = [f"data.root={official('padchest')}", *TINY]
    finetune(folder, load_config(shipped("padchest_cl"), words, FinetuneConfig))
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("data.protocol=corrected", r"data\[0\].protocol \"paper\", but this run has \"corrected\""),
        ("data.views=[PA]", r"data\[0\].views \[.*\], but this run has \[\"PA\"\]"),
        ("data.options={single_label: false}", r"task \"multiclass\", but this run has \"multilabel\""),
        ("data.valid_split=train", "both 'train'"),
    ],
)
def test_a_restart_holds_what_was_read(restarted, configured, changed, message):
    with pytest.raises(ValueError, match=message):
        finetune(restarted, configured("padchest_cl", changed))


def test_a_restart_takes_what_null_stood_for(restarted, configured, capsys):
    views = "data.views=[COSTAL, L, AP Supine, AP, PA]"
    finetune(restarted, configured("padchest_cl", "data.valid_split=valid", views))
    assert "is complete: its result stands" in capsys.readouterr().out


def test_a_restart_holds_the_resolved_split(official, configured, tmp_path):
    finetune(tmp_path / "run", configured("covidx_cxr2"))
    with pytest.raises(ValueError, match=r"data\[0\].options.valid_share null, but this run has 0.3"):
        finetune(tmp_path / "run", configured("covidx_cxr2", "data.options={valid_share: 0.3}"))
    finetune(tmp_path / "flowers", configured("flowers", "data.protocol=corrected"))
    with pytest.raises(ValueError, match=r"data\[1\].split \"valid\", but this run has \"test\""):
        finetune(tmp_path / "flowers", configured("flowers", "data.protocol=corrected", "data.valid_split=test"))


def test_a_run_folder_among_the_classes_is_refused(official):
    root = official("image_folder")
    cfg = load_config([], [*TINY, "data.source=image_folder", f"data.root={root}/train"], FinetuneConfig)
    with pytest.raises(ValueError, match=r"lies in data.root .*, where its own folders would be classes"):
        finetune(root / "train" / "run", cfg)


# ---- evaluate


def test_evaluate_opens_the_same_targets(official, configured, tmp_path, capsys):
    run = tmp_path / "run"
    result = finetune(run, configured("flowers", "data.protocol=paper"))
    words = [str(run), "--source", "flowers", "--root", str(official("flowers")), "--workers", "0", "--bootstrap", "0"]
    capsys.readouterr()
    evaluate([*words, "--protocol", "paper", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "note: flowers has no split valid: scores are on its split test" in said and "swaps" in said
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["samples"] == result["valid_samples"] == 204
    other = tmp_path / "salt"
    other.write_text("another secret of many bytes")
    evaluate([*words, "--protocol", "paper", "--salt-file", str(other), "--out", str(tmp_path / "salted")])
    tables = [pd.read_csv(tmp_path / name / "predictions.csv") for name in ("out", "salted")]
    assert not set(tables[0]["key"]) & set(tables[1]["key"]) and len(tables[1]) == 204
    capsys.readouterr()
    evaluate([*words, "--out", str(tmp_path / "again")])
    assert 'note: protocol "paper", as the model was trained' in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["accuracy"] == found["accuracy"] and again["samples"] == 204
    evaluate([*words, "--protocol", "corrected", "--out", str(tmp_path / "corrected")])
    assert "on the split valid" in capsys.readouterr().out
    assert json.loads((tmp_path / "corrected" / "metrics.json").read_text())["samples"] == 102
    with pytest.raises(ValueError, match="has no option 'views'"):
        evaluate([*words, "--views", "PA"])
    with pytest.raises(ValueError, match="--option is 'x'; give NAME=VALUE"):
        evaluate([*words, "--option", "x"])
    images = make_image_folder(tmp_path / "animals")
    with pytest.raises(ValueError, match="--option and --salt-file are for --source"):
        evaluate([str(run), "--images", str(images), "--option", "valid_share=0.1"])


def test_evaluate_takes_options_of_a_source(official, configured, tmp_path, capsys):
    run = tmp_path / "run"
    finetune(run, configured("padchest_cl"))
    capsys.readouterr()
    words = [
        str(run),
        "--source",
        "padchest",
        "--root",
        str(official("padchest")),
        "--workers",
        "0",
        "--bootstrap",
        "0",
    ]
    evaluate([*words, "--views", "PA,L", "--option", "single_label=true", "--out", str(tmp_path / "out")])
    assert "left out: " in capsys.readouterr().out
    with open(tmp_path / "out" / "predictions.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows and "image" not in rows[0]
    evaluate(words)  # the options of the model's own training
    assert 'note: protocol "paper", views [' in (said := capsys.readouterr().out) and "single_label" in said
    with pytest.raises(ValueError, match=r"is a multiclass model but .* is multilabel"):
        evaluate([*words, "--option", "single_label=false"])


def test_a_pretrained_model_takes_a_new_head_for_each_target(official, configured, tmp_path):
    model = make_pretrained(tmp_path / "pre", kind="xray")
    cfg = configured("tuberculosis_full", "model.from_scratch=false", f"model.path={model}", "examples_per_class=2")
    result = finetune(tmp_path / "run", cfg)
    assert result["pretrained_model"] == "pre" and result["shot"] == 2 and result["train_samples"] == 4
