"""Saving in the background, on one process and with other ranks played by hand: what is waited for, what is said."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_checkpoint import FACTS, listing, make, save_3_and_6, sentence, train
from helpers_run import build_single, make_shards, write_config

from scaletransfer import pretrain
from scaletransfer.cli import run_command
from scaletransfer.engine import checkpoint as checkpoints
from scaletransfer.engine import checkpoint_copy, checkpoint_save, checkpoint_saver
from scaletransfer.engine.checkpoint import find_latest, generator_states, open_checkpoint
from scaletransfer.engine.checkpoint_save import Job, clear, hidden, hold
from scaletransfer.engine.checkpoint_saver import Saver, save

LIMIT = 60  # seconds after which a thread counts as hanging


class Gate:
    """Lets `checkpoint_save.write_tensors` through when it is opened; counts who waits and who is inside at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.inside, self.most = 0, 0
        original = checkpoint_save.write_tensors

        def write(*arguments: Any) -> str:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.reached.set()
            assert self.opened.wait(LIMIT)
            try:
                return original(*arguments)
            finally:
                self.inside -= 1

        monkeypatch.setattr(checkpoint_save, "write_tensors", write)


def values(folder: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(folder)
    return {name: found.read(name) for name in found.parts}


# ---- in the background


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Steps are done while the thread stands still, and the checkpoint is of the step after which it was begun."""
    gate = Gate(monkeypatch)
    engine = make()
    saver = Saver(engine)
    train(engine, 3)
    saver.save(tmp_path, 3, FACTS, keep=2)
    assert gate.reached.wait(LIMIT)
    train(engine, 5, 3)
    saver.check()
    assert find_latest(tmp_path) is None
    gate.opened.set()
    saver.wait()
    monkeypatch.undo()
    again = make()
    train(again, 3)
    save(again, tmp_path / "other", 3, FACTS, keep=2)
    found, expected = (values(root / "step-00000003") for root in (tmp_path, tmp_path / "other"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_never_two_at_once(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    engine = make()
    train(engine, 1)
    saver = Saver(engine)
    saver.save(tmp_path, 1, FACTS, keep=5)
    assert gate.reached.wait(LIMIT)
    threading.Timer(0.3, gate.opened.set).start()
    began = time.monotonic()
    saver.save(tmp_path, 2, FACTS, keep=5)  # waits for the first
    assert time.monotonic() - began > 0.2
    assert find_latest(tmp_path) == tmp_path / "step-00000001" or open_checkpoint(tmp_path / "step-00000002")
    saver.save(tmp_path / "best", 2, FACTS, keep=1, with_momentum=False)
    saver.wait()
    assert gate.most == 1
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001", "step-00000002"]
    assert find_latest(tmp_path / "best") == tmp_path / "best" / "step-00000002"


def test_the_copy_is_made_once_and_kept(tmp_path):
    engine = make()
    train(engine, 1)
    saver = Saver(engine)
    saver.save(tmp_path, 1, FACTS, keep=5)
    blocks = [block.data_ptr() for block in saver._staging._blocks]
    parameters = sum(p.numel() for p in engine.module.parameters())
    buffers = sum(b.numel() for b in engine.module.buffers())
    assert saver.bytes == 4 * (2 * parameters + buffers)
    for step in (2, 3):
        train(engine, 1, step - 1)
        saver.save(tmp_path, step, FACTS, keep=5)
    saver.wait()
    assert [block.data_ptr() for block in saver._staging._blocks] == blocks
    assert not torch.equal(*(values(tmp_path / f"step-0000000{n}")["model.conv.weight"] for n in (2, 3)))
    assert Saver(engine, asynchronous=False).bytes == 0


def test_a_copy_in_many_blocks(monkeypatch):
    """A tensor that does not fit into what is left of a block is cut; memory grows when momentum comes."""
    monkeypatch.setattr(checkpoint_copy, "BLOCK", 7)
    engine = make()
    staging = checkpoint_copy.Staging(torch.device("cpu"))
    for _ in range(3):
        chosen = checkpoint_copy.parts(engine, True)
        copies, ready = staging.copy(chosen)
        ready()
        for part, arrays in zip(chosen, copies, strict=True):
            assert np.array_equal(np.concatenate(arrays), part.values.float().numpy()), part.name
        assert max(len(array) for arrays in copies for array in arrays) <= 7
        assert staging.bytes >= sum(4 * len(part.values) for part in chosen)
        train(engine, 1)
    pointers = sorted(array.ctypes.data for arrays in copies for array in arrays)
    assert len(set(pointers)) == len(pointers)


def test_both_ways_write_the_same_bytes(tmp_path):
    engine = make()
    train(engine, 2)
    for name, asynchronous in (("yes", True), ("no", False)):
        torch.manual_seed(1)
        saver = Saver(engine, asynchronous=asynchronous)
        saver.save(tmp_path / name, 2, FACTS, keep=1)
        saver.wait()
    assert listing(tmp_path / "yes") == listing(tmp_path / "no")


def test_the_states_of_generators_come_back(tmp_path):
    engine = make()
    torch.manual_seed(5)
    folder = save(engine, tmp_path, 1, FACTS, keep=1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    found = open_checkpoint(folder)
    checkpoint_copy.set_generators(generator_states(found, 0, 1), torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)
    assert generator_states(found, 0, 2) == {}  # each of two ranks has other images


# ---- what goes wrong comes out in the training thread


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, *arguments: Any) -> None:
        path.write_bytes(b"what fits")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_save, "write_tensors", write)


def failed(saver: Saver) -> None:
    saver._thread.join(LIMIT)
    assert not saver._thread.is_alive()


def test_a_full_disk_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    before, said = listing(save_3_and_6(tmp_path)), []
    engine = make()
    saver = Saver(engine, say=said.append)
    full_disk(monkeypatch)
    saver.save(tmp_path, 9, FACTS, keep=1)
    failed(saver)
    assert not list(tmp_path.glob(".step-*/*")), "the run has a sentence to leave behind, which needs room"
    for call in (saver.check, saver.settle):
        with pytest.raises(
            OSError, match=r"rank-00000.safetensors cannot be written \(No space left.* before it stay"
        ) as e:
            call()
        sentence(e)
    saver.close()
    assert not said, "it is said by the error"
    assert listing(tmp_path) == before and not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("raised", [True, False])
def test_a_run_that_ends_does_not_say_that_it_goes_on(tmp_path, monkeypatch, raised: bool):
    said: list[str] = []
    saver = Saver(make(), say=said.append)
    full_disk(monkeypatch)
    saver.save(tmp_path, 9, FACTS, keep=1)
    failed(saver)
    if raised:
        with pytest.raises(OSError, match="No space left"):
            saver.check()
    saver.close()
    assert len(said) == (0 if raised else 1)
    for text in said:
        assert text.startswith("the checkpoint of step 9 was not written: ") and "goes on" not in text


def test_or_it_goes_on_and_says_so(tmp_path, monkeypatch):
    before = listing(save_3_and_6(tmp_path))
    engine, said = make(), []
    saver = Saver(engine, go_on=True, say=said.append)
    full_disk(monkeypatch)
    saver.save(tmp_path, 9, FACTS, keep=1)
    failed(saver)
    saver.check()
    saver.check()
    saver.save(tmp_path, 10, FACTS, keep=1)
    failed(saver)
    saver.check()
    assert len(said) == 2
    for step, text in zip((9, 10), said, strict=True):
        assert text.startswith(f"the checkpoint of step {step} was not written, training goes on with the ones before")
        assert "No space left on device" in text and "\n" not in text
    assert {name: digest for name, digest in listing(tmp_path).items() if ".tmp" not in name} == before
    with pytest.raises(OSError, match="No space left"):
        saver.wait()  # a run's last checkpoint must be written
    monkeypatch.undo()
    saver.save(tmp_path, 11, FACTS, keep=1)
    saver.wait()
    assert find_latest(tmp_path) == tmp_path / "step-00000011" and not list(tmp_path.glob(".step-*"))


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with pytest.raises(OSError, match="file"):
        Saver(make()).save(tmp_path / "file" / "checkpoints", 1, FACTS, keep=1)
    saver = Saver(make(), go_on=True, say=said.append)
    saver.save(tmp_path / "file" / "checkpoints", 1, FACTS, keep=1)
    assert len(said) == 1 and "step 1 was not written" in said[0]
    with pytest.raises(OSError, match="file"):
        saver.wait()


def test_a_run_that_ends_with_an_error_lets_its_save_finish(tmp_path, monkeypatch, capsys):
    gate = Gate(monkeypatch)
    saver = Saver(make())
    saver.save(tmp_path, 1, FACTS, keep=1)
    threading.Timer(0.3, gate.opened.set).start()
    saver.close()
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    assert capsys.readouterr().err == ""


# ---- the other ranks


def job(root: Path, rank: int, world: int, *, timeout: float = LIMIT, **more: Any) -> Job:
    """Rank `rank`'s part of a tensor of 10 elements, and of its momentum."""
    start, stop = (10 * r // world for r in (rank, rank + 1))
    array = np.arange(start, stop, dtype=np.float32)
    made = Job(
        root=root,
        step=7,
        token="feed",
        rank=rank,
        world=world,
        keep=2,
        names=[("model.w", start, stop), ("momentum.w", start, stop)],
        data=lambda: [[array], [array + 100]],
        generators={},
        head={"engine": "none", "world": world, "facts": FACTS},
        shapes={"model.w": [2, 5], "momentum.w": [2, 5], "momentum.v": [3]},
        timeout=timeout,
    )
    hidden(root, 7, "feed").mkdir(parents=True, exist_ok=True)
    return replace(made, **more)


def run_all(jobs: list[Job], delays: dict[int, float] | None = None) -> list[BaseException | None]:
    """Each in a thread; what each raised."""
    raised: list[BaseException | None] = [None] * len(jobs)

    def one(number: int) -> None:
        time.sleep((delays or {}).get(number, 0))
        try:
            jobs[number].run()
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return raised


@pytest.mark.parametrize("late", [0, 2])
def test_rank_0_waits_for_all(tmp_path, late):
    """Whoever is last, nothing is complete before."""
    assert run_all([job(tmp_path, rank, 3) for rank in range(3)], {late: 0.5}) == [None] * 3
    found = open_checkpoint(tmp_path / "step-00000007")
    assert found.read("model.w").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert found.read("momentum.w")[1, 4] == 109 and not found.has("momentum.v")
    for start, stop in ((0, 10), (2, 5), (3, 4), (6, 10), (5, 5)):
        assert found.read_range("model.w", start, stop).tolist() == list(range(start, stop))
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


def test_a_range_is_read_from_the_ranks_that_hold_it(tmp_path):
    """And checked there: what another rank's file holds does not matter."""
    run_all([job(tmp_path, rank, 3) for rank in range(3)])
    found = open_checkpoint(tmp_path / "step-00000007")
    path = found.folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # element 3
    path.write_bytes(content)
    assert found.read_range("model.w", 0, 3).tolist() == [0, 1, 2]
    assert found.read_range("model.w", 6, 10).tolist() == [6, 7, 8, 9]
    for start, stop in ((0, 10), (2, 4), (5, 6), (4, 10)):
        with pytest.raises(ValueError, match=r"rank-00001.*differs from what"):
            found.read_range("model.w", start, stop)


def test_reading_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK", 2)
    run_all([job(tmp_path, rank, 2) for rank in range(2)])
    found = open_checkpoint(tmp_path / "step-00000007")
    for start in range(11):
        for stop in range(start, 11):
            assert found.read_range("momentum.w", start, stop).tolist() == list(range(100 + start, 100 + stop))


def test_a_missing_rank_is_named(tmp_path):
    save_3_and_6(tmp_path)
    raised = run_all([job(tmp_path, 0, 4, timeout=0.3), job(tmp_path, 2, 4)])
    assert isinstance(raised[0], OSError) and raised[1] is None
    text = str(raised[0])
    assert "step 7 is not complete after 0.005 minutes: rank 1, 3 of 4 wrote nothing" in text
    assert "checkpoint.timeout_minutes" in text and "\n" not in text
    assert find_latest(tmp_path) == tmp_path / "step-00000006"


def test_a_rank_that_fails_is_named_and_not_waited_for(tmp_path):
    def broken() -> Any:
        raise OSError(28, "No space left on device")

    bad = job(tmp_path, 1, 2, data=broken)
    raised = run_all([job(tmp_path, 0, 2), bad])
    assert str(raised[0]).startswith("rank 1 could not write its part of the checkpoint of step 7: ")
    assert "No space left on device" in str(raised[0]) and "No space left on device" in str(raised[1])
    assert bad.told and find_latest(tmp_path) is None


def test_a_rank_that_outlived_a_killed_run_is_not_taken_for_one_of_the_new(tmp_path):
    """Its file goes to the folder of its own save, or nowhere where that is gone."""
    old = job(tmp_path, 1, 2)
    hold(tmp_path).close()
    clear(tmp_path)
    assert not old.temporary.exists()
    (raised,) = run_all([old])
    assert isinstance(raised, OSError)
    save(make(), tmp_path, 9, FACTS, keep=1)
    assert find_latest(tmp_path) == tmp_path / "step-00000009"


def test_what_another_live_process_writes_is_left_alone(tmp_path):
    """Two runs that share a folder by mistake: the second save is refused, the first one becomes complete."""
    code = (
        "import sys, pathlib; from scaletransfer.engine.checkpoint_save import hold, hidden; "
        "root = pathlib.Path(sys.argv[1]); kept = hold(root); hidden(root, 4, 'mine').mkdir(); "
        "print(1, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(OSError, match="another process saves in") as caught:
            save(make(), tmp_path, 5, FACTS, keep=1)
        sentence(caught)
        assert hidden(tmp_path, 4, "mine").is_dir()
    finally:
        other.kill()
        other.wait()
    save(make(), tmp_path, 5, FACTS, keep=1)  # the other one is dead
    assert not hidden(tmp_path, 4, "mine").exists()


def test_manifest_and_hashes_agree_with_the_files(tmp_path):
    run_all([job(tmp_path, rank, 2) for rank in range(2)])
    folder = tmp_path / "step-00000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    for rank in manifest["ranks"]:
        assert hashlib.sha256((folder / rank["file"]).read_bytes()).hexdigest() == rank["file_sha256"]


# ---- a run


def test_ranks_that_wait_for_a_save_are_alive(tmp_path, monkeypatch):
    """A save may take longer than the process group waits for a rank: those who wait say so in the meantime."""
    monkeypatch.setattr(checkpoint_saver, "BEAT", 0.02)
    gate = Gate(monkeypatch)
    ticks: list[int] = []
    saver = Saver(make(), tick=lambda: ticks.append(1))
    saver.save(tmp_path, 1, FACTS, keep=1)
    threading.Timer(0.5, gate.opened.set).start()
    saver.wait()
    assert len(ticks) >= 3 and find_latest(tmp_path) == tmp_path / "step-00000001"


SMALL = """\
seed: 3
epochs: 2
global_batch: 16
micro_batch: 16
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 16, workers: 0}
optimizer: {name: sgd, base_lr: 0.5}
schedule: {kind: cosine, warmup_epochs: 0}
checkpoint: {every_steps: 2, every_minutes: null}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: null}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    return write_config(folder, make_shards(folder, rows=64, valid=8), SMALL)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_on_a_disk_that_fills_up(config, monkeypatch, capfd, asynchronous):
    """It ends with one sentence; with room again the same command goes on from the checkpoint before."""
    name = f"full-{asynchronous}"
    arguments = ["--config", str(config), f"name={name}", f"checkpoint.asynchronous={asynchronous}"]
    root = config.parent / "runs" / name / "checkpoints"
    original = checkpoint_save.write_tensors

    def write(path: Path, *arguments: Any) -> str:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint_save, "write_tensors", write)
    assert run_command(pretrain.main, arguments) == 2
    said = [line for line in re.split(r"[\r\n]", capfd.readouterr().err) if "error" in line]
    assert len(said) == 1 and said[0].startswith("error: ") and "No space left on device" in said[0]
    assert find_latest(root) == root / "step-00000002" and (root / "latest").read_text() == "step-00000002\n"
    monkeypatch.undo()
    assert run_command(pretrain.main, arguments) == 0
    assert "(step 2) to step 8" in capfd.readouterr().out
    assert find_latest(root) == root / "step-00000008" and not list(root.glob(".step-*"))


def test_saving_now(config):
    """What a stop calls: complete when it returns, and not twice for one step."""
    trainer = build_single(config, "name=now", "checkpoint.every_steps=3")
    root = trainer.folder / "checkpoints"
    calls: list[Path | None] = []
    saved = trainer._save_due

    def at_each_step(step: int) -> bool:
        if step in (2, 4):
            trainer.save_now(step)
            trainer.save_now(step)
            calls.append(find_latest(root))
        return saved(step)

    trainer._save_due = at_each_step
    trainer.run()
    assert calls == [root / "step-00000002", root / "step-00000004"]
    kept = [f"step-0000000{step}" for step in (4, 6, 8)]
    assert sorted(path.name for path in root.glob("step-*")) == kept
