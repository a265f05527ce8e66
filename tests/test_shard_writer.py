"""Shards as bytes: laid out as tarfile does, the same whoever writes them, in segments or at once."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert
from hypothesis import given
from hypothesis import strategies as st
from test_shards import hashes

from scaletransfer import shard_writer
from scaletransfer.shard_plan import Sample
from scaletransfer.shard_writer import (
    MIN_SEGMENT,
    SEGMENTS,
    WORK_FOLDER,
    Segment,
    ShardTask,
    divided,
    member,
    member_bytes,
    shard_tasks,
    write_all,
    write_part,
)
from scaletransfer.shards import Encoding, build, plan_shards
from scaletransfer.sources import open_source


def tasks_of(sizes: list[int]) -> list[ShardTask]:
    """Tasks of so many samples, of which nothing exists."""
    found, row = [], 0
    for number, size in enumerate(sizes):
        samples = [
            Sample(
                key=f"x-{row + place:016x}",
                image=f"{row + place}.jpg",
                missing=False,
                patient="",
                patient_number=-1,
                view="",
                labels=0,
            )
            for place in range(size)
        ]
        found.append(
            ShardTask(
                folder=Path("nowhere"),
                file=f"train-{number:06d}.tar",
                split="train",
                first_row=row,
                root=Path("nowhere"),
                extension="jpg",
                encoding=Encoding(),
                label_kind="classes",
                samples=samples,
            )
        )
        row += size
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 9))
def test_what_is_divided_is_all_there_in_order(sizes, workers):
    tasks = tasks_of(sizes)
    work = divided(tasks, workers)
    assert [sample for piece in work for sample in piece.samples] == [s for task in tasks for s in task.samples]
    for piece in work:
        task = piece.task if isinstance(piece, Segment) else piece
        assert task.first_row == int(task.samples[0].image.removesuffix(".jpg"))
        if isinstance(piece, Segment):
            assert len(piece.samples) >= MIN_SEGMENT and 0 <= piece.number < piece.of
    whole = [piece for piece in work if isinstance(piece, ShardTask)]
    if workers == 1:
        assert work == tasks
    else:  # whole shards come first, and enough is left for the others while the last of them is written
        assert whole[: max(0, len(tasks) - workers)] == tasks[: max(0, len(tasks) - workers)]


def test_one_shard_occupies_all_workers():
    assert len(divided(tasks_of([1800]), 4)) == 4 * SEGMENTS
    pieces = divided(tasks_of([1800] * 3), 2)
    assert [len(piece.samples) for piece in pieces] == [1800] + [225] * 16  # the first while the other worker has four


@given(st.text("abcdef-0123456789", min_size=1, max_size=30), st.binary(max_size=2000))
def test_members_are_those_of_tarfile(name, data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member(name, len(data)), io.BytesIO(data))
    wanted = buffer.getvalue()
    found = member_bytes(name, data)
    assert wanted.startswith(found) and not wanted[len(found) :].strip(b"\0") and len(found) % 512 == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("writer") / "r", rows=90, valid=7, laterals=False)


def test_a_shard_in_segments_is_the_same_shard(root, tmp_path):
    """An unusable image in the middle, a shard without any usable one, and one worker more than shards."""
    plan = plan_shards(open_source("chexpert", root), SALT, shard_size=30)
    missing = {sample.key for sample in plan.samples["train"][30:60]} | {plan.samples["train"][5].key}
    samples = {
        split: [replace(sample, missing=sample.key in missing) for sample in kept]
        for split, kept in plan.samples.items()
    }
    plan = replace(plan, samples=samples)
    build(plan, tmp_path / "one", workers=1)
    build(plan, tmp_path / "three", workers=3)
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    for path in (tmp_path / "one").glob("*.tar"):
        assert path.stat().st_size % tarfile.RECORDSIZE == 0
        with tarfile.open(path) as tar:
            again = io.BytesIO()
            with tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy:
                for info in tar:
                    copy.addfile(info, tar.extractfile(info))
        assert again.getvalue() == path.read_bytes(), "not what tarfile writes"


def test_segments_of_a_killed_run_are_removed_and_those_of_others_are_not(root, tmp_path):
    out = tmp_path / "out"
    (out / WORK_FOLDER).mkdir(parents=True)
    tasks = shard_tasks(plan_shards(open_source("chexpert", root), SALT, shard_size=45), out)
    mine, other = tasks[:1], tasks[1]
    old = out / WORK_FOLDER / f"{mine[0].file}.0099.part"
    strange = out / WORK_FOLDER / f"{other.file}.0000.part"
    for path in (old, strange):
        path.write_bytes(b"old")
    results = list(write_all(mine, 2, lambda samples: None))
    assert [content["file"] for content in results] == [mine[0].file]
    assert strange.exists() and not old.exists()
    assert {path.name for path in out.iterdir()} == {mine[0].file, WORK_FOLDER}


def test_a_failed_write_leaves_no_temporary_file(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / WORK_FOLDER).mkdir(parents=True)
    tasks = shard_tasks(plan_shards(open_source("chexpert", root), SALT, shard_size=45), out)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shard_writer.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            list(write_all(tasks, 1, lambda samples: None))
    with monkeypatch.context() as patched:
        patched.setattr(shard_writer, "prepare", full)
        for work in (tasks[0], divided(tasks, 2)[0]):
            with pytest.raises(OSError, match="No space"):
                write_part(work)
    assert [path.name for path in out.rglob("*")] == [WORK_FOLDER]
