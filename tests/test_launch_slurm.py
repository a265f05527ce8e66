"""launch/slurm on a real SLURM of one controller and two nodes, which the test starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image, make_chexpert
from helpers_refusal import listing
from helpers_slurm import Slurm, running_slurm, slurm_is_missing

from scaletransfer.cli import run_command
from scaletransfer.make_shards import main
from scaletransfer.shard_parts import shards_of
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import Encoding, plan_shards
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch" / "slurm" / "make_shards.sbatch"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(slurm_is_missing()), reason=slurm_is_missing() or "SLURM is there"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images that take some time: a job can be killed in its middle."""
    root = make_chexpert(tmp_path_factory.mktemp("slurm_data") / "CheXpert-v1.0", rows=90, valid=9, laterals=False)
    for number in range(6):
        draw_image(root.parent / f"{number}.jpg", number, width=900, height=800)
    for number, record in enumerate(open_source("chexpert", root)):
        shutil.copyfile(root.parent / f"{number % 6}.jpg", root / record.image)
    (root.parent / "salt").write_bytes(SALT)
    return root


def options(root: Path, out: Path) -> list[str]:
    return [
        *("chexpert", "--root", str(root), "--salt-file", str(root.parent / "salt"), "--out", str(out)),
        *("--shard-size", "4", "--encode", "png", "--size", "700"),
    ]


@pytest.fixture(scope="module")
def whole(root) -> dict[str, str]:
    """The folder that one process makes."""
    assert run_command(main, options(root, root.parent / "whole")) == 0
    return listing(root.parent / "whole")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, root, whole) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm") / "slurm") as running:
        # the script calls `scaletransfer`: that of this checkout, with this Python
        bin_folder = running.folder / "bin"
        bin_folder.mkdir()
        command = bin_folder / "scaletransfer"
        command.write_text(
            f"#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} "
            '-c "import sys; from scaletransfer.cli import main; sys.exit(main())" "$@"\n'
        )
        command.chmod(0o755)
        running.environment["PATH"] = f"{bin_folder}{os.pathsep}{running.environment['PATH']}"
        yield running


def submit(slurm: Slurm, folder: Path, root: Path, *more: str) -> int:
    """Submit the script; the number of the array job."""
    sbatch = ["--array=0-2", "--cpus-per-task=1", "--mem-per-cpu=500M", "--time=7", *more]
    return slurm.submit(*sbatch, SCRIPT, *options(root, folder / "out"), cwd=folder)


def log(folder: Path, job: int, task: str) -> str:
    return (folder / f"make_shards-{job}_{task}.log").read_text()


def merge_of(folder: Path, array: int) -> tuple[int, str]:
    """The job that merged what the job `array` made, and what it said."""
    logs = {int(path.name.split("-")[1].split("_")[0]): path for path in folder.glob("make_shards-*_merge.log")}
    job = min(job for job in logs if job > array)
    return job, logs[job].read_text()


def half_done(root: Path, folder: Path, number: int) -> bool:
    """Whether the part of three has finished a shard; they may not be all."""
    encoding = Encoding(encode="png", size=700)
    plan = plan_shards(open_source("chexpert", root), SALT, shard_size=4, encoding=encoding)
    files = shards_of(plan, 3)[number]
    done = sum((folder / "out" / WORK_FOLDER / f"{file}.json").exists() for file in files)
    assert done < len(files), "the part ended before it could be killed: make it longer"
    return done > 0


def test_an_array_and_its_merge_are_one_build(slurm, root, whole, tmp_path):
    job = submit(slurm, tmp_path, root)
    slurm.until(lambda: not slurm.waiting())
    assert {task["JobState"] for task in slurm.tasks(job).values()} == {"COMPLETED"}, log(tmp_path, job, "0")
    merge, said = merge_of(tmp_path, job)
    assert "shards merged in" in said
    asked = ("JobState", "TimeLimit", "Partition", "MinMemoryCPU", "CPUs/Task")
    assert [slurm.tasks(merge)["0"][name] for name in asked] == ["COMPLETED", "00:07:00", "all", "500M", "1"]
    assert listing(tmp_path / "out") == whole and not (tmp_path / "out" / WORK_FOLDER).exists()


def test_a_task_that_is_queued_again_goes_on(slurm, root, whole, tmp_path):
    job = submit(slurm, tmp_path, root)
    slurm.until(lambda: half_done(root, tmp_path, 0))
    slurm.requeue(f"{job}_0")
    slurm.until(lambda: not slurm.waiting())
    tasks = slurm.tasks(job)
    assert tasks["0"]["Restarts"] == "1" and tasks["0"]["JobState"] == "COMPLETED"
    assert "of them kept from an interrupted run" in log(tmp_path, job, "0")
    assert len(list(tmp_path.glob("*_merge.log"))) == 1
    assert listing(tmp_path / "out") == whole


def test_the_merge_names_a_part_that_failed_and_that_part_can_run_alone(slurm, root, whole, tmp_path):
    job = submit(slurm, tmp_path, root)
    slurm.until(lambda: half_done(root, tmp_path, 1))
    slurm.run("scancel", f"{job}_1")
    slurm.until(lambda: not slurm.waiting())
    merge, refusal = merge_of(tmp_path, job)
    assert slurm.tasks(merge)["0"]["JobState"] == "FAILED"
    assert "error: " in refusal and "part 1/3 lacks" in refusal and "run part 1 (--part I/3) again" in refusal
    assert not (tmp_path / "out" / "index.json").exists()
    slurm.environment["PARTS"] = "3"
    try:
        again = submit(slurm, tmp_path, root, "--array=1")
    finally:
        del slurm.environment["PARTS"]
    slurm.until(lambda: not slurm.waiting())
    assert "kept from an interrupted run" in log(tmp_path, again, "1")
    assert listing(tmp_path / "out") == whole
