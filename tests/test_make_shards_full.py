"""A full disk under make_shards: one sentence, finished shards stay, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert
from test_shards import hashes

from scaletransfer.files import lack_of_space_named, write_atomically
from scaletransfer.index import INDEX_NAME
from scaletransfer.shard_writer import WORK_FOLDER

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("full") / "r", rows=600, valid=40, laterals=False)


def make(root: Path, out: Path, workers: int, size: int = 40, **options) -> subprocess.CompletedProcess[str]:
    salt = root.parent / "salt"
    salt.write_bytes(SALT)
    command = [sys.executable, "-m", "scaletransfer.make_shards", "chexpert", "--root", root, "--out", out]
    command += ["--salt-file", salt, "--workers", str(workers), "--shard-size", str(size)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


@pytest.fixture(scope="module")
def whole(root) -> Path:
    out = root.parent / "whole"
    assert make(root, out, 1).returncode == 0
    return out


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not in every container")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def after_the_error(done: subprocess.CompletedProcess[str], out: Path, whole: Path) -> list[str]:
    """What must hold of a run that found the disk full; the finished shards."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert errors[0].startswith(f"error: {out}: ") and "run the same command again" in errors[0]
    assert not (out / INDEX_NAME).exists()
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".part")]
    finished = sorted(path.name for path in out.glob("*.tar"))
    for name in finished:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    return finished


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(root, whole, small_disk, workers):
    out, ballast = small_disk / "shards", small_disk / "ballast"
    needed = sum(path.stat().st_size for path in whole.iterdir())
    assert 1_000_000 < needed < 4_000_000, "the shards do not suit the disk"
    ballast.write_bytes(bytes((4 << 20) - needed * 6 // 10))
    done = make(root, out, workers)
    finished = after_the_error(done, out, whole)
    assert "the disk is full" in done.stderr and finished
    markers = {path.name: path.stat().st_mtime_ns for path in (out / WORK_FOLDER).glob("*.tar.json")}
    assert {name.removesuffix(".json") for name in markers} <= set(finished)
    again = make(root, out, workers)  # still full: the same sentence, and nothing is lost
    assert set(after_the_error(again, out, whole)) >= set(finished)
    ballast.unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in finished if f"{name}.json" in markers}
    done = make(root, out, workers)
    assert done.returncode == 0, done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times, "finished shards were written again"
    assert hashes(out) == hashes(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_of_file_size_is_one_sentence_too(root, whole, tmp_path, workers):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    out = tmp_path / "out"
    done = make(root, out, workers, preexec_fn=limited)
    after_the_error(done, out, whole)
    assert "ulimit -f" in done.stderr
    assert make(root, out, workers).returncode == 0 and hashes(out) == hashes(whole)


def test_other_errors_pass_and_files_are_whole_or_old(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, lack_of_space_named(tmp_path):
        (tmp_path / "nothing").read_bytes()
    assert "free some" not in str(caught.value)
    write_atomically(tmp_path / "file", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="beyond the allowed size"), lack_of_space_named(tmp_path):
            write_atomically(tmp_path / "file", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"
