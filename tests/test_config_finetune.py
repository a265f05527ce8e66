"""Fine-tuning configurations: those that come along, and what the schema refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletransfer.config import FinetuneConfig, describe, load_config, to_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load_round_trip_and_begin_with_their_command(path, tmp_path):
    cfg = load_config(path, (), FinetuneConfig)
    (tmp_path / "resolved.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "resolved.yaml", (), FinetuneConfig) == cfg
    command = path.read_text().split("\n#\n")[0]
    assert command.startswith("# scaletransfer finetune --") and f"configs/finetune/{path.name}" in command


def test_the_shared_part_says_what_the_defaults_are():
    assert load_config(ROOT / "configs/finetune/parts/hyperrule.yaml", (), FinetuneConfig) == FinetuneConfig()


def test_a_resolved_configuration_reads_back(tmp_path):
    cfg = load_config([], ["seed=3", "data.resolution=[160,128]", "optimizer.lr=1e-3", "mixup=0"], FinetuneConfig)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "config.yaml", (), FinetuneConfig) == cfg


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.views=PA,AP", "views", "PA,AP"),
        ("data.views=[PA, AP Supine]", "views", ["PA", "AP Supine"]),
        ("data.views=all", "views", "all"),
        ("data.protocol=paper", "protocol", "paper"),
        ("data.valid_split=null", "valid_split", None),
        ("data.valid_split=test", "valid_split", "test"),
        (
            "data.options={valid_share: 0.1, single_label: true, folders: {train: a}, seed: 3, names: [b, c]}",
            "options",
            {"valid_share": 0.1, "single_label": True, "folders": {"train": "a"}, "seed": 3, "names": ["b", "c"]},
        ),
    ],
)
def test_what_a_source_takes_reads_back(tmp_path, override, key, value):
    cfg = load_config([], ["data.source=padchest", "data.root=x", override], FinetuneConfig)
    assert getattr(cfg.data, key) == value and type(getattr(cfg.data, key)) is type(value)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_config(tmp_path / "config.yaml", (), FinetuneConfig) == cfg


def test_every_key_is_documented():
    text = describe(FinetuneConfig)
    lines = text.splitlines()[1:]
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and not line.startswith("   ")]
    assert len(keys) > 45
    for number in keys:
        assert lines[number + 1].startswith("      "), lines[number]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must be"),
        ("examples_per_class=0", "examples_per_class must be 1 or more, or null, not 0"),
        ("mixup=-0.1", "mixup must be 0"),
        ("memory_gb=0", "memory_gb must be above 0"),
        ("data.flip=2", r"data\.flip must be a probability"),
        ("data.valid_share=1", r"data\.valid_share must be above 0 and below 1"),
        ("data.mean=255", r"data\.mean must be one number of 0 to 1"),
        ("data.source=pets", r"data\.root must be given together with data\.source"),
        ("data.protocol=paper", r"data\.protocol must be corrected without data\.source"),
        ("data.protocol=papr", r"data\.protocol must be one of corrected, paper"),
        ("data.views=PA", r"data\.views must be null without data\.source"),
        ("data.options={valid_share: 0.1}", r"data\.options must be {} without data\.source"),
        ("data.options={views: PA}", r"data\.options must be"),
        ("data.options=5", r"data\.options must be a mapping of text to any value, not 5"),
        ("data.options.single_label=true", r"data\.options is one value; write it whole"),
        ("model.from_scratch=yes please", r"model\.from_scratch must be true or false"),
        ("optimizer.momentum=1", r"optimizer\.momentum must be"),
        ("data.wokers=2", r"did you mean data\.workers"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(ValueError, match=message):
        load_config([], [override], FinetuneConfig)
