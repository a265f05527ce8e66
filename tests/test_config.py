"""Files, overlays and overrides become one checked configuration, and every mistake is one sentence."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaletransfer import labels
from scaletransfer.config import (
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    accumulation,
    describe,
    find_config,
    load_config,
    parse_args,
    to_yaml,
)
from scaletransfer.config import files as config_files

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = "model: {name: BiT-tiny}\ndata: {train: shards/x}\n"


@pytest.fixture
def write(tmp_path: Path):
    def writer(text: str, name: str = "run_a.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return writer


def refusal(path: Path | list[Path], *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_round_trips_and_opens_with_its_command(path, tmp_path):
    cfg = load_config(path)
    assert cfg.name == path.stem
    copy = tmp_path / "resolved.yaml"
    copy.write_text(to_yaml(cfg))
    assert load_config(copy) == cfg
    first = path.read_text().splitlines()[0]
    found = re.fullmatch(
        r"# accelerate launch --config_file (launch/\w+\.yaml) -m scaletransfer\.pretrain --config (\S+)",
        first,
    )
    assert found, f"{path} opens with {first!r}"
    assert (ROOT / found[1]).is_file() and ROOT / found[2] == path
    assert "Cost:" in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_bit*.yaml")), ids=lambda p: p.stem)
def test_every_real_config_has_a_tiny_twin(path):
    real, tiny = load_config(path), load_config([path, ROOT / "configs/parts/tiny.yaml"])
    assert tiny.name == f"{path.stem}-tiny"
    assert (tiny.model.name, tiny.data.image_size, tiny.precision) == ("BiT-tiny", 64, "fp32")
    assert tiny.data.policy == real.data.policy and tiny.optimizer == real.optimizer
    assert accumulation(tiny, 1) == 4 and accumulation(tiny, 2) == 2


@pytest.mark.parametrize("size", ["bit50x1", "bit152x4"])
def test_medical_configs_have_the_published_values(size):
    cfg = load_config(ROOT / f"configs/chexpert_{size}.yaml")
    assert cfg.model.name == {"bit50x1": "BiT-S-R50x1", "bit152x4": "BiT-S-R152x4"}[size]
    assert cfg.model.activation_checkpointing == (size == "bit152x4")
    optimizer = OptimizerConfig(
        name="sgd_agc",
        base_lr=0.01,
        momentum=0.9,
        nesterov=True,
        dampening=0.0,
        weight_decay=1e-4,
        clipping=0.01,
        eps=1e-3,
        head_exempt="paper",
    )
    assert cfg.optimizer == optimizer
    schedule = cfg.schedule
    assert (schedule.kind, schedule.warmup_epochs, schedule.decay_epochs) == ("step", 15, [30, 60, 80])
    assert (cfg.epochs, schedule.decay_factor, cfg.micro_batch, cfg.global_batch) == (90, 0.1, 16, 16 * 64)
    assert schedule.warmup_start_factor == 1 / 64
    data = cfg.data
    assert (data.image_size, data.mean, data.std, data.transform) == (224, 0.5, 0.5, "xray")
    assert (data.policy.name, data.augment_protocol) == ("paper", "paper")
    assert tuple(data.expect_labels) == labels.CHEXPERT_FINDINGS


def test_bases_merge_in_order_then_the_file_then_overlays_then_overrides(write):
    write("optimizer: {base_lr: 1.0, momentum: 0.1, eps: 0.5}\nseed: 1\n", "parts/one.yaml")
    write("optimizer: {base_lr: 2.0, momentum: 0.2}\n", "parts/two.yaml")
    top = write(f"base: [parts/one.yaml, parts/two.yaml]\n{MINIMAL}optimizer: {{base_lr: 3.0}}\n", "top.yaml")
    over = write("optimizer: {clipping: 0.2}\nepochs: 7\n", "over.yaml")
    cfg = load_config([top, over], ["epochs=8"])
    assert cfg.optimizer == OptimizerConfig(base_lr=3.0, momentum=0.2, eps=0.5, clipping=0.2)
    assert (cfg.seed, cfg.epochs, cfg.name) == (1, 8, "top-over")


def test_sections_merge_but_a_mapping_value_is_replaced_whole(write):
    write("model: {name: BiT-tiny}\ndata: {train: {a: 1, b: 2}, workers: 7}\n", "one.yaml")
    path = write("base: one.yaml\ndata: {train: {c: 3}}\n")
    assert load_config(path).data.folders == (("c", 3.0),)
    assert load_config(path).data.workers == 7


def test_folders_can_be_one_a_list_or_a_mapping(write):
    path = write(MINIMAL)
    assert load_config(path).data.folders == (("shards/x", None),)
    assert load_config(path).data.valid_folders == ("shards/x",)
    cfg = load_config(path, ["data.train=[a, b]", "data.valid=c"])
    assert cfg.data.folders == (("a", None), ("b", None)) and cfg.data.valid_folders == ("c",)
    assert load_config(path, ["data.train={a: null, b: null}"]).data.folders == (("a", None), ("b", None))


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("optimizer.base_lr=1e-4", "optimizer.base_lr", 1e-4),  # text for YAML 1.1, which wants a dot
        ("optimizer.base_lr=1", "optimizer.base_lr", 1.0),
        ("name=2024", "name", "2024"),  # a number for YAML, wanted as text
        ("max_steps=null", "max_steps", None),
        ("data.mean=[0.4, 0.5, 0.6]", "data.mean", [0.4, 0.5, 0.6]),
        ("model.compile=true", "model.compile", True),
        ("schedule.decay_epochs=[]", "schedule.decay_epochs", []),
        ("data.policy={uncertain: ones}", "data.policy.uncertain", "ones"),
        (
            "data.policy.per_label={Edema: {blank: zeros}}",
            "data.policy.per_label",
            {"Edema": {"blank": "zeros"}},
        ),
        ("model.init_from=a=b", "model.init_from", "a=b"),
    ],
)
def test_overrides(write, override, attribute, value):
    got: object = load_config(write(MINIMAL), [override])
    for part in attribute.split("."):
        got = getattr(got, part)
    assert got == value and type(got) is type(value)


def test_a_changed_configuration_round_trips(write, tmp_path):
    cfg = load_config(
        write(MINIMAL),
        [
            "optimizer.base_lr=1e-5",
            "data.train={a: 1, b: 2.5}",
            "data.policy.per_label={Lung Lesion: {uncertain: ones}}",
            "name=null_",
            "data.expect_labels=['no', '1', 'ü: x']",
            "data.std=[0.1, 0.1, 0.1]",
        ],
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_config(copy) == cfg
    assert "&" not in to_yaml(cfg) and "!!" not in to_yaml(cfg)


def test_shipped_files_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/chexpert_bit50x1.yaml").name == "chexpert_bit50x1"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/chexpert_bit50x1.yaml").write_text(MINIMAL)
    assert load_config("configs/chexpert_bit50x1.yaml").model.name == "BiT-tiny"  # one's own comes first
    with pytest.raises(FileNotFoundError, match=r"did you mean configs/chexpert_bit152x4\.yaml\?"):
        find_config("configs/chexpert_bit152.yaml")


# --- what is refused ---------------------------------------------------------------------------------------


def test_an_unknown_key_names_file_line_and_the_nearest(write):
    path = write(f"{MINIMAL}optimizer:\n  base_lrr: 1\n")
    assert refusal(path) == (f"{path}, line 4: unknown key optimizer.base_lrr (did you mean optimizer.base_lr?).")
    assert "did you mean optimizer.base_lr?" in refusal(write(MINIMAL), "base_lr=1")
    assert "data.policy has name, uncertain, blank, per_label" in refusal(write(MINIMAL), "data.policy.zzz=1")
    base = write("zzz: 1\n", "parts/base.yaml")
    top = write(f"base: [parts/base.yaml]\n{MINIMAL}", "top.yaml")
    assert f"{base}, line 1: unknown key zzz (the configuration has name, " in refusal(top)
    assert "unknown key data.base" in refusal(write("data: {base: [x.yaml]}\n"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epochs", "true", "a whole number, not true"),
        ("epochs", "2.5", "a whole number, not 2.5"),
        ("epochs", "null", "a whole number, not null"),
        ("optimizer.base_lr", "fast", "a number, not 'fast'"),
        ("optimizer.nesterov", "1", "true or false, not 1"),
        ("optimizer.name", "sgdagc", "one of sgd, sgd_agc, not 'sgdagc' (did you mean sgd_agc?)"),
        ("precision", "off", "one of auto, fp32, bf16, not false"),
        ("model.name", "null", "text, not null"),
        ("data.train", "[a, 3]", "not ['a', 3]"),
        ("data.train", "null", "not null"),
        ("data.mean", "[0.5, null, 0.5]", "not [0.5, None, 0.5]"),
        (
            "data.policy.per_label",
            "{Edema: 3}",
            "a mapping of text to a mapping of text to text, not {'Edema': 3}",
        ),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(write, key, value, expected):
    message = refusal(write(MINIMAL), f"{key}={value}")
    assert f": {key} must be " in message and message.endswith(f"{expected}.")


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.base_lr=0",
        "optimizer.base_lr=.nan",
        "optimizer.base_lr=.inf",
        "optimizer.clipping=0",
        "optimizer.weight_decay=-1",
        "optimizer.momentum=1",
        "optimizer.momentum=0",  # with Nesterov
        "optimizer.dampening=0.1",  # with Nesterov
        "schedule.decay_epochs=[30, 30]",
        "schedule.decay_epochs=[0]",
        "schedule.warmup_epochs=-1",
        "schedule.warmup_start_factor=1.5",
        "schedule.decay_factor=0",
        "schedule.min_lr=-1",
        "data.mean=.nan",
        "data.mean=127",
        "data.mean=[0.5, 0.5]",
        "data.std=0",
        "data.train=''",
        "data.train=[]",
        "data.train=[a, a]",
        "data.train={}",
        "data.train={a: 1, b: null}",
        "data.train={a: 0}",
        "data.valid=[]",
        "data.expect_labels=[a, a]",
        "data.expect_labels=[]",
        "data.image_size=1",
        "data.rand_augment=[2]",
        "data.rand_augment=[2, 31]",
        "data.workers=-1",
        "data.prefetch_mb=0",
        "data.remote.cache_gb=.inf",
        "data.remote.timeout=.inf",
        "data.train_split=''",
        "data.policy.per_label={Edema: {uncertain: onez}}",
        "data.policy.per_label={Edema: {unsure: ones}}",
        "checkpoint.keep=0",
        "checkpoint.every_steps=0",
        "checkpoint.every_minutes=0",
        "log.every_steps=0",
        "validate.max_samples=0",
        "model.name=''",
        "name=../x",
        "name=.x",
        "seed=-1",
        "global_batch=0",
        "micro_batch=0",
        "epochs=0",
        "max_steps=0",
        "global_batch=100",  # no multiple of 16
    ],
)
def test_a_value_out_of_bounds_names_the_key_and_where_it_was_written(write, override):
    message = refusal(write(MINIMAL), override)
    section = override.split("=")[0].rpartition(".")[0] or override.split("=")[0]
    assert f"{section}" in message and " must be " in message
    if override.split("=")[0] in message.partition(": ")[2]:
        assert message.startswith(f"in the override {override!r}: ")


def test_a_value_out_of_bounds_in_a_file_names_its_line(write):
    path = write(f"{MINIMAL}schedule:\n  min_lr: 0\n  decay_factor: 7\n")
    assert refusal(path) == (f"{path}, line 5: schedule.decay_factor must be above 0 and at most 1, not 7.0.")


def test_a_missing_required_key_says_how_to_set_it(write):
    assert refusal(write("model: {name: BiT-tiny}\n")).startswith("data.train must be given: one shard folder")
    assert "the key model.name is required" in refusal([])


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch {marker}']\n",
        "name: !!python/object/new:os.system ['touch {marker}']\n",
        "data: {{workers: !!python/object/apply:os.mkdir ['{marker}']}}\n",
        "? !!python/object/apply:os.mkdir ['{marker}']\n: 1\n",
        "name: !mine x\n",
    ],
)
def test_a_tag_is_refused_and_nothing_runs(write, tmp_path, text):
    marker = tmp_path / "executed"
    path = write(text.format(marker=marker))
    message = refusal(path)
    assert str(path) in message and "line " in message and "tag !" in message and "is refused" in message
    override = f"name=!!python/object/apply:os.mkdir ['{marker}']"
    assert "is refused" in refusal(write(MINIMAL), override)
    assert not marker.exists()


def test_double_keys_aliases_and_broken_yaml_are_refused(write):
    path = write(f"seed: 1\n{MINIMAL}seed: 2\n")
    assert refusal(path) == f"{path}, line 4: the key seed stands in line 1 already; keep one."
    assert "key data.train stands in line 1" in refusal(write("data: {train: a,\n  train: b}\n"))
    assert "alias *a is refused" in refusal(write("data: {train: &a [x, x], valid: *a}\n"))
    assert "this is not YAML" in refusal(write("a: [1\n"))
    assert "this is not YAML" in refusal(write("a: b: c\n"))
    assert "this is not YAML" in refusal(write("[" * 700))
    assert "is a mapping of keys to values, not [1, 2]" in refusal(write("[1, 2]\n"))
    assert "is a section with the keys name," in refusal(write("model: BiT-tiny\n"))
    binary = write("")
    binary.write_bytes(b"\x80\x04\x95\xff\xfe")
    assert "not a text file" in refusal(binary)


def test_base_files_missing_or_in_a_circle(write, tmp_path):
    path = write(f"base: [parts/none.yaml]\n{MINIMAL}")
    message = refusal(path)
    assert str(path) in message and "parts/none.yaml does not exist" in message
    write("base: [b.yaml]\n", "a.yaml")
    write("base: [a.yaml]\n", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in refusal(tmp_path / "a.yaml")
    assert "base must be a list of files" in refusal(write("base: 3\n"))
    write("seed: 1\n", "c.yaml")  # the same file twice is no circle
    assert load_config(write(f"base: [c.yaml, c.yaml]\n{MINIMAL}")).seed == 1


def test_overrides_that_are_none(write):
    path = write(MINIMAL)
    assert "write key=value" in refusal(path, "epochs")
    assert "write it whole, data.policy.per_label=..." in refusal(path, "data.policy.per_label.Edema.blank=zeros")
    assert "an override has no dashes" in refusal(path, "--epochs=3")


# --- the command line --------------------------------------------------------------------------------------


def test_parse_args_takes_files_and_overrides_in_any_order(write):
    one, two = write(MINIMAL, "one.yaml"), write("epochs: 3\n", "two.yaml")
    cfg, extras = parse_args(["seed=4", "--config", str(one), "max_steps=2", "--config", str(two)])
    assert (cfg.seed, cfg.epochs, cfg.max_steps, cfg.name) == (4, 3, 2, "one-two")
    assert extras.config == [str(one), str(two)] and extras.overrides == ["seed=4", "max_steps=2"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--optimizer.base_lr=3", "write optimizer.base_lr=VALUE"),
        ("--confg", "did you mean --config?"),
        ("--config", "expected one argument"),
    ],
)
def test_unknown_options_are_explained(write, argument, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse_args(["--config", str(write(MINIMAL)), argument])


def test_print_config_prints_what_would_run(write, capsys, monkeypatch):
    argv = ["--config", str(write(MINIMAL)), "--print_config", "seed=9"]
    with pytest.raises(SystemExit) as stopped:
        parse_args(argv)
    assert stopped.value.code == 0
    assert capsys.readouterr().out == to_yaml(load_config(argv[1], ["seed=9"]))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert capsys.readouterr().out == ""


def test_help_lists_every_key_with_documentation_type_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    keys = list(config_files.keys(PretrainConfig))
    assert len(keys) > 50
    for key in keys:
        assert len(key.doc) > 15, f"{key.name} is not documented"
        assert f"  {key.name}: {config_files.type_name(key.hint)}; " in text
    assert "optimizer.base_lr: a number; default 0.01\n      Learning rate for 256 images" in text
    assert text.endswith(describe(PretrainConfig))


def test_configurations_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(name="x").name = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig("x")  # type: ignore[misc]


# --- batch arithmetic --------------------------------------------------------------------------------------


def test_accumulation_is_derived_or_refused_with_the_mend(write):
    cfg = load_config(write(MINIMAL), ["global_batch=96", "micro_batch=8"])
    assert [accumulation(cfg, world) for world in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(ValueError, match=r"5 x 8 = 40: set global_batch=80 or 120 \("):
        accumulation(cfg, 5)
    with pytest.raises(ValueError, match=r"global_batch=192, or micro_batch=4 "):
        accumulation(cfg, 24)


def test_the_configuration_needs_no_torch():
    code = (
        "import scaletransfer.config as c, sys; c.load_config('configs/chexpert_bit50x1.yaml'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
