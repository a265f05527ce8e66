"""Checkpoints on one process: equal bits back, complete or not there, nothing unpickled, no loss by a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine.build import Engine, build_engine
from scaletransfer.engine.checkpoint import find_latest, open_checkpoint, pieces_by_tensor, save
from scaletransfer.engine.strategy import asked
from scaletransfer.models import initial_tensors

FACTS = {"samples_seen": 48, "label_names": ["a", "b", "c"]}


class Net(nn.Module):
    """A little of everything: 4-D, 2-D and 1-D parameters, and a buffer that is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(images)).mean((2, 3)))


def make(source=None, momentum: float = 0.9) -> Engine:
    return build_engine(
        asked(env={}, cuda=False),
        Net,
        source or (lambda skeleton: initial_tensors(skeleton, 1)),
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=momentum),
        precision="fp32",
        micro_batch=4,
        accumulation=1,
    )


def train(engine: Engine, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = engine.model(images).square().mean()
        engine.optimizer.zero_grad()
        loss.backward()
        engine.optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    engine = make()
    for step in (3, 6):
        train(engine, 3, step - 3)
        save(engine, tmp_path, step, FACTS, keep=5)
    return tmp_path


def listing(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def rewrite_manifest(folder: Path, change) -> None:
    """Change the manifest and mend its marker, as somebody would who makes a checkpoint by hand."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


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
        mine = checkpoints.momentum_of(engine.optimizer, one)
        assert mine is not None and mine.abs().max() > 0
        assert torch.equal(mine, checkpoints.momentum_of(again.optimizer, two))


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
    original = checkpoints.os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append((Path(target).name, find_latest(tmp_path)))
        original(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", watch)
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
        (("write", "rank-00000.json"), 6),
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
        write, replace = checkpoints._write, os.replace

        def killed_in_write(path: Path, text: str) -> None:
            if (what, path.name) == moment:
                path.write_text(text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, text)

        def killed_in_replace(source: Path, target: Path) -> None:
            if (what, Path(target).name) == ("rename", name):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        checkpoints._write, os.replace = killed_in_write, killed_in_replace
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
    assert sorted(path.name for path in saved.iterdir()) == ["latest", *(f"step-{n:08d}" for n in (3, 6, 9))]


# ---- damage and hostility


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit(saved, place):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(content)
    found = open_checkpoint(path.parent)
    with pytest.raises(ValueError, match="differs from what the training process saved") as caught:
        for name in found.parts:
            found.read(name)
    assert str(path) in sentence(caught)


@pytest.mark.parametrize("size", [0, 5, 400])
def test_a_truncated_file(saved, size):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    found = open_checkpoint(path.parent)
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        found.read("model.conv.weight")
    assert str(path) in sentence(caught)


def test_a_file_that_is_gone(saved):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        open_checkpoint(path.parent).read("model.conv.weight")
    sentence(caught)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(saved, tmp_path):
    planted = tmp_path / "executed"
    payload = pickle.dumps(Touch(planted))
    pickle.loads(payload)  # noqa: S301 - the trap works
    assert planted.exists()
    planted.unlink()
    folder = saved / "step-00000006"
    torch.save({"model": Touch(planted)}, tmp_path / "torch.pt")
    for content in (payload, (tmp_path / "torch.pt").read_bytes()):
        (folder / "rank-00000.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
            open_checkpoint(folder).read("model.conv.weight")
        sentence(caught)
    for name in ("manifest.json", "COMPLETE"):
        broken = Path(shutil.copytree(folder, tmp_path / f"broken-{name}"))
        (broken / name).write_bytes(payload)
        with pytest.raises(ValueError, match="damaged"):
            open_checkpoint(broken)
    assert not planted.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b", "", "..\\x\\..", 7])
def test_a_manifest_that_names_files_elsewhere(saved, name):
    folder = saved / "step-00000006"
    shutil.copy(folder / "rank-00000.safetensors", saved / "x.safetensors")
    rewrite_manifest(folder, lambda content: content["ranks"][0].update(file=name))
    with pytest.raises(ValueError, match="refused") as caught:
        open_checkpoint(folder)
    sentence(caught)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format="other"),
        lambda content: content.update(format_version=2),
        lambda content: content.pop("ranks"),
        lambda content: content.update(tensors=[]),
        lambda content: content["ranks"][0]["pieces"][0].pop("sha256"),
        lambda content: content["ranks"][0]["pieces"][0].update(stop="9"),
    ],
)
def test_a_manifest_of_another_form(saved, change):
    rewrite_manifest(saved / "step-00000006", change)
    with pytest.raises(ValueError, match="step-00000006") as caught:
        open_checkpoint(saved / "step-00000006")
    sentence(caught)


def test_a_manifest_whose_ranges_fit_but_whose_tensors_do_not(saved):
    """Shape and bytes are checked before anything is taken from the file."""
    folder = saved / "step-00000006"

    def swap(content: dict[str, Any]) -> None:
        pieces = {piece["tensor"]: piece for piece in content["ranks"][0]["pieces"]}
        content["tensors"]["model.norm.weight"] = [7]
        pieces["model.norm.weight"]["stop"] = 7

    rewrite_manifest(folder, swap)
    with pytest.raises(ValueError, match=r"model\.norm\.weight") as caught:
        open_checkpoint(folder).read("model.norm.weight")
    sentence(caught)


# ---- a full disk


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing on past `size` bytes fails with EFBIG, as it does with ENOSPC on a full disk; no privilege needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 300, 1500])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(saved, size):
    """300 bytes: inside the tensors; 1500: the tensors fit, the manifest does not."""
    before = listing(saved)
    engine = make()
    with files_no_larger_than(size), pytest.raises(OSError, match=r"rank-00000|manifest|File too large") as caught:
        save(engine, saved, 9, FACTS, keep=1)
    assert "\n" not in str(caught.value)
    after = {name: digest for name, digest in listing(saved).items() if not name.startswith(".step-")}
    assert after == before
    assert find_latest(saved) == saved / "step-00000006"
    assert (saved / "latest").read_text() == "step-00000006\n"
    save(engine, saved, 9, FACTS, keep=1)  # room again
    assert find_latest(saved) == saved / "step-00000009" and not list(saved.glob(".step-*"))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_any_failing_write_costs_nothing_that_was_saved(saved, monkeypatch, failing):
    before = listing(saved)
    original = getattr(checkpoints.os, failing)
    for nth in range(1, 4):
        calls = []

        def fail(*arguments: Any, nth: int = nth, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        monkeypatch.setattr(checkpoints.os, failing, fail)
        try:
            save(make(), saved, 9, FACTS, keep=5)
        except OSError:
            pass
        else:
            assert failing == "replace" and nth == 3  # there are two renames: the folder's and latest's
        monkeypatch.setattr(checkpoints.os, failing, original)
        shown = listing(saved)
        assert {name: shown[name] for name in before if name != "latest"} == {
            name: digest for name, digest in before.items() if name != "latest"
        }
        newest = find_latest(saved)
        assert newest is not None
        assert np.isfinite(open_checkpoint(newest).read("model.conv.weight").numpy()).all()
        named = saved / (saved / "latest").read_text().strip()
        assert open_checkpoint(named).step in (6, 9)
