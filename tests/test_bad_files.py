# ruff: noqa: F811  (fixtures are imported, and named again as arguments)
"""Damaged, swapped and planted files, end to end, as in test_bad_input.py: one `error:` sentence, nothing run.

Every planted payload would make a folder if anything unpickled it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_refusal import Bench, Payload, bench, launched, made, resumable, shards  # noqa: F401

from scaletransfer.cli import main as command
from scaletransfer.engine.checkpoint import folder_name
from scaletransfer.engine.checkpoint_save import prune
from scaletransfer.labels import CHEXPERT_FINDINGS
from scaletransfer.pretrain import main as pretrain

REPOSITORY = Path(__file__).parents[1]


# --- shards --------------------------------------------------------------------------------------------------


def largest(shards: Path, split: str = "train") -> Path:
    return max(shards.glob(f"{split}-*.tar"), key=lambda path: path.stat().st_size)


def test_a_truncated_tar(bench, shards):
    tar = largest(shards)
    os.truncate(tar, tar.stat().st_size - 10240)
    bench.refused(pretrain, bench.train(shards), tar.name, "truncated")
    assert command(["shards", "verify", str(shards)]) == 1


def test_a_missing_tar_and_table(bench, shards):
    tar = largest(shards)
    tar.rename(bench.folder / "away.tar")
    bench.refused(pretrain, bench.train(shards), tar.name, "missing")
    (bench.folder / "away.tar").rename(tar)
    (shards / "samples-train.npy").unlink()
    bench.refused(pretrain, bench.train(shards), "samples-train.npy", "missing")


def test_an_unfinished_folder(bench, shards):
    (shards / "index.json").unlink()
    bench.refused(pretrain, bench.train(shards), "index.json", "unfinished")


@pytest.mark.parametrize("name", ["samples-train.npy", "index.json"])
def test_a_file_of_another_data_set(bench, shards, made, name):
    shutil.copy(made["second"] / name, shards / name)
    bench.refused(pretrain, bench.train(shards), str(shards))


def test_the_shards_of_another_data_set_in_the_same_size(bench, shards, made):
    """Sizes of tars are rounded up, so they agree now and then: only the names inside tell."""
    for tar in shards.glob("train-*.tar"):
        size = tar.stat().st_size
        shutil.copy(made["second"] / tar.name, tar)
        with tar.open("ab") as file:
            file.truncate(size)
    sentence = bench.refused(pretrain, bench.train(shards), "train-00000", "another data set", unchanged=False)
    assert "make_shards" in sentence
    assert not (bench.folder / "runs" / "tiny" / "checkpoints").exists()


def test_two_shards_swapped(bench, shards):
    first, second = sorted(shards.glob("train-*.tar"))[:2]
    size = {path: path.stat().st_size for path in (first, second)}
    content = {path: path.read_bytes() for path in (first, second)}
    for path, other in ((first, second), (second, first)):
        path.write_bytes(content[other][: size[path]].ljust(size[path], b"\0"))
    bench.refused(pretrain, bench.train(shards), "train-00000", "another data set", unchanged=False)


def test_validation_on_other_classes(bench, made):
    folders = bench.train(made["pets"], f"data.valid={made['birds']}", "data.transform=natural")
    bench.refused(pretrain, [*folders, "validate.every_epochs=1"], "data.valid", "birds-shards", "pets-shards")
    mixed = bench.train(made["first"], f"data.valid={made['birds']}")
    bench.refused(pretrain, [*mixed, "validate.every_epochs=1"], "data.valid", "multiclass", "multilabel")


def test_training_on_different_kinds_or_classes(bench, made):
    both = bench.train(made["first"], f"data.train=[{made['pets']},{made['birds']}]")
    bench.refused(pretrain, both, "birds-shards", "pets-shards", "classes")
    both = bench.train(made["first"], f"data.train=[{made['first']},{made['birds']}]")
    bench.refused(pretrain, both, "data.train", "multiclass")


def test_an_index_with_another_number_of_labels(bench, shards):
    index = json.loads((shards / "index.json").read_text())
    index["label_names"].append("Hernia")
    for split in index["splits"].values():
        split["totals"]["Hernia"] = {}
    (shards / "index.json").write_text(json.dumps(index))
    bench.refused(pretrain, bench.train(shards), "samples-train.npy")


def test_an_index_that_leaves_its_folder(bench, shards):
    text = (shards / "index.json").read_text()
    (shards / "index.json").write_text(text.replace('"train-000000.tar"', '"../train-000000.tar"'))
    bench.refused(pretrain, bench.train(shards), "index.json", "../train-000000.tar")


def append_member(tar: Path, name: str, data: bytes) -> None:
    with tarfile.open(tar, "a") as file:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pyd", "evil.pth"])
def test_a_pickle_appended_to_a_tar(bench, shards, name):
    tar = largest(shards)
    size = tar.stat().st_size
    append_member(tar, name, bench.payload())
    padded = tar.stat().st_size != size
    bench._capfd.readouterr()
    assert command(["shards", "verify", str(shards)]) == 1
    shown = bench._capfd.readouterr().out
    assert tar.name in shown and (padded or name in shown)
    if padded:
        bench.refused(pretrain, bench.train(shards), tar.name, "not the file that the index describes")
    else:  # it fits into the padding: training reads by place and never looks at it
        assert pretrain(bench.train(shards)) == 0
    assert not bench.mark.exists()


def test_verify_names_a_pickle_that_changes_no_size(bench, shards):
    """Appended where the tar's padding is, with the sha256 and size of the index mended to fit."""
    tar = largest(shards)
    append_member(tar, "evil.pyd", bench.payload())
    index = json.loads((shards / "index.json").read_text())
    (entry,) = [shard for shard in index["splits"]["train"]["shards"] if shard["file"] == tar.name]
    entry |= {"bytes": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    (shards / "index.json").write_text(json.dumps(index))
    assert command(["shards", "verify", str(shards)]) == 1
    assert "evil.pyd" in bench._capfd.readouterr().out and not bench.mark.exists()
    assert pretrain(bench.train(shards)) == 0 and not bench.mark.exists()


def test_a_pickle_in_place_of_images(bench, shards):
    """Every image of the split replaced in place: the size of the tars stays."""
    for tar in shards.glob("train-*.tar"):
        data = bytearray(tar.read_bytes())
        with tarfile.open(tar) as file:
            members = [member for member in file.getmembers() if member.name.endswith(".jpg")]
        for member in members:
            data[member.offset_data : member.offset_data + member.size] = bench.payload().ljust(member.size, b".")
        tar.write_bytes(data)
    bench.refused(pretrain, bench.train(shards), "is damaged", "shards verify", unchanged=False)
    assert not (bench.folder / "runs" / "tiny" / "checkpoints").exists()
    assert command(["shards", "verify", str(shards)]) == 1 and not bench.mark.exists()


def test_a_pickle_in_place_of_a_sample_table(bench, shards):
    (shards / "samples-train.npy").write_bytes(bench.payload())
    bench.refused(pretrain, bench.train(shards), "samples-train.npy")
    np.save(shards / "samples-train.npy", np.array([Payload(bench.mark)], dtype=object), allow_pickle=True)
    digest = hashlib.sha256((shards / "samples-train.npy").read_bytes()).hexdigest()
    index = json.loads((shards / "index.json").read_text())
    index["splits"]["train"]["table_sha256"] = digest
    (shards / "index.json").write_text(json.dumps(index))
    bench.refused(pretrain, bench.train(shards), "samples-train.npy")


# --- checkpoints ---------------------------------------------------------------------------------------------


def again(bench: Bench, shards: Path, *overrides: str) -> list[str]:
    return bench.train(shards, "name=done", "max_steps=2", *overrides)


def test_resuming_on_another_data_set(bench, resumable, made):
    bench.refused(pretrain, again(bench, made["second"]), str(resumable), "data", "name=")


@pytest.mark.parametrize(
    "override",
    ["seed=4", "global_batch=8", "data.policy.name=paper", "data.image_size=40"],
)
def test_resuming_with_what_a_run_cannot_change(bench, resumable, made, override):
    bench.refused(pretrain, again(bench, made["first"], override), str(resumable), "name=")


def test_resuming_with_other_classes(bench, resumable, made):
    bench.refused(pretrain, again(bench, made["pets"], "data.transform=natural"), str(resumable), "name=")


@pytest.mark.parametrize("shape", ["pickle", "torch", "truncated", "gone", "changed"])
def test_a_rank_file_that_is_not_what_was_saved(bench, resumable, made, shape):
    path = resumable / "rank-00000.safetensors"
    data = path.read_bytes()
    if shape == "pickle":
        path.write_bytes(bench.payload())
    elif shape == "torch":
        torch.save({"model": Payload(bench.mark)}, path)
    elif shape == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif shape == "gone":
        path.unlink()
    else:
        header = int.from_bytes(data[:8], "little")
        places = json.loads(data[8 : 8 + header])
        at = 8 + header + places["model.root.conv.weight"]["data_offsets"][0]  # what an export reads too
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    bench.refused(pretrain, again(bench, made["first"]), str(path), "delete this checkpoint")
    bench.refused(command, ["export", str(resumable.parents[1]), "--to", "exported"], str(path))


def test_a_damaged_manifest(bench, resumable, made):
    path = resumable / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 7', 1))
    bench.refused(pretrain, again(bench, made["first"]), str(path), "damaged")


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "scaletransfer-checkpoint", "format_version": 1}', "\x80"])
def test_a_manifest_of_something_else(bench, resumable, made, content):
    (resumable / "manifest.json").write_text(content)
    digest = hashlib.sha256((resumable / "manifest.json").read_bytes()).hexdigest()
    (resumable / "COMPLETE").write_text(digest)
    bench.refused(pretrain, again(bench, made["first"]), str(resumable))


@pytest.mark.parametrize("name", ["model.pth.tar", "model.safetensors", "model.npz", "model.bin"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_to_start_from(bench, made, name, form):
    path = bench.folder / name
    if form == "pickle":
        path.write_bytes(bench.payload())
    else:
        torch.save({"model": {"head.conv.weight": Payload(bench.mark)}}, path)
    bench.refused(pretrain, bench.train(made["first"], f"model.init_from={path}"), str(path))


def test_starting_from_another_network(bench, made):
    torch.save({"model": {"root.conv.weight": torch.zeros(3)}}, bench.folder / "model.pth.tar")
    argv = bench.train(made["first"], "model.init_from=model.pth.tar")
    bench.refused(pretrain, argv, "model.init_from", "model.pth.tar")


def test_starting_from_a_head_of_other_labels(bench, made, resumable):
    """As many outputs, other meanings: the exported names must be those of the run."""
    exported = bench.folder / "exported"
    assert command(["export", str(resumable.parents[1]), "--to", str(exported)]) == 0
    described = json.loads((exported / "model.json").read_text())
    assert described["label_names"] == list(CHEXPERT_FINDINGS)
    described["label_names"] = described["label_names"][::-1]
    (exported / "model.json").write_text(json.dumps(described))
    start = bench.train(made["first"], f"model.init_from={exported}")
    bench.refused(pretrain, start, str(exported), "label names", "model.new_head=true")
    assert pretrain([*start, "model.new_head=true"]) == 0


def test_starting_from_another_number_of_classes(bench, made, resumable):
    exported = bench.folder / "exported"
    assert command(["export", str(resumable.parents[1]), "--to", str(exported)]) == 0
    start = bench.train(made["pets"], "data.transform=natural", f"model.init_from={exported}")
    bench.refused(pretrain, start, str(exported), "13 classes", "has 3", "model.new_head=true")


def test_exporting_what_is_not_there(bench, resumable):
    run = str(resumable.parents[1])
    bench.refused(command, ["export", "nowhere", "--to", "out"], "nowhere")
    bench.refused(command, ["export", run, "--to", "out", "--which", "77"], "77")
    bench.refused(command, ["export", run, "--to", "out", "--which", "newest"], "newest", "latest")
    bench.refused(command, ["export", run, "--to", run], run, "--to")
    bench.refused(command, ["export", run, "--to", "."], "--to")
    bench.refused(command, ["export", run, "--to", str(bench.config)], "--to", "file")


def test_the_best_model_of_an_earlier_run_does_not_outlive_a_new_one(tmp_path):
    """`export --which best` takes the last step there is: one left by an earlier run would win for ever."""
    for step in (10, 20, 100):
        (tmp_path / folder_name(step)).mkdir()
        (tmp_path / folder_name(step) / "COMPLETE").touch()
    prune(tmp_path, 2, tmp_path / folder_name(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder_name(20), folder_name(100)]
    prune(tmp_path, 1, tmp_path / folder_name(20))
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(20)]


def test_a_second_process_in_the_same_run_folder(bench, made, resumable):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    lock = resumable.parents[1] / "lock"
    other = subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(60)", str(lock)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        bench.refused(pretrain, again(bench, made["first"]), "another process trains in", "name=")
    finally:
        other.kill()
        other.wait()
    assert pretrain(again(bench, made["first"])) == 0


@pytest.mark.slow
@pytest.mark.engine
def test_a_pickle_in_a_checkpoint_of_two_ranks(bench, made, resumable):
    (resumable / "rank-00000.safetensors").write_bytes(bench.payload())
    argv = again(bench, made["first"], "micro_batch=4")
    launched(bench, str(REPOSITORY / "launch" / "ddp.yaml"), argv, "rank-00000.safetensors")
