"""Validation: every image counts once, and the numbers are those of one process, whatever the number of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers_run import build_single, make_shards, reading, write_config

from scaletransfer.engine.evaluate import report, score
from scaletransfer.engine.trainer import Trainer
from scaletransfer.losses import make_loss
from scaletransfer.metrics import multilabel_report


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    base = tmp_path_factory.mktemp("evaluate")
    config = write_config(base, make_shards(base, rows=16))
    return build_single(config, "name=v", "data.workers=0")


def validate(trainer: Trainer, **settings: Any) -> dict[str, Any]:
    other = dataclasses.replace(trainer.cfg, validate=dataclasses.replace(trainer.cfg.validate, **settings))
    return dataclasses.replace(trainer, cfg=other).validate()


def test_the_report_is_that_of_the_network_on_every_image(trainer):
    """Against a plain loop over single images; batches may round differently in the last bits."""
    assert trainer.valid is not None
    trainer.engine.model.eval()
    logits, targets = [], []
    with torch.no_grad():
        for position in range(21):
            batch = trainer.valid.__getitems__([position])
            logits.append(trainer.engine.model(trainer.normalize(batch["image"])))
            targets.append(batch["target"])
    expected = multilabel_report(torch.cat(logits).numpy(), torch.cat(targets).numpy(), trainer.names)
    found = trainer.validate()
    assert found["samples"] == 21 and found["known"] == expected["known"] > 0
    assert found["mean_auroc"] == pytest.approx(expected["mean_auroc"], abs=1e-9)
    total, count = make_loss("multilabel")(torch.cat(logits).double(), torch.cat(targets))
    assert found["loss"] == pytest.approx(float(total) / int(count), rel=1e-5)


def test_the_batch_changes_nothing_but_rounding(trainer):
    expected = validate(trainer, batch=21)
    for batch in (1, 5, 8, 64):
        found = validate(trainer, batch=batch)
        assert found["samples"] == 21
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_limit_takes_the_first_samples(trainer):
    assert validate(trainer, max_samples=6)["samples"] == 6
    assert validate(trainer, max_samples=500)["samples"] == 21


def test_the_network_goes_on_training_afterwards(trainer):
    trainer.engine.model.train()
    trainer.validate()
    assert trainer.engine.model.training


def test_logits_that_are_not_finite_are_refused():
    predicted = {"logits": np.array([[np.nan], [1.0]], np.float32), "target": np.array([[1.0], [0.0]], np.float32)}
    with pytest.raises(ValueError, match=r"finite"):
        report(make_loss("multilabel"), predicted, ["a"])


def test_the_score_of_the_best_model():
    assert score("multilabel", {"mean_auroc": 0.7, "accuracy": 0.9}) == ("mean_auroc", 0.7)
    assert score("multiclass", {"mean_auroc": 0.7, "accuracy": 0.9}) == ("accuracy", 0.9)


# ---- two processes


@pytest.mark.engine
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_two_ranks_give_exactly_the_numbers_of_one(task):
    """21 and 13 images on 2 ranks of 4: the last batches are filled up, and what fills up is not counted."""
    found = reading()
    alone = found["alone"][task]
    for rank in found["ranks"]:
        assert rank[task]["report"] == alone["report"]
        np.testing.assert_array_equal(rank[task]["logits"], alone["logits"])
        assert rank[task]["positions"] == alone["positions"] == list(range(found["valid"][task]))
        assert rank[task]["report"]["samples"] == found["valid"][task]


@pytest.mark.engine
def test_each_rank_looked_at_its_share_only():
    found = reading()
    assert [rank["multilabel"]["decoded"] for rank in found["ranks"]] == [12, 10]  # 0 fills up the second one
    assert found["alone"]["multilabel"]["decoded"] == 21
