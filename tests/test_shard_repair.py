"""verify --repair: what is broken is made again byte for byte, from the data set or from what is intact, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from test_shards import hashes

from scaletransfer.cli import run_command
from scaletransfer.index import INDEX_NAME
from scaletransfer.make_shards import main as make_main
from scaletransfer.reshard import reshard
from scaletransfer.shard_repair import REPAIR_FOLDER, repair
from scaletransfer.shards import Encoding, build, plan_shards, shards_main, verify
from scaletransfer.sources import open_source


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("repair") / "CheXpert-v1.0", rows=30, valid=9)


@pytest.fixture(scope="module")
def salt(root) -> Path:
    (root.parent / "salt").write_bytes(SALT)
    return root.parent / "salt"


@pytest.fixture(scope="module")
def finished(root, salt) -> Path:
    # by the command, so that the options of the source are recorded
    out = root.parent / "finished"
    command = ["chexpert", "--root", root, "--out", out, "--salt-file", salt, "--shard-size", 6, "--seed", 3]
    assert run_command(make_main, [str(word) for word in [*command, "--views", "PA,AP", "--size", 44]]) == 0
    return out


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.engine)])
def test_every_kind_of_damage_is_mended_to_the_same_bytes(finished, folder, root, salt, workers):
    (folder / "train-000000.tar").unlink()
    flip(folder / "train-000001.tar")
    with open(folder / "train-000002.tar", "r+b") as file:
        file.truncate(3000)
    shutil.copy(finished / "train-000003.tar", folder / "valid-000000.tar")
    flip(folder / "samples-train.npy", 300)
    (folder / "samples-valid.npy").unlink()
    (folder / "wids-train.json").write_text("{}")
    (folder / "_info.json").unlink()
    (folder / "train-000004.tar.tmp").write_text("left by a build that was killed")
    (folder / "notes.txt").write_text("mine")
    made = repair(folder, root=root, salt_file=salt, workers=workers)
    assert sorted(made) == sorted(
        [f"train-00000{n}.tar" for n in range(3)]
        + ["valid-000000.tar", "samples-train.npy", "samples-valid.npy", "wids-train.json", "_info.json"]
    )
    (folder / "notes.txt").unlink()
    assert hashes(folder) == hashes(finished) and verify(folder) == []


def test_a_sound_folder_is_left_alone(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert repair(folder) == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_tables_and_side_files_need_no_data_set(finished, folder):
    for name in ("samples-train.npy", "wids-valid.json", "_info.json"):
        (folder / name).unlink()
    assert set(repair(folder)) == {"samples-train.npy", "wids-valid.json", "_info.json"}
    assert hashes(folder) == hashes(finished)


def test_shards_need_the_data_set(folder):
    (folder / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of the shards can't be used .*train-000001\.tar is missing.*--root"):
        repair(folder)


def refused(folder: Path, message: str, **options) -> None:
    (folder / "train-000001.tar").unlink()
    before = hashes(folder)
    with pytest.raises(ValueError, match=message):
        repair(folder, **options)
    assert hashes(folder) == before, "something was replaced or left behind"


def test_another_salt_is_refused(folder, root, tmp_path):
    (tmp_path / "other").write_bytes(b"another salt, at least 16 bytes.")
    refused(folder, "made with another salt", root=root, salt_file=tmp_path / "other")


def test_no_salt_is_made(folder, root, tmp_path):
    refused(folder, "is not there", root=root, salt_file=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_another_table_is_refused(folder, root, salt, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "CheXpert-v1.0"))
    lines = (other / "train.csv").read_text().splitlines()
    (other / "train.csv").write_text("\n".join(lines[:-1]) + "\n")
    refused(folder, r"its split train has 25 records, and that of the folder had 26", root=other, salt_file=salt)


def test_another_label_is_refused(folder, root, salt, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "CheXpert-v1.0"))
    text = (other / "train.csv").read_text()
    assert text.count(",1.0,") > 3
    (other / "train.csv").write_text(text.replace(",1.0,", ",0.0,", 1))
    refused(folder, r"its table \(labels, patients, views", root=other, salt_file=salt)


def test_missing_images_are_refused(folder, root, salt, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "CheXpert-v1.0"))
    image = next(r.image for r in open_source("chexpert", other) if r.split == "valid")
    (other / image).unlink()
    refused(folder, f"1 images of its split valid are missing.*{image}", root=other, salt_file=salt)


def test_changed_images_are_refused(folder, root, salt, tmp_path):
    other = Path(shutil.copytree(root, tmp_path / "CheXpert-v1.0"))
    for record in open_source("chexpert", other):
        shutil.copy(root / next(iter(open_source("chexpert", root))).image, other / record.image)
    refused(folder, r"train-000001\.tar, made again .* an image of it was changed", root=other, salt_file=salt)
    assert not (folder / REPAIR_FOLDER).exists()


def test_other_libraries_are_named(folder, root, salt):
    content = json.loads((folder / INDEX_NAME).read_text())
    content["encoder"]["version"] = "0.0.1"
    content["plan_sha256"] = "0" * 64  # the hash of a plan is one over the encoder, too
    (folder / INDEX_NAME).write_text(json.dumps(content))
    refused(folder, r"by other libraries or settings \(version '0\.0\.1', here", root=root, salt_file=salt)


def test_an_interrupted_repair_goes_on(folder, finished, root, salt):
    for number in range(3):
        (folder / f"train-00000{number}.tar").unlink()

    class Stop(Exception):
        pass

    done = 0

    def progress(samples):
        nonlocal done
        done += samples
        if done > 13:
            raise Stop

    with pytest.raises(Stop):
        repair(folder, root=root, salt_file=salt, progress=progress)
    assert not list(folder.glob("train-00000[012].tar"))
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / REPAIR_FOLDER).glob("*.tar")}
    assert len(kept) == 2
    repair(folder, root=root, salt_file=salt)
    assert hashes(folder) == hashes(finished)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


def test_what_encode_was_given_for_is_found_out(tmp_path):
    # a PNG under the name of a JPEG: kept as it is without --encode, re-encoded with it, and the index tells neither
    root = make_image_folder(tmp_path / "images", per_class=3, splits=("train",))
    first = next(iter(open_source("image_folder", root))).image
    pictures = make_image_folder(tmp_path / "pictures", per_class=1, splits=("train",), suffix=".png")
    shutil.copy(next(pictures.rglob("*.png")), root / first)
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    made = []
    for encode in ("", "jpg"):
        out = tmp_path / f"out{encode}"
        build(plan_shards(open_source("image_folder", root), SALT, encoding=Encoding(size=60, encode=encode)), out)
        before = hashes(out)
        (out / "train-000000.tar").unlink()
        repair(out, root=root, salt_file=salt)
        assert hashes(out) == before
        made.append(before["train-000000.tar"])
    assert made[0] != made[1]


def test_measured_and_given_ranges(tmp_path):
    root = make_image_folder(tmp_path / "images", suffix=".png", mode="I;16")
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    for pixel_max in (0, 65535):
        out = tmp_path / f"out{pixel_max}"
        encoding = Encoding(bit_depth=8, pixel_max=pixel_max)
        build(plan_shards(open_source("image_folder", root), SALT, encoding=encoding, shard_size=5), out)
        before = hashes(out)
        flip(out / "train-000001.tar")
        assert repair(out, root=root, salt_file=salt) == ["train-000001.tar"]
        assert hashes(out) == before


def test_numbers_of_patients_without_an_image_need_the_data_set(tmp_path):
    root = make_chexpert(tmp_path / "CheXpert-v1.0", rows=12, valid=4, laterals=False)
    salt = tmp_path / "salt"
    salt.write_bytes(SALT)
    plan = plan_shards(open_source("chexpert", root), SALT, shard_size=5)
    first = min(plan.samples["train"], key=lambda sample: sample.patient_number).patient
    for split in plan.samples.values():
        for sample in split:
            if sample.patient == first:
                (root / sample.image).write_bytes(b"")
    build(plan, tmp_path / "out")
    before = hashes(tmp_path / "out")
    (tmp_path / "out" / "samples-train.npy").unlink()
    with pytest.raises(ValueError, match=r"samples-train\.npy can't be used.*numbers are not in the shards.*--root"):
        repair(tmp_path / "out")
    assert repair(tmp_path / "out", root=root, salt_file=salt) == ["samples-train.npy"]
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize(
    "options", [{"shard_size": 4}, {"size": 30, "seed": 9}, {"splits": ["valid"], "encode": "png"}]
)
def test_a_resharded_folder_is_mended_from_the_one_it_was_cut_from(finished, root, tmp_path, options):
    reshard(finished, tmp_path / "out", **options)
    before = hashes(tmp_path / "out")
    for path in [*(tmp_path / "out").glob("valid-*.tar"), *(tmp_path / "out").glob("*.npy")]:
        flip(path, 600)
    with pytest.raises(ValueError, match="give --root, the folder of shards that it was cut from"):
        repair(tmp_path / "out")
    repair(tmp_path / "out", root=finished)
    assert hashes(tmp_path / "out") == before
    (tmp_path / "out" / "valid-000000.tar").unlink()
    build(plan_shards(open_source("chexpert", root), SALT), tmp_path / "another")
    with pytest.raises(ValueError, match="is not the folder of shards that"):
        repair(tmp_path / "out", root=tmp_path / "another")


def test_the_command(folder, finished, root, salt, capsys):
    flip(folder / "train-000001.tar")
    assert run_command(shards_main, ["verify", str(folder), "--root", str(root)]) == 2
    assert "are for --repair" in capsys.readouterr().err
    command = ["verify", folder, "--repair", "--root", root, "--salt-file", salt]
    assert run_command(shards_main, [str(word) for word in command]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{folder / 'train-000001.tar'} was made again\n{folder}: ok\n"
    assert hashes(folder) == hashes(finished)
