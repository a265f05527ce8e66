"""A data set of somebody's own: one short module, no change anywhere else, and everything works with it."""

from __future__ import annotations

import csv
import inspect
import json
import textwrap

import numpy as np
import pytest
from helpers_data import draw_image, make_chexpert
from helpers_run import CONFIG, build_single, write_config

from scaletransfer import make_shards
from scaletransfer.finetune import main as finetune
from scaletransfer.index import load_index
from scaletransfer.sources import open_source

# What somebody writes for a clinic's table: image,patient,view,findings.
MODULE = '''
from scaletransfer.sources import Record, Source
from scaletransfer.sources.splits import held_out
from scaletransfer.sources.tables import Table


class Clinic(Source):
    """Chest films of a clinic: films.csv beside the images."""

    name, task, tokens = "clinic", "multilabel", True
    licence, public = "internal", False
    label_names = ("Cardiomegaly", "Effusion", "Pacemaker")

    def __init__(self, root, *, valid_share=0.3):
        super().__init__(root)
        self.table = Table(self.root / "films.csv", ("image", "patient", "view", "findings"))
        self.valid_share = valid_share

    def __iter__(self):
        for line, (image, patient, view, findings) in self.table.rows():
            yield Record(
                source_id=image,
                split="valid" if held_out(patient, self.valid_share, 0) else "train",
                patient=patient,
                image=image,
                labels=tuple(filter(None, findings.split(";"))),
                view=view,
            )
'''
OVERRIDES = ("max_steps=2", "global_batch=4", "micro_batch=4", "data.workers=0", "checkpoint.every_steps=null")


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    root = tmp_path / "clinic"
    root.mkdir()
    with (root / "films.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "patient", "view", "findings"])
        for number in range(40):
            draw_image(root / f"film{number}.png", number)
            findings = ";".join(name for bit, name in enumerate(("Effusion", "Cardiomegaly")) if number >> bit & 1)
            writer.writerow([f"film{number}.png", f"P{number // 2}", "PA", findings])
    (tmp_path / "clinic_films.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return root


def test_it_is_short():
    assert len(textwrap.dedent(MODULE).strip().splitlines()) < 40


def test_listing_shards_and_training(clinic, tmp_path):
    command = ["clinic_films:Clinic", "--root", str(clinic)]
    assert make_shards.main([*command, "--list", "list.csv"]) == 0
    with (tmp_path / "list.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert [row["Effusion"] for row in listed[:4]] == ["0", "1", "0", "1"]
    assert [row["Pacemaker"] for row in listed[:2]] == ["0", "0"]
    assert make_shards.main([*command, "--out", "films"]) == 0
    index = load_index(tmp_path / "films")
    assert (index.source, index.label_kind, set(index.splits)) == ("clinic", "tokens", {"train", "valid"})
    totals = [index.splits[split].totals["Effusion"]["positive"] for split in ("train", "valid")]
    assert sum(totals) == 20
    trainer = build_single(write_config(tmp_path, tmp_path / "films"), "name=run", *OVERRIDES)
    assert trainer.names == ("Cardiomegaly", "Effusion", "Pacemaker")
    trainer.run()
    assert all(np.isfinite(value.numpy()).all() for value in trainer.engine.module.state_dict().values())


def test_it_trains_beside_chexpert_by_name_and_weight(clinic, tmp_path):
    """Union of findings, weights by source name, and the shares that an epoch really has."""
    chexpert = make_chexpert(tmp_path / "CheXpert-v1.0", rows=24, valid=8, laterals=False)
    assert make_shards.main(["clinic_films:Clinic", "--root", str(clinic), "--out", "made/clinic"]) == 0
    assert make_shards.main(["chexpert", "--root", str(chexpert), "--out", "made/chexpert"]) == 0
    config = write_config(tmp_path, tmp_path, CONFIG)
    chosen = ["data.train=null", "data.sources={chexpert: 0.8, clinic: 0.2}", "data.shards_dir=made"]
    trainer = build_single(config, "name=both", "data.findings=union", *chosen, *OVERRIDES)
    assert len(trainer.names) == 14 and "Pacemaker" in trainer.names
    trainer.run()
    lines = (tmp_path / "runs/both/metrics.jsonl").read_text().splitlines()
    [epoch] = [row for row in map(json.loads, lines) if row.get("event") == "epoch"]
    per_epoch = trainer.train.order.samples_per_epoch
    source, _ = trainer.train.order.locate(np.arange(per_epoch))
    assert epoch["shares"] == [np.mean(source == 0), np.mean(source == 1)] and epoch["folders"][1].endswith("clinic")
    assert 0.6 < epoch["shares"][0] < 0.95
    with pytest.raises(ValueError, match=r"data\.sources must be null where data\.train is given"):
        build_single(config, "name=x", *chosen[1:], *OVERRIDES)


def test_finetune_takes_it_from_its_files(clinic, tmp_path):
    options = [
        "data.source=clinic_films:Clinic",
        f"data.root={clinic}",
        "model.name=BiT-tiny",
        "model.from_scratch=true",
    ]
    small = ["steps=2", "global_batch=4", "micro_batch=4", "data.resolution=[34,32]", "data.workers=0", "bootstrap=0"]
    finetune(["--logdir", str(tmp_path / "run"), *options, *small])
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Clinic", "can't be imported"),
        ("clinic_films:Nobody", "can't be imported"),
        ("clinic_films:held_out", "is no subclass of scaletransfer.sources.Source"),
    ],
)
def test_what_is_no_source_is_refused(clinic, name, message):
    with pytest.raises(ValueError, match=message):
        open_source(name, clinic)


def test_options_are_those_of_the_class(clinic):
    with pytest.raises(ValueError, match=r"has no option 'valid_shar' \(did you mean 'valid_share'\?\)"):
        open_source("clinic_films:Clinic", clinic, valid_shar=0.2)
    import clinic_films

    assert inspect.getdoc(clinic_films.Clinic)
