"""The paper's merges on shards of official folders: which findings, in which order, and what is unknown."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_official import ALL_VIEWS, shards, write
from helpers_run import CONFIG, build_single, write_config

from scaletransfer.index import load_index
from scaletransfer.labels import LabelPolicy
from scaletransfer.loader import Source, target_names

MERGE = ("chexpert", "mimic", "nih", "padchest")
# Written by hand from PROTOCOL: CheXpert's and MIMIC's own order, the seven of the larger merges, and all findings.
THIRTEEN = [
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
    *("Lung Lesion", "Lung Opacity", "Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
]
SEVEN = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Pneumonia", "Pneumothorax"]
NIH_ONLY = ["Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("merge")
    for name in MERGE:
        depth = ["--bit-depth", "8"] if name == "padchest" else []
        shards(name, write(name, base / "data" / name), base / "shards" / name, "--views", ALL_VIEWS, *depth)
    return base


@pytest.mark.parametrize("policy", ["paper", "corrected"])
def test_names_of_the_intersections(made, policy):
    opened = [load_index(made / "shards" / name) for name in MERGE]
    rules = LabelPolicy(name=policy)
    assert list(target_names(opened[:2], rules, "intersection", None)) == THIRTEEN
    assert list(target_names(opened[:3], rules, "intersection", None)) == SEVEN
    assert list(target_names(opened, rules, "intersection", None)) == SEVEN
    assert list(target_names(opened[::-1], rules, "intersection", None)) == SEVEN


def test_a_union_masks_what_a_set_does_not_label(made):
    opened = [load_index(made / "shards" / name) for name in MERGE]
    rules = LabelPolicy()
    names = target_names(opened[:3], rules, "union", None)
    assert sorted(names) == sorted({*THIRTEEN, *NIH_ONLY}) and len(names) == 20
    for index, own in ((opened[0], THIRTEEN), (opened[2], [*SEVEN, *NIH_ONLY])):
        source = Source(index=index, split="train", policy=rules, names=names)
        rows = np.arange(len(index.table("train")))
        values = source.targets(rows)
        alone = Source(index=index, split="train", policy=rules, names=tuple(own)).targets(rows)
        for column, name in enumerate(names):
            if name in own:
                assert np.array_equal(values[:, column], alone[:, own.index(name)], equal_nan=True)
            else:
                assert np.isnan(values[:, column]).all(), name
    assert len(target_names(opened, rules, "union", None)) == 20 + 27 - len(SEVEN) - 7 - 2  # Fracture, Support Devices


@pytest.mark.parametrize("findings", ["intersection", "union"])
def test_four_sets_train_together(made, findings):
    config = write_config(made, made / "shards" / "chexpert", CONFIG)
    options = ["data.train=null", f"data.sources=[{', '.join(MERGE)}]", f"data.shards_dir={made / 'shards'}"]
    options += [f"data.findings={findings}", "max_steps=3", "global_batch=8", "micro_batch=4", "data.workers=0"]
    trainer = build_single(config, f"name={findings}", *options)
    trainer.run()
    assert all(np.isfinite(value.numpy()).all() for value in trainer.engine.module.state_dict().values())
    seen = np.unique(trainer.train.locate(np.arange(trainer.train.order.samples_per_epoch))[0])
    assert seen.tolist() == [0, 1, 2, 3]
