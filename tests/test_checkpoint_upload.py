"""Finished checkpoints copied to a real S3 server and found there again; what goes wrong there ends no run."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path

import pytest
from helpers_checkpoint import FACTS, listing, make, save_3_and_6, sentence, train
from helpers_run import launch_to_end, make_shards, rows, run_single, steps, write_config

from scaletransfer import pretrain, storage
from scaletransfer.cli import run_command
from scaletransfer.engine import checkpoint_upload
from scaletransfer.engine.checkpoint import find_latest, open_checkpoint
from scaletransfer.engine.checkpoint_fetch import Start, fetch, newest, place
from scaletransfer.engine.checkpoint_saver import Saver
from scaletransfer.engine.checkpoint_upload import Uploader, copy, prune
from scaletransfer.storage_settings import RemoteSettings

pytest_plugins = ("helpers_s3",)
pytestmark = pytest.mark.timeout(600)

QUICK = RemoteSettings(attempts=2, timeout=5)


@pytest.fixture(params=["s3", "file"])
def away(request, tmp_path) -> str:
    """A folder behind a URL, that is not there yet."""
    if request.param == "file":
        return f"file://{tmp_path / 'away' / 'run'}"
    server = request.getfixturevalue("s3")
    for entry in server.client.list_objects_v2(Bucket="shards").get("Contents", []):
        server.client.delete_object(Bucket="shards", Key=entry["Key"])
    return "s3://shards/checkpoints/run"


def names(url: str) -> list[str]:
    return sorted(storage.list_files(url))


def files(step: int) -> list[str]:
    return [f"step-{step:08d}/{name}" for name in ("COMPLETE", "manifest.json", "rank-00000.safetensors")]


def accept(checkpoint: object) -> None:
    """Every checkpoint fits."""


# ---- there


def test_what_is_saved_is_copied_and_pruned(tmp_path, away):
    engine, said = make(), []
    saver = Saver(engine, say=said.append, away=Uploader(away, 2))
    for step in range(1, 5):
        train(engine, 1, step - 1)
        saver.save(tmp_path / "here", step, FACTS, keep=1)
        saver.wait()
        saver.save(tmp_path / "best", step, FACTS, keep=1, with_momentum=False)  # these stay here
    saver.wait()
    assert names(away) == files(3) + files(4)
    assert said == [f"step-{step:08d} is copied to {away}" for step in range(1, 5)]
    for name in files(4):
        assert storage.read_bytes(f"{away}/{name}") == (tmp_path / "here" / name).read_bytes()


def test_the_marker_is_last_and_what_is_copied_stays_here_until_then(tmp_path, away, monkeypatch):
    """While a copy is under way, two more checkpoints are saved: the second waits, the first is passed over."""
    engine = make()
    begun, go_on = threading.Event(), threading.Event()
    original = checkpoint_upload.copy
    copied = []

    def slow(folder: Path, url: str, remote: RemoteSettings) -> None:
        begun.set()
        assert go_on.wait(60)
        original(folder, url, remote)
        copied.append(folder.name)

    monkeypatch.setattr(checkpoint_upload, "copy", slow)
    saver = Saver(engine, say=lambda text: None, away=Uploader(away, 9))
    saver.save(tmp_path, 1, FACTS, keep=1)
    saver.settle()
    assert begun.wait(60)
    for step in (2, 3):
        saver.save(tmp_path, step, FACTS, keep=1)
        saver.settle()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001", "step-00000003"]
    go_on.set()
    saver.wait()
    assert copied == ["step-00000001", "step-00000003"]
    saver.save(tmp_path, 4, FACTS, keep=1)
    saver.wait()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000004"]


def test_nobody_takes_half_a_copy_for_a_checkpoint(tmp_path, away, monkeypatch):
    save_3_and_6(tmp_path)
    copy(tmp_path / "step-00000003", f"{away}/step-00000003")
    original = storage.upload

    def broken(path: Path, url: str, remote: RemoteSettings) -> None:
        if Path(path).name == "manifest.json":
            raise ValueError("the line is dead")
        original(path, url, remote)

    monkeypatch.setattr(checkpoint_upload.storage, "upload", broken)
    with pytest.raises(ValueError, match="the line is dead"):
        copy(tmp_path / "step-00000006", f"{away}/step-00000006")
    assert f"{away}/step-00000006/COMPLETE" not in names(away)
    assert newest(away) == (3, f"{away}/step-00000003")
    monkeypatch.undo()
    copy(tmp_path / "step-00000006", f"{away}/step-00000006")
    assert newest(away) == (6, f"{away}/step-00000006")


def test_pruning_leaves_what_is_not_ours(tmp_path, away):
    save_3_and_6(tmp_path)
    for step in (1, 2, 3, 4, 5, 9):
        for name in ("COMPLETE", "manifest.json")[step in (1, 4) :]:  # 1 and 4: broken off
            storage.write_bytes(b"x", f"{away}/step-{step:08d}/{name}")
    storage.write_bytes(b"x", f"{away}/notes.txt")
    storage.write_bytes(b"x", f"{away}/step-00000001/deeper/file")
    prune(away, 2, "step-00000005")
    kept = [f"step-0000000{step}/{name}" for step in (5, 9) for name in ("COMPLETE", "manifest.json")]
    assert names(away) == sorted(["notes.txt", "step-00000001/deeper/file", *kept])


# ---- and back


def test_there_and_back_bit_for_bit(tmp_path, away):
    save_3_and_6(tmp_path / "here")
    for step in (3, 6):
        copy(tmp_path / "here" / f"step-0000000{step}", f"{away}/step-0000000{step}")
    assert newest(away) == (6, f"{away}/step-00000006")
    assert newest(f"{away}/step-00000003") == (3, f"{away}/step-00000003")
    found = fetch(f"{away}/step-00000006", tmp_path / "there", accept)
    assert found.folder == find_latest(tmp_path / "there")
    assert (tmp_path / "there" / "latest").read_text() == "step-00000006\n"
    here = {n: d for n, d in listing(tmp_path / "here" / "step-00000006").items() if not n.endswith("00000.json")}
    assert listing(tmp_path / "there" / "step-00000006") == here
    for name in found.parts:
        found.read(name)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json", "COMPLETE"])
def test_a_changed_byte_there_is_refused(tmp_path, away, name):
    save_3_and_6(tmp_path / "here")
    copy(tmp_path / "here" / "step-00000006", f"{away}/step-00000006")
    data = bytearray(storage.read_bytes(f"{away}/step-00000006/{name}"))
    data[len(data) // 2] ^= 1
    storage.write_bytes(bytes(data), f"{away}/step-00000006/{name}")
    with pytest.raises(ValueError, match=r"step-00000006.*(differs from what was|does not match)") as caught:
        fetch(f"{away}/step-00000006", tmp_path / "there", accept)
    sentence(caught)
    assert find_latest(tmp_path / "there") is None
    left = [path.name for path in (tmp_path / "there").iterdir()] if (tmp_path / "there").exists() else []
    assert left in ([], [".saving"])


def test_where_to_look():
    assert place("latest", None, "run") is None
    assert place("latest", "s3://bucket/folder/", "run") == "s3://bucket/folder/run"
    assert place("s3://other/place", "s3://bucket/folder", "run") == "s3://other/place"
    assert place("/some/where", None, "run") == "file:///some/where"


def look(root: Path, where: str, *, demanded: bool = False) -> int | None:
    start = Start(root, where, demanded, accept, QUICK)
    start.look(0, "cpu")  # type: ignore[arg-type]
    return None if start.found is None else start.found.step


def test_the_newest_of_both_places_is_taken(tmp_path, away):
    save_3_and_6(tmp_path / "here")
    root = tmp_path / "root"
    assert look(root, away) is None
    copy(tmp_path / "here" / "step-00000003", f"{away}/step-00000003")
    assert look(root, away) == 3
    shutil.copytree(tmp_path / "here" / "step-00000006", root / "step-00000006")
    assert look(root, away) == 6  # the own one is newer
    shutil.rmtree(root)
    copy(tmp_path / "here" / "step-00000006", f"{away}/step-00000006")
    assert look(root, away) == 6 and open_checkpoint(root / "step-00000006")
    assert look(tmp_path / "again", str(f"file://{tmp_path / 'here'}"), demanded=True) == 6
    with pytest.raises(ValueError, match=r"--resume .*nowhere: there is no complete checkpoint"):
        look(tmp_path / "new", f"{away}/nowhere", demanded=True)


def test_one_that_does_not_fit_is_refused_before_it_is_copied(tmp_path, away):
    save_3_and_6(tmp_path / "here")
    copy(tmp_path / "here" / "step-00000006", f"{away}/step-00000006")

    def refuse(checkpoint: object) -> None:
        raise ValueError("another seed")

    with pytest.raises(ValueError, match="another seed"):
        Start(tmp_path / "root", away, False, refuse).look(0, "cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()


# ---- a server that fails


def test_a_dead_server_is_said_and_the_next_checkpoint_is_tried(tmp_path, s3):
    engine, said = make(), []
    saver = Saver(engine, say=said.append, away=Uploader("s3://shards/dead/run", 3, QUICK))
    s3.kill()
    saver.save(tmp_path, 1, FACTS, keep=1)
    saver.wait()
    assert len(said) == 1 and "step-00000001 is not copied, training goes on" in said[0]
    assert "after 2 attempts" in said[0] and "\n" not in said[0]
    s3.start()
    storage.forget()
    saver.save(tmp_path, 2, FACTS, keep=1)
    saver.wait()
    assert said[1:] == ["step-00000002 is copied to s3://shards/dead/run"]
    assert newest("s3://shards/dead/run") == (2, "s3://shards/dead/run/step-00000002")


def test_a_busy_server_is_tried_again(tmp_path, front):
    front.faults = ["503", "500", "", "503"]
    said: list[str] = []
    saver = Saver(make(), say=said.append, away=Uploader("s3://shards/busy/run", 3, RemoteSettings(attempts=5)))
    saver.save(tmp_path, 1, FACTS, keep=1)
    saver.wait()
    assert said == ["step-00000001 is copied to s3://shards/busy/run"] and not front.faults


def test_no_server_at_the_start(tmp_path, s3, capsys):
    """A run with a checkpoint of its own says so and goes on; one without does not silently begin anew."""
    save_3_and_6(tmp_path)
    s3.kill()
    assert look(tmp_path, "s3://shards/run") == 6
    assert "looking for a newer checkpoint failed, going on from step 6" in capsys.readouterr().err
    with pytest.raises(ValueError, match="after 2 attempts"):
        look(tmp_path / "new", "s3://shards/run")
    with pytest.raises(ValueError, match="after 2 attempts"):
        look(tmp_path, "s3://shards/run", demanded=True)


# ---- a run


CONFIG = """\
seed: 3
epochs: 2
global_batch: 16
micro_batch: 8
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 16, workers: 0}
optimizer: {name: sgd, base_lr: 0.5}
schedule: {kind: cosine, warmup_epochs: 0}
checkpoint: {every_steps: 2, every_minutes: null, keep: 1}
log: {every_steps: 1, tensorboard: false}
validate: {every_epochs: null}
"""


def command(capfd: pytest.CaptureFixture[str], config: Path, *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    status = run_command(pretrain.main, ["--config", str(config), *arguments])
    return status, *capfd.readouterr()


def test_a_run_whose_folder_is_lost_goes_on_from_the_copy(tmp_path, s3, capfd):
    config = write_config(tmp_path, make_shards(tmp_path), CONFIG)
    whole = run_single(config, "name=whole")
    upload = "checkpoint.upload=s3://shards/runs"
    status, _, err = command(capfd, config, "name=lost", upload, "max_steps=4")
    assert status == 0, err
    assert newest("s3://shards/runs/lost") == (4, "s3://shards/runs/lost/step-00000004")
    shutil.rmtree(tmp_path / "runs" / "lost")
    status, out, err = command(capfd, config, "--resume", "latest", "name=lost", upload)
    assert status == 0, err
    assert "fetching s3://shards/runs/lost/step-00000004" in out and "(step 4) to step 8" in out
    assert [row["loss"] for row in _rows(tmp_path, "lost")] == [row["loss"] for row in steps(whole.folder)[4:]]
    assert newest("s3://shards/runs/lost") == (8, "s3://shards/runs/lost/step-00000008")

    status, out, err = command(capfd, config, "name=other", "--resume", "s3://shards/runs/lost/step-00000004")
    assert status == 0 and "(step 4) to step 8" in out, err
    status, out, err = command(capfd, config, "name=third", "--resume", str(tmp_path / "runs" / "other"), "seed=4")
    assert status == 2 and "was made with seed 3, but this run has 4" in err and err.count("\n") == 1
    assert not (tmp_path / "runs" / "third").exists()
    status, out, err = command(capfd, config, "name=third", "--resume", str(tmp_path / "runs" / "other"))
    assert status == 0 and "is complete: 8 of 8 steps are done" in out, err


def _rows(folder: Path, name: str) -> list[dict[str, object]]:
    return [row for row in rows(folder / "runs" / name) if "event" not in row]


@pytest.mark.engine
@pytest.mark.slow
def test_two_ranks_fetch_once(tmp_path, s3):
    config = write_config(tmp_path, make_shards(tmp_path), CONFIG)
    upload = "checkpoint.upload=s3://shards/two"
    arguments = ["--config", str(config), "name=run", upload]
    launch_to_end("zero2", [*arguments, "max_steps=4"], tmp_path)
    shutil.move(tmp_path / "runs" / "run", tmp_path / "before")
    again = launch_to_end("fsdp2", [*arguments, "--resume", "latest"], tmp_path)
    assert again.out.read_text().count("fetching s3://shards/two/run/step-00000004") == 1
    found = open_checkpoint(tmp_path / "runs" / "run" / "checkpoints" / "step-00000008")
    assert found.manifest["engine"] == "fsdp2"
    digest = hashlib.sha256((tmp_path / "before" / "checkpoints" / "step-00000004" / "manifest.json").read_bytes())
    assert digest.hexdigest() in storage.read_bytes("s3://shards/two/run/step-00000004/COMPLETE").decode()
