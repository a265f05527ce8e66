"""Checkpoints on one process: equal bits back, complete or not there, nothing unpickled, no loss by a full disk."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_checkpoint import FACTS, Net, make, save_3_and_6, sentence, train

from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine import checkpoint_save
from scaletransfer.engine.checkpoint import find_latest, open_checkpoint, pieces_by_tensor
from scaletransfer.engine.checkpoint_saver import save
from scaletransfer.engine.pieces import momentum_of


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_3_and_6(tmp_path)


# ---- there and back


def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    engine = make()
    train(engine, 3)
    folder = save(engine, tmp_path, 3, FACTS, keep=1)
    expected = train(engine, 4, 3)

    found = open_checkpoint(folder)
    assert found.step == 3 and found.facts == FACTS
    again = make(lambda skeleton: checkpoints.model_values(found))
    checkpoints.load_momentum(again, found)
    assert train(again, 4, 3) == expected
    for (name, one), (_, two) in zip(
        engine.module.state_dict().items(), again.module.state_dict().items(), strict=True
    ):
        if "num_batches" in name:
            continue
        assert torch.equal(one, two), name
    for one, two in zip(engine.pieces, again.pieces, strict=True):
        mine = momentum_of(engine.optimizer, one)
        assert mine is not None and mine.abs().max() > 0
        assert torch.equal(mine, momentum_of(again.optimizer, two))


def test_without_its_momentum_it_would_not(tmp_path):
    """The comparison above can fail: weights alone give another continuation."""
    engine = make()
    train(engine, 3)
    folder = save(engine, tmp_path, 3, FACTS, keep=1, with_momentum=False)
    expected = train(engine, 4, 3)
    found = open_checkpoint(folder)
    assert not [name for name in found.parts if name.startswith("momentum.")]
    again = make(lambda skeleton: checkpoints.model_values(found))
    checkpoints.load_momentum(again, found)
    assert train(again, 4, 3) != expected


def test_what_is_stored_is_what_was_in_memory(saved):
    found = open_checkpoint(saved / "step-00000006")
    engine = make()
    train(engine, 6)
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(found.read(f"model.{name}"), tensor.float()), name
    assert {name for name in found.parts if name.startswith("momentum.")} == {
        f"momentum.{name}" for name, _ in engine.module.named_parameters()
    }
    assert found.read("model.conv.weight").shape == (5, 1, 3, 3)
    with pytest.raises(ValueError, match=r"no tensor model\.head"):
        found.read("model.head")


def test_saving_before_the_first_step_stores_no_momentum(tmp_path):
    found = open_checkpoint(save(make(), tmp_path, 0, FACTS, keep=1))
    assert all(name.startswith("model.") for name in found.parts)


def test_a_model_of_another_shape_is_refused(saved):
    found = open_checkpoint(saved / "step-00000006")
    shapes = {name: tuple(tensor.shape) for name, tensor in Net().state_dict().items()}
    checkpoints.check_same_shapes(found, shapes)
    with pytest.raises(ValueError, match=r"model\.linear\.weight has shape \[3, 5\] .* has \[14, 5\]") as caught:
        checkpoints.check_same_shapes(found, {**shapes, "linear.weight": (14, 5)})
    sentence(caught)
    with pytest.raises(ValueError, match=r"model\.extra has shape None"):
        checkpoints.check_same_shapes(found, {**shapes, "extra": (1,)})
    with pytest.raises(ValueError, match=r"model\.conv\.weight .* has None"):
        checkpoints.check_same_shapes(found, {n: s for n, s in shapes.items() if n != "conv.weight"})


# ---- ranges tile every tensor


def manifest(*ranges: tuple[int, int], size: int = 10) -> dict[str, Any]:
    pieces = [{"tensor": "model.w", "start": start, "stop": stop, "sha256": ""} for start, stop in ranges]
    ranks = [{"file": f"rank-{n:05d}.safetensors", "pieces": [piece]} for n, piece in enumerate(pieces)]
    return {"tensors": {"model.w": [2, size // 2]}, "ranks": ranks}


def test_ranges_that_tile(tmp_path):
    assert len(pieces_by_tensor(manifest((4, 10), (0, 4)), tmp_path)["model.w"]) == 2
    scalar = {"tensors": {"model.n": []}, "ranks": manifest((0, 1))["ranks"]}
    scalar["ranks"][0]["pieces"][0]["tensor"] = "model.n"
    assert pieces_by_tensor(scalar, tmp_path)["model.n"][0][:2] == (0, 1)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 4), (5, 10)], "gap or an overlap at element 4"),
        ([(0, 6), (4, 10)], "gap or an overlap at element 6"),
        ([(0, 10), (0, 10)], "gap or an overlap at element 10"),
        ([(1, 10)], "gap or an overlap at element 0"),
        ([(0, 4), (4, 9)], "ends at element 9"),
        ([(0, 12)], "ends at element 12"),
        ([], "ends at element 0"),
    ],
)
def test_ranges_that_do_not_tile(tmp_path, ranges, words):
    with pytest.raises(ValueError, match=words):
        pieces_by_tensor(manifest(*ranges), tmp_path)


def test_a_tensor_that_the_manifest_does_not_list(tmp_path):
    content = manifest((0, 10))
    content["ranks"][0]["pieces"].append({"tensor": "model.v", "start": 0, "stop": 1, "sha256": ""})
    with pytest.raises(ValueError, match=r"holds model\.v"):
        pieces_by_tensor(content, tmp_path)


def test_an_unsound_save_is_never_complete(tmp_path):
    """A rank that holds less than it should: the save fails, and what was there stays the newest."""
    engine = make()
    save(engine, tmp_path, 1, FACTS, keep=3)
    engine.pieces = engine.pieces[:-1]
    with pytest.raises(ValueError, match="ends at element 0"):
        save(engine, tmp_path, 2, FACTS, keep=3)
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


# ---- complete, or not there


@pytest.mark.parametrize("left", ["whole", "torn", "gone"])
def test_a_folder_without_marker_is_passed_over(saved, left):
    """What a kill can leave: the marker is written last."""
    folder = saved / "step-00000006"
    (folder / "COMPLETE").unlink()
    if left == "torn":
        (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-200])
    elif left == "gone":
        (folder / "manifest.json").unlink()
    assert find_latest(saved) == saved / "step-00000003"
    with pytest.raises(ValueError, match="not a complete checkpoint") as caught:
        open_checkpoint(folder)
    sentence(caught)


@pytest.mark.parametrize("left", ["torn", "changed", "gone", "empty marker"])
def test_a_marker_over_a_damaged_manifest_is_refused(saved, left):
    """What no kill can leave: going on from an earlier checkpoint without a word would hide it."""
    folder = saved / "step-00000006"
    content = (folder / "manifest.json").read_bytes()
    if left == "gone":
        (folder / "manifest.json").unlink()
    elif left == "empty marker":
        (folder / "COMPLETE").write_text("")
    else:
        changed = content[:-200] if left == "torn" else content.replace(b'"step": 6', b'"step": 7')
        assert changed != content
        (folder / "manifest.json").write_bytes(changed)
    assert find_latest(saved) == folder
    with pytest.raises(ValueError, match=r"damaged|not a complete checkpoint") as caught:
        open_checkpoint(folder)
    assert str(folder) in sentence(caught)


def test_hidden_and_strange_folders_are_passed_over(saved):
    shutil.copytree(saved / "step-00000006", saved / ".step-00000009.tmp")
    (saved / "step-00000010").mkdir()
    (saved / "step-notes.txt").write_text("mine")
    assert find_latest(saved) == saved / "step-00000006"
    assert find_latest(saved / "nothing here") is None


def test_latest_moves_last(tmp_path, monkeypatch):
    """When `latest` is renamed into place, the folder that it names is complete already; killed before, it is old."""
    engine = make()
    save(engine, tmp_path, 1, FACTS, keep=3)
    seen = []
    original = os.replace

    def watch(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path:
            seen.append((Path(target).name, find_latest(tmp_path)))
        original(source, target)

    monkeypatch.setattr(checkpoint_save.os, "replace", watch)
    save(engine, tmp_path, 2, FACTS, keep=3)
    assert seen == [("step-00000002", tmp_path / "step-00000001"), ("latest", tmp_path / "step-00000002")]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


def test_keep_counts_complete_ones(tmp_path):
    engine = make()
    for step in range(1, 8):
        save(engine, tmp_path, step, FACTS, keep=5)
        assert [found.name for found in sorted(tmp_path.glob("step-*"))] == [
            f"step-{kept:08d}" for kept in range(max(1, step - 4), step + 1)
        ]
    save(engine, tmp_path, 8, FACTS, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000007", "step-00000008"]
    assert (tmp_path / "latest").read_text() == "step-00000008\n"
    save(engine, tmp_path, 3, FACTS, keep=1)  # an older step, saved anew, is not deleted at once
    assert (tmp_path / "step-00000003" / "COMPLETE").exists()


def test_a_save_clears_what_killed_saves_left(saved):
    for left in (".step-00000008.tmp", ".step-00000009.tmp"):
        (saved / left).mkdir()
        (saved / left / "rank-00000.safetensors").write_bytes(b"half")
    save(make(), saved, 9, FACTS, keep=5)
    assert not list(saved.glob(".step-*"))
    assert find_latest(saved) == saved / "step-00000009"
    assert open_checkpoint(saved / "step-00000009").step == 9


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        (("write", ".rank-00000.json.tmp"), 6),
        (("rename", "rank-00000.json"), 6),
        (("write", "manifest.json"), 6),
        (("write", "COMPLETE"), 6),
        (("rename", "step-00000009"), 6),
        (("write", ".latest.tmp"), 9),
        (("rename", "latest"), 9),
    ],
)
def test_killed_while_saving(saved, moment, newest):
    """SIGKILL before a file is there, or with half of it written: a complete checkpoint is the newest, and is sound."""
    engine = make()
    what, name = moment
    child = os.fork()
    if child == 0:
        write, replace = checkpoint_save._write, os.replace

        def killed_in_write(path: Path, text: str) -> None:
            if (what, path.name) == moment:
                path.write_text(text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, text)

        def killed_in_replace(source: Path, target: Path) -> None:
            if (what, Path(target).name) == ("rename", name):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoint_save._write, os.replace = killed_in_write, killed_in_replace
        try:
            save(engine, saved, 9, FACTS, keep=5)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = find_latest(saved)
    assert found == saved / f"step-{newest:08d}"
    for tensor in open_checkpoint(found).parts:
        open_checkpoint(found).read(tensor)
    assert (saved / "latest").read_text() == "step-00000006\n"
    save(engine, saved, 9, FACTS, keep=5)
    assert find_latest(saved) == saved / "step-00000009"
    assert sorted(path.name for path in saved.iterdir()) == [".saving", "latest", *(f"step-{n:08d}" for n in (3, 6, 9))]
