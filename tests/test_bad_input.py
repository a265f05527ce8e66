# ruff: noqa: F811  (fixtures are imported, and named again as arguments)
"""Wrong input, end to end: one `error:` sentence that names the thing and its mend, exit 2, nothing run, nothing left.

Commands run in this process through `run_command`, as the console script runs them; a few go through
`accelerate launch`. Shards and checkpoints are in test_bad_files.py.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert
from helpers_refusal import Bench, bench, launched, made  # noqa: F401

from scaletransfer.cli import main as command
from scaletransfer.pretrain import main as pretrain

REPOSITORY = Path(__file__).parents[1]


# --- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.base_rl=0.1", ["optimizer.base_rl", "base_lr"]),
        ("optimiser.name=sgd", ["optimiser", "optimizer"]),
        ("epochs=many", ["epochs", "whole number", "many"]),
        ("optimizer.base_lr=-1", ["optimizer.base_lr", "positive"]),
        ("optimizer.base_lr=.nan", ["optimizer.base_lr"]),
        ("data.transform=xrays", ["data.transform", "xray"]),
        ("model.name=BiT-S-R51x1", ["BiT-S-R51x1", "BiT-S-R50x1"]),
        ("global_batch=12", ["global_batch", "micro_batch"]),
        ("global_batch=1600", ["global_batch 1600", "32 training samples"]),
        ("schedule.warmup_epochs=5", ["warmup_epochs", "epochs"]),
        ("schedule.min_lr=5", ["min_lr", "peak"]),
        ("data.train_split=trian", ["trian", "train"]),
        ("data.valid_split=vlaid", ["vlaid", "valid"]),
        ("data.expect_labels=[Edema]", ["data.expect_labels", "Edema"]),
        ("data.policy.per_label={Edma: {uncertain: ones}}", ["Edma", "Edema"]),
        ("model.init_from=nowhere.pth.tar", ["nowhere.pth.tar"]),
        ("data.train=nowhere", ["nowhere", "make_shards"]),
        ("name=../up", ["name", "../up"]),
        ("max_steps=!!python/object/apply:os.mkdir [executed]", ["max_steps", "tag"]),
    ],
)
def test_a_wrong_value_is_refused(bench, made, override, words):
    validating = ["validate.every_epochs=1"] if "valid_split" in override else []
    bench.refused(pretrain, bench.train(made["first"], *validating, override), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nglobal_bach: 32\n", ["bad.yaml", "global_bach", "global_batch"]),
        ("epochs: [1]\n", ["bad.yaml", "epochs"]),
        ("seed: !!python/object/apply:os.mkdir [executed]\n", ["bad.yaml", "tag"]),
        ("model: !!python/name:os.system {}\n", ["bad.yaml", "tag"]),
        ("model: {name: [\n", ["bad.yaml"]),
        ("base: missing.yaml\n", ["missing.yaml"]),
        ("\x00\x01", ["bad.yaml"]),
    ],
)
def test_a_wrong_file_is_refused(bench, made, text, words):
    (bench.folder / "bad.yaml").write_text(text)
    bench.refused(pretrain, [*bench.train(made["first"]), "--config", "bad.yaml"], *words)


def test_a_run_folder_that_cannot_be_written(bench, made):
    (bench.folder / "runs").write_text("a file stands here")
    bench.refused(pretrain, bench.train(made["first"]), "run_dir", str(bench.folder / "runs"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_folder_without_permission(bench, made):
    (bench.folder / "runs").mkdir(mode=0o500)
    bench.refused(pretrain, bench.train(made["first"]), "run_dir", str(bench.folder / "runs"))


# --- tables and images ---------------------------------------------------------------------------------------


def edit_table(root: Path, change: Callable[[list[list[str]]], None]) -> None:
    with open(root / "train.csv", newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    with open(root / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def official(bench: Bench) -> Path:
    return make_chexpert(bench.folder / "CheXpert-v1.0", rows=12, valid=4, laterals=False)


def shard_command(root: Path) -> list[str]:
    return ["make-shards", "chexpert", "--root", str(root), "--out", "out", "--salt-file", "salt"]


@pytest.fixture
def salt(bench: Bench) -> None:
    (bench.folder / "salt").write_bytes(SALT)


@pytest.mark.usefixtures("salt")
class TestMakeShards:
    @pytest.mark.parametrize("mode", [["--out", "out"], ["--list", "rows.csv"]])
    @pytest.mark.parametrize("column", ["Edema", "AP/PA", "Path"])
    def test_a_missing_column(self, bench, official, column, mode):
        def drop(rows: list[list[str]]) -> None:
            place = rows[0].index(column)
            for row in rows:
                del row[place]

        edit_table(official, drop)
        argv = ["make-shards", "chexpert", "--root", str(official), "--salt-file", "salt", *mode]
        bench.refused(command, argv, "train.csv", column)

    def test_a_cell_that_is_no_label(self, bench, official):
        edit_table(official, lambda rows: rows[3].__setitem__(rows[0].index("Edema"), "2.0"))
        bench.refused(command, shard_command(official), "train.csv", "line 4", "Edema", "2.0")

    def test_a_path_that_leaves_the_root(self, bench, official):
        edit_table(official, lambda rows: rows[1].__setitem__(0, "CheXpert-v1.0/../../patient00001/study1/x.jpg"))
        bench.refused(command, shard_command(official), "train.csv", "line 2")

    def test_a_missing_image(self, bench, official):
        images = sorted((official / "train").rglob("*.jpg"))
        for image in images[:2]:
            image.unlink()
        bench.refused(command, shard_command(official), "2 of 16 images are missing", images[0].name, "--allow-missing")

    def test_an_empty_table(self, bench, official):
        edit_table(official, lambda rows: rows.__delitem__(slice(1, None)))
        bench.refused(command, shard_command(official), "train")

    def test_only_broken_images(self, bench, official):
        for image in (official / "valid").rglob("*.jpg"):
            image.write_bytes(b"no image")
        bench.refused(command, shard_command(official), "valid", "image")

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            (["--veiws", "PA"], ["--veiws", "--views"]),
            (["--views", "PX"], ["PX"]),
            (["--workers", "0"], ["--workers"]),
            (["--workers", "two"], ["--workers", "two"]),
            (["--shard-size", "-3"], ["--shard-size"]),
            (["--quality", "900", "--encode", "jpg"], ["--quality"]),
            (["--encode", "gif"], ["--encode", "png"]),
            (["--option", "nonsense=1"], ["nonsense"]),
            (["--salt-file", "CheXpert-v1.0"], ["CheXpert-v1.0"]),
        ],
    )
    def test_a_wrong_option(self, bench, official, option, words):
        bench.refused(command, [*shard_command(official), *option], *words)

    def test_another_data_set_into_a_finished_folder(self, bench, official):
        assert command(shard_command(official)) == 0
        edit_table(official, lambda rows: rows.pop())
        bench.refused(command, shard_command(official), "out", "--overwrite")


# --- the launcher --------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_batch_that_two_ranks_cannot_share(bench, made):
    argv = bench.train(made["first"], "global_batch=24")
    launched(bench, str(REPOSITORY / "launch" / "ddp.yaml"), argv, "global_batch 24", "2 x 8", "micro_batch=")


LAUNCH_FILES = [
    ("zero3", "offload_optimizer_device: none", "offload_optimizer_device: cpu", ["offload_optimizer_device"]),
    ("zero2", "zero_stage: 2", "zero_stage: 0", ["zero_stage"]),
    ("fsdp2", "fsdp_version: 2", "fsdp_version: 1", ["fsdp_version", "launch/fsdp2.yaml"]),
    ("fsdp2", "fsdp_offload_params: false", "fsdp_offload_params: true", ["fsdp_offload_params"]),
]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("base", "old", "new", "words"),
    [LAUNCH_FILES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LAUNCH_FILES[1:])],
)
def test_a_launch_file_of_an_engine_that_is_not_offered(bench, made, base, old, new, words):
    text = (REPOSITORY / "launch" / f"{base}.yaml").read_text()
    assert old in text
    (bench.folder / "launch.yaml").write_text(text.replace(old, new))
    launched(bench, "launch.yaml", bench.train(made["first"]), *words)


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (ZERO, ["zero_stage is not set", "launch/zero1"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ["zero_stage is 0"]),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, ["deepspeed_config_file", "remove it"]),
        (FSDP | {"FSDP_VERSION": "1"}, ["fsdp_version", "launch/fsdp2.yaml"]),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, ["fsdp_offload_params"]),
        (FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["parallelism_config"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["parallelism_config"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["MEGATRON_LM", "launch/"]),
    ],
)
def test_what_a_launcher_may_not_ask_for(bench, made, monkeypatch, environment, words):
    """As the launcher sets it, without the seconds that a launch costs."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bench.refused(pretrain, bench.train(made["first"]), *words)
