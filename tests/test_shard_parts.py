"""Shards made in parts, as the tasks of a job array do: the merge gives the bytes of a build in one go, or refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_refusal import listing
from hypothesis import given
from hypothesis import strategies as st

from scaletransfer.cli import run_command
from scaletransfer.make_shards import main
from scaletransfer.shard_output import Part, parse_part
from scaletransfer.shard_parts import build_part, merge, shards_of
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import Encoding, build, plan_shards, verify
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("parts") / "CheXpert-v1.0", rows=40, valid=12)


def plan_of(root: Path, shard_size: int = 5, **options):
    return plan_shards(open_source("chexpert", root), SALT, shard_size=shard_size, **options)


@pytest.fixture(scope="module")
def plan(root):
    return plan_of(root)


@pytest.fixture(scope="module")
def whole(root, plan) -> dict[str, str]:
    """The folder of a build without parts."""
    build(plan, root.parent / "whole")
    return listing(root.parent / "whole")


def run_parts(plan, out: Path, of: int, *numbers: int) -> None:
    for number in numbers or range(of):
        build_part(plan, out, Part(number, of))


def interrupt(plan, out: Path, part: Part, after: int) -> None:
    """Stop a part in this process after `after` samples."""

    class Stop(Exception):
        pass

    done = 0

    def progress(samples: int) -> None:
        nonlocal done
        done += samples
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        build_part(plan, out, part, progress=progress)


# ---- which shards a part has


class Shards:
    """Of a plan, the names and sizes of its shards."""

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        self.sizes = sizes

    def shards(self) -> list[tuple[str, str, int, int]]:
        return [
            (split, f"{split}-{number:06d}.tar", start, min(start + size, samples))
            for split, (samples, size) in self.sizes.items()
            for number, start in enumerate(range(0, samples, size))
        ]


@given(
    sizes=st.dictionaries(
        st.sampled_from(("train", "valid", "test")), st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=1
    ),
    of=st.integers(1, 40),
)
def test_every_shard_is_in_one_part(sizes, of):
    plan = Shards(sizes)
    parts = shards_of(plan, of)
    counts = {file: end - start for _, file, start, end in plan.shards()}
    assert len(parts) == of and sorted(file for part in parts for file in part) == sorted(counts)
    loads = [sum(counts[file] for file in part) for part in parts]
    assert max(loads) - min(loads) <= max(counts.values()), "no part has more than one shard more than another"
    assert shards_of(plan, of) == parts


@pytest.mark.parametrize("text", ["4/4", "1", "1/0", "-1/4", "a/4", "1/4/2", "1.0/4", "", "/4"])
def test_part_that_is_none(text):
    with pytest.raises(ValueError, match="from 0 to N - 1"):
        parse_part(text)
    assert parse_part("0/1") == Part(0, 1) and str(parse_part("3/4")) == "3/4"


# ---- the merge equals a build in one go


@pytest.mark.parametrize(("of", "order"), [(1, (0,)), (3, (2, 0, 1)), (4, (0, 1, 2, 3)), (20, tuple(range(20)))])
def test_merged_parts_are_a_build_in_one_go(plan, whole, tmp_path, of, order):
    out = tmp_path / "out"
    for number in order:
        report = build_part(plan, out, Part(number, of))
        assert report.shards == len(shards_of(plan, of)[number]) and not report.finished
        assert not (out / "index.json").exists() and not list(out.glob("samples*"))
    assert merge(plan, out, workers=2).kept_shards == len(plan.shards())
    assert listing(out) == whole and not (out / WORK_FOLDER).exists()


def test_parts_with_workers_and_in_folders_of_their_own(plan, whole, tmp_path):
    for number in range(3):
        build_part(plan, tmp_path / f"node{number}", Part(number, 3), workers=2 if number == 0 else 1)
        shutil.copytree(tmp_path / f"node{number}", tmp_path / "out", dirs_exist_ok=True)
    merge(plan, tmp_path / "out")
    assert listing(tmp_path / "out") == whole


def test_an_interrupted_part_continues(plan, whole, tmp_path):
    out = tmp_path / "out"
    run_parts(plan, out, 2, 1)
    interrupt(plan, out, Part(0, 2), after=12)
    with pytest.raises(
        ValueError, match=r"part 0/2 lacks \d of 5 \(the first: (train|valid)-00000\d.tar\); run part 0"
    ):
        merge(plan, out)
    assert build_part(plan, out, Part(0, 2)).kept_shards == 2
    assert build_part(plan, out, Part(1, 2)).images == 0
    merge(plan, out)
    assert listing(out) == whole


def test_a_build_in_one_go_takes_over_what_parts_have_done(plan, whole, tmp_path):
    run_parts(plan, tmp_path, 3, 0)
    assert build(plan, tmp_path).kept_shards == len(shards_of(plan, 3)[0])
    assert listing(tmp_path) == whole


def test_a_finished_folder_is_left_alone(plan, root, whole, tmp_path):
    out = shutil.copytree(root.parent / "whole", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build_part(plan, out, Part(1, 3)).finished
    assert merge(plan, out).kept_shards == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match=r"finished shards made from other data .* or remove them first"):
        build_part(plan_of(root, 6), out, Part(1, 3))
    assert listing(out) == whole


# ---- what the merge refuses


def test_missing_parts_are_named(plan, tmp_path):
    with pytest.raises(ValueError, match="holds no part of a build; run the parts first"):
        merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_parts(plan, tmp_path / "out", 4, 0, 2)
    with pytest.raises(ValueError) as refused:
        merge(plan, tmp_path / "out")
    sentence = str(refused.value)
    lacking = sum(len(shards_of(plan, 4)[number]) for number in (1, 3))
    assert f"lacks {lacking} of {len(plan.shards())} shards" in sentence
    assert "part 1/4 (3 shards) has not run; part 3/4 (2 shards) has not run" in sentence
    assert "run parts 1, 3 (--part I/4) again, then --merge" in sentence
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError):
        merge(plan, tmp_path / "out")
    assert listing(tmp_path / "out") == before and not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "marker"])
def test_a_damaged_shard_of_a_part_is_named(plan, whole, tmp_path, damage):
    run_parts(plan, tmp_path, 3)
    file = sorted(shards_of(plan, 3)[1])[0]
    data = bytearray((tmp_path / file).read_bytes())
    if damage == "flipped":
        data[700] ^= 1
        (tmp_path / file).write_bytes(data)
    elif damage == "truncated":
        (tmp_path / file).write_bytes(data[:-512])
    elif damage == "gone":
        (tmp_path / file).unlink()
    else:
        (tmp_path / WORK_FOLDER / f"{file}.json").write_text("{")
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards: {file} of part 1/3 is damaged.*run part 1 \("):
        merge(plan, tmp_path)
    run_parts(plan, tmp_path, 3, 1)
    merge(plan, tmp_path)
    assert listing(tmp_path) == whole


def test_parts_of_two_numbers_overlap(plan, whole, tmp_path):
    run_parts(plan, tmp_path / "a", 4, 0)
    with pytest.raises(ValueError, match="holds part 0/4, which overlaps with part 1/3; give every part the same N"):
        build_part(plan, tmp_path / "a", Part(1, 3))
    run_parts(plan, tmp_path / "b", 3, 1)
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds part 0/4 and part 1/3, which overlap"):
        merge(plan, tmp_path / "a")
    build(plan, tmp_path / "a")  # as that sentence says
    assert listing(tmp_path / "a") == whole


def test_parts_of_other_data_or_options(plan, root, tmp_path):
    other = plan_of(root, seed=1)
    run_parts(plan, tmp_path / "a", 3, 0)
    for number in (0, 1):
        with pytest.raises(ValueError, match="holds part 0/3 of other data or with other options"):
            build_part(other, tmp_path / "a", Part(number, 3))
    with pytest.raises(ValueError, match="holds part 0/3 of other data"):
        merge(other, tmp_path / "a")
    before = listing(tmp_path / "a")
    run_parts(other, tmp_path / "b", 3, 1)
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds part 1/3 of other data or with other options"):
        merge(plan, tmp_path / "a")
    assert before.items() <= listing(tmp_path / "a").items()


def test_an_interrupted_build_of_another_plan_and_foreign_tars(plan, root, tmp_path):
    (tmp_path / "train-000000.tar").write_text("somebody's")
    with pytest.raises(ValueError, match=r"files such as train-000000\.tar"):
        build_part(plan, tmp_path, Part(0, 2))
    assert listing(tmp_path).keys() == {"train-000000.tar"}

    def stop(samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(plan_of(root, seed=1), tmp_path / "out", progress=stop)
    with pytest.raises(ValueError, match="that was interrupted"):
        build_part(plan, tmp_path / "out", Part(0, 2))


def test_only_one_process_writes_a_part(plan, whole, tmp_path):
    refused = []

    def progress(samples: int) -> None:
        if not refused:
            with pytest.raises(ValueError, match="another make_shards is writing part 0/2"):
                build_part(plan, tmp_path, Part(0, 2))
            for other in (build, merge):
                with pytest.raises(ValueError, match=r"another make_shards is writing .*; wait for it"):
                    other(plan, tmp_path)
            build_part(plan, tmp_path, Part(1, 2))
            refused.append(True)

    build_part(plan, tmp_path, Part(0, 2), progress=progress)
    assert refused
    merge(plan, tmp_path)
    assert listing(tmp_path) == whole


def test_a_part_that_fails_takes_only_its_own_away(tmp_path):
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=8, suffix=".png", mode="L")
    plan = plan_shards(open_source("image_folder", root), SALT, shard_size=2)
    deep = sorted(shards_of(plan, 2)[1])[-1]
    start = next(start for _, file, start, _ in plan.shards() if file == deep)
    image = root / plan.samples["train"][start].image
    draw_image(image, 7, mode="I;16")
    out = tmp_path / "out"
    build_part(plan, out, Part(0, 2))
    before = listing(out)
    with pytest.raises(ValueError, match="8 and of 16 bits a pixel are mixed"):
        build_part(plan, out, Part(1, 2))
    assert {name for name in listing(out) if not name.endswith(".lock")} == {
        name for name in before if not name.endswith(".lock")
    }


def test_depths_that_differ_between_parts(tmp_path):
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=2, suffix=".png", mode="L")
    plan = plan_shards(open_source("image_folder", root), SALT, shard_size=3)
    for sample in plan.samples["train"][:3]:
        draw_image(root / sample.image, 7, mode="I;16")
    run_parts(plan, tmp_path / "out", 2)
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match="mixed"):
        merge(plan, tmp_path / "out")
    assert before.items() <= listing(tmp_path / "out").items()


# ---- 16-bit images


def test_range_of_16_bit_images_is_measured_before(tmp_path, capsys, monkeypatch):
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=4, suffix=".png", mode="I;16")
    argv = ["image_folder", "--root", str(root), "--bit-depth", "8", "--shard-size", "3"]
    out = ["--out", str(tmp_path / "out")]
    for job in (["--part", "0/2"], ["--merge"]):
        assert run_command(main, [*argv, *out, *job]) == 2
        assert "--measure" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run_command(main, [*argv, "--measure"]) == 0
    found = capsys.readouterr().out.split()
    assert found == ["--pixel-max", "65535"]
    for number in range(2):
        assert run_command(main, [*argv, *out, *found, "--part", f"{number}/2"]) == 0
    assert run_command(main, [*argv, *out, *found, "--merge"]) == 0
    assert run_command(main, [*argv, "--out", str(tmp_path / "whole"), *found]) == 0
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    with pytest.raises(ValueError, match="range of all 16-bit"):
        plan = plan_shards(open_source("image_folder", root), SALT, encoding=Encoding(bit_depth=8))
        build_part(plan, tmp_path / "none", Part(0, 1))


# ---- the command


def test_the_command(root, whole, tmp_path, capsys):
    (tmp_path / "salt").write_bytes(SALT)
    argv = ["chexpert", "--root", str(root), "--salt-file", str(tmp_path / "salt"), "--shard-size", "5"]
    argv += ["--out", str(tmp_path / "out")]
    assert run_command(main, [*argv, "--part", "0/2"]) == 0
    assert "part 0/2, 5 shards; 25 images in" in capsys.readouterr().out
    assert run_command(main, [*argv, "--merge"]) == 2
    error = capsys.readouterr().err
    assert "part 1/2 (5 shards) has not run" in error and error.count("\n") == 1
    assert run_command(main, [*argv, "--part", "1/2"]) == 0
    capsys.readouterr()
    assert run_command(main, [*argv, "--merge"]) == 0
    assert "10 shards merged in" in capsys.readouterr().out
    for more in (["--part", "1/2"], ["--merge"]):
        assert run_command(main, [*argv, *more]) == 0
        assert "finished already by the same command" in capsys.readouterr().out
    assert verify(tmp_path / "out") == []
    assert {name: its for name, its in listing(tmp_path / "out").items() if name.endswith(".tar")} == {
        name: its for name, its in whole.items() if name.endswith(".tar")
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--part", "2/2"], "--part is '2/2'; give I/N, with I from 0 to N - 1"),
        (["--part", "0/2", "--merge"], "--part and --merge are different things"),
        (["--part", "0/2", "--list", "x.csv"], "--list and --part are different things"),
        (["--part", "0/2", "--overwrite"], "would remove what other parts have written"),
        (["--merge", "--overwrite"], "would remove what other parts have written"),
        (["--measure"], "--measure finds --pixel-max for --bit-depth 8"),
    ],
)
def test_wrong_options(root, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(main, ["chexpert", "--root", str(root), "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_parts_that_start_at_the_same_moment_and_one_that_is_killed(tmp_path):
    root = make_chexpert(tmp_path / "r", rows=300, valid=20, laterals=False)
    (tmp_path / "salt").write_bytes(SALT)

    def start(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "scaletransfer.make_shards", "chexpert", "--root", root, "--out", out]
        command += ["--salt-file", tmp_path / "salt", "--shard-size", "8", *more]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen([str(c) for c in command], env=environment, stdout=subprocess.DEVNULL)

    whole, out = tmp_path / "whole", tmp_path / "out"
    processes = [start(out, "--part", f"{number}/3") for number in range(3)]
    deadline = time.monotonic() + 60
    while not list((out / WORK_FOLDER).glob("*.tar.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    processes[1].kill()
    assert [process.wait(60) for process in processes][::2] == [0, 0]
    assert start(whole).wait(60) == 0
    if processes[1].returncode:  # else it had ended before
        assert start(out, "--merge").wait(60) == 2
    assert start(out, "--part", "1/3").wait(60) == 0
    assert start(out, "--merge").wait(60) == 0
    assert listing(out) == listing(whole)
