"""Nothing that a data set's table says of a person is in a shard, its index or any file beside it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers_official import NAMES, shards, write
from PIL import Image, PngImagePlugin

from scaletransfer import make_shards
from scaletransfer.finetune import main as finetune
from scaletransfer.index import load_index
from scaletransfer.keys import key, load_salt
from scaletransfer.shard_reader import ShardReader, read_image
from scaletransfer.sources import open_source, source_class

PRIVATE = [name for name in NAMES if not source_class(name).public]
SHORT = 5
"""Identifiers shorter than this are found in any file by chance; they are looked for as whole words of JSON."""


def identifiers(name: str, root: Path, folder: Path) -> set[str]:
    """Everything in the listing and the tables that points at a person, an image, a day or a report."""
    table = folder / f"{name}.csv"
    views = ["--views", "all"] if name in ("chexpert", "mimic", "nih", "padchest") else []
    assert make_shards.main([name, "--root", str(root), "--list", str(table), *views]) == 0
    found: set[str] = set()
    with table.open() as stream:
        for row in csv.DictReader(stream):
            found |= {row["source_id"], row["patient"], Path(row["image"]).name, Path(row["image"]).stem}
    for path in root.rglob("*.csv*"):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as stream:
            for row in csv.DictReader(stream):
                for column, cell in row.items():
                    if re.search(r"(?i)date|report|birth|study|subject|patient", column or "") and cell:
                        found |= {cell.strip()}
    return {text for text in found if len(text) >= SHORT and not text.replace(".", "").isalpha()} | {
        text for text in found if len(text) > 12
    }


@pytest.mark.parametrize("name", PRIVATE)
def test_every_written_byte(name, tmp_path):
    root = write(name, tmp_path / "data")
    hidden = identifiers(name, root, tmp_path)
    assert len(hidden) > 10
    encode = ["--encode", "png"] if name == "covidx" else []
    out = shards(name, root, tmp_path / "shards", *encode)
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(written) > 4
    for path, data in written.items():
        for text in hidden:
            assert text.encode() not in data, f"{path.name} holds {text!r}"
    # the scan finds what it should: the listing does hold them
    listing = (tmp_path / f"{name}.csv").read_text()
    assert sum(text in listing for text in hidden) > 10


def test_what_image_files_say_of_a_person_is_taken_out(tmp_path):
    """Text of a PNG and EXIF of a JPEG: gone from private sets, kept with all other bytes in public ones."""
    root = write("nih", tmp_path / "data")
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", "Doe^Jane")
    paths = sorted(root.rglob("*.png"))
    pixels = {path: np.asarray(Image.open(path)) for path in paths}
    for path in paths:
        Image.open(path).save(path, pnginfo=text)
    index = load_index(shards("nih", root, tmp_path / "shards"))
    assert index.encoder == {"name": "original", "metadata": "removed"}
    for path in (tmp_path / "shards").iterdir():
        assert b"Doe^Jane" not in path.read_bytes()
    source = open_source("nih", root)
    salt = load_salt()
    found = {}
    for split, info in index.splits.items():
        for row, name in enumerate(index.keys(split, slice(None))):
            found[name] = np.asarray(Image.open(io.BytesIO(read_image(ShardReader(), index, split, row))))
        assert info.samples
    for record in source:
        wanted = next(values for path, values in pixels.items() if path.name == record.source_id)
        assert np.array_equal(found[key("nih", record.source_id, salt)], wanted)
    pets = write("pets", tmp_path / "pets")
    photo = next(pets.rglob("*.jpg"))
    exif = Image.Exif()
    exif[0x013B] = "Doe^Jane"
    Image.open(photo).convert("RGB").save(photo, exif=exif)
    out = shards("pets", pets, tmp_path / "public")
    assert any(photo.read_bytes() in path.read_bytes() for path in out.glob("*.tar"))


@pytest.mark.parametrize("name", ["nih", "covidx"])
def test_a_run_folder_of_fine_tuning_from_files(name, tmp_path):
    root = write(name, tmp_path / "data")
    hidden = {text for text in identifiers(name, root, tmp_path) if text not in str(root)}
    options = [f"data.source={name}", f"data.root={root}", "model.name=BiT-tiny", "model.from_scratch=true", "steps=2"]
    small = ["global_batch=4", "micro_batch=4", "data.resolution=[34,32]", "data.workers=0", "bootstrap=0"]
    finetune(["--logdir", str(tmp_path / "run"), *options, *small])
    assert json.loads((tmp_path / "run" / "result.json").read_text())
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for text in hidden:
                assert text.encode() not in data, f"{path.name} holds {text!r}"
