"""make_shards from and to URLs: a real S3 server, and file://; the same bytes as between local folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_data import SALT, draw_image, make_chexpert, make_image_folder
from helpers_s3 import BUCKET, S3Server, front, s3, s3_server  # noqa: F401 - fixtures

from scaletransfer import storage
from scaletransfer.cli import run_command
from scaletransfer.files import cache_folder
from scaletransfer.make_shards import main
from scaletransfer.shard_output import Part
from scaletransfer.shard_parts import build_part, merge
from scaletransfer.shard_remote import RemoteOutput, open_output
from scaletransfer.shard_writer import WORK_FOLDER
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_chexpert(tmp_path_factory.mktemp("remote") / "CheXpert-v1.0", rows=40, valid=12)


@pytest.fixture(scope="module")
def plan(root):
    return plan_shards(open_source("chexpert", root), SALT, shard_size=5)


@pytest.fixture(scope="module")
def whole(root, plan) -> dict[str, bytes]:
    """{name: content} of a local build."""
    build(plan, root.parent / "whole")
    return {path.name: path.read_bytes() for path in (root.parent / "whole").iterdir()}


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path) -> str:
    """An empty folder by URL."""
    if request.param == "file":
        return f"file://{tmp_path}/remote/out"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{tmp_path.name}"


def stored(url: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(url, name)) for name in storage.list_files(url)}


def arguments(root: str | Path, out: str | Path, *more: object) -> list[str]:
    salt = cache_folder() / "salt"
    salt.parent.mkdir(parents=True, exist_ok=True)
    salt.write_bytes(SALT)
    return [
        *("chexpert", "--root", str(root), "--out", str(out), "--salt-file", str(salt), "--shard-size", "5"),
        *map(str, more),
    ]


class Stop(Exception):
    pass


def interrupt(plan, out, after: int) -> None:
    """Stop a build in this process after `after` samples."""
    done = 0

    def progress(samples: int) -> None:
        nonlocal done
        done += samples
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        build(plan, out, progress=progress)


# ---- output


@pytest.mark.parametrize("workers", [1, 2])
def test_stored_shards_are_those_of_a_local_build(plan, whole, url, tmp_path, workers):
    out = RemoteOutput(url, tmp_path / "staging")
    report = build(plan, out, workers=workers)
    assert report.images == 46 and report.index.splits["train"].samples == 35
    assert stored(url) == whole, "and no marker is left"
    assert not (tmp_path / "staging").exists()


def test_the_index_is_last_and_markers_follow_their_shards(plan, url, tmp_path, monkeypatch):
    order: list[str] = []
    for name in ("upload", "write_bytes"):
        real = getattr(storage, name)

        def noted(what, place, *args, real=real, **kwargs):
            order.append(place[len(url) + 1 :])
            return real(what, place, *args, **kwargs)

        monkeypatch.setattr(storage, name, noted)
    out = RemoteOutput(url, tmp_path / "staging")
    staged: list[int] = []
    build(plan, out, progress=lambda _: staged.append(len(list(out.folder.glob("*.tar")))))
    assert order[0] == f"{WORK_FOLDER}/plan.json" and order[-1] == "index.json"
    for file in (name for name in order if name.endswith(".tar")):
        assert order.index(f"{WORK_FOLDER}/{file}.json") > order.index(file)
    assert max(staged) <= 9, "shards are removed here once they are stored"


def test_an_interrupted_build_goes_on_from_another_machine(plan, whole, url, tmp_path):
    interrupt(plan, RemoteOutput(url, tmp_path / "one"), after=23)
    names = set(storage.list_files(url))
    markers = {name for name in names if name.startswith(WORK_FOLDER) and name.endswith(".tar.json")}
    assert len(markers) >= 4 and "index.json" not in names and not any(name.endswith(".tmp") for name in names)
    report = build(plan, RemoteOutput(url, tmp_path / "other"))
    assert report.kept_shards == len(markers) and stored(url) == whole


def test_shards_that_were_made_and_not_stored_are_stored(plan, whole, url, tmp_path, monkeypatch):
    real = storage.upload

    def fail(path, place, *args):
        if place.endswith(("train-000002.tar", "train-000003.tar")):
            raise storage.StorageError(f"{place} cannot be written after 5 attempts")
        return real(path, place, *args)

    monkeypatch.setattr(storage, "upload", fail)
    out = RemoteOutput(url, tmp_path / "staging")
    with pytest.raises(ConnectionError, match=r"train-00000[23]\.tar cannot be written"):
        build(plan, out)
    monkeypatch.undo()
    assert list(out.folder.glob("train-00000[23].tar")), "what is finished stays here"
    assert "train-000000.tar" in storage.list_files(url), "and there"
    assert build(plan, out).kept_shards >= 4
    assert stored(url) == whole and not out.folder.exists()


def test_a_busy_server_is_asked_again(plan, whole, front, tmp_path):  # noqa: F811
    url = f"s3://{BUCKET}/busy"
    out = RemoteOutput(url, tmp_path / "staging")

    def progress(samples: int) -> None:
        if not front.faults:
            front.faults += ["503", "", "500", ""]

    build(plan, out, progress=progress)
    front.faults.clear()
    assert stored(url) == whole


@pytest.mark.parametrize("damage", ["short", "gone", "marker"])
def test_a_stored_shard_that_is_damaged_is_made_again(plan, whole, url, tmp_path, damage):
    interrupt(plan, RemoteOutput(url, tmp_path / "one"), after=23)
    place = storage.join(url, "train-000001.tar")
    if damage == "short":
        storage.write_bytes(storage.read_bytes(place)[:-512], place)
    elif damage == "gone":
        storage.remove(place)
    else:
        storage.write_bytes(b"{", storage.join(url, f"{WORK_FOLDER}/train-000001.tar.json"))
    build(plan, RemoteOutput(url, tmp_path / "two"))
    assert stored(url) == whole


def test_folders_in_use_are_refused_as_local_ones(plan, root, whole, url, tmp_path):
    out = RemoteOutput(url, tmp_path / "staging")
    build(plan, out)
    assert build(plan, out).images == 0 and stored(url) == whole
    other = plan_shards(open_source("chexpert", root), SALT, shard_size=9)
    with pytest.raises(ValueError, match="holds finished shards made from other data or with other options"):
        build(other, out)
    assert stored(url) == whole
    storage.write_bytes(b"mine", storage.join(url, "notes.txt"))
    storage.write_bytes(b"mine", storage.join(url, "raw/train-000000.tar"))
    build(other, out, overwrite=True)
    assert stored(url)["notes.txt"] == stored(url)["raw/train-000000.tar"] == b"mine"
    assert "train-000006.tar" not in stored(url)
    for name in storage.list_files(url):
        storage.remove(storage.join(url, name))
    interrupt(plan, out, after=12)
    with pytest.raises(ValueError, match="that was interrupted"):
        build(other, out)
    assert build(plan, out).kept_shards >= 2 and stored(url) == whole


def test_parts_and_their_merge(plan, whole, url, tmp_path):
    with pytest.raises(ValueError, match="holds no part of a build"):
        merge(plan, RemoteOutput(url, tmp_path / "m"))
    for number in range(3):
        if number == 2:
            with pytest.raises(ValueError, match=r"part 2/3 \(3 shards\) has not run; run part 2"):
                merge(plan, RemoteOutput(url, tmp_path / "m"))
        build_part(plan, RemoteOutput(url, tmp_path / f"node{number % 2}"), Part(number, 3))
    with pytest.raises(ValueError, match="overlaps with part 0/4"):
        build_part(plan, RemoteOutput(url, tmp_path / "m"), Part(0, 4))
    merge(plan, RemoteOutput(url, tmp_path / "m"))
    assert stored(url) == whole
    assert build_part(plan, RemoteOutput(url, tmp_path / "node0"), Part(0, 3)).finished


def test_wrong_options_leave_nothing(tmp_path, url):
    root = make_image_folder(tmp_path / "images", splits=("train",), per_class=4, suffix=".png", mode="L")
    plan = plan_shards(open_source("image_folder", root), SALT, shard_size=2)
    image = root / plan.samples["train"][-1].image
    draw_image(image, 7, mode="I;16")
    with pytest.raises(ValueError, match="8 and of 16 bits a pixel are mixed"):
        build(plan, RemoteOutput(url, tmp_path / "staging"))
    assert not storage.list_files(url) and not (tmp_path / "staging").exists()


def test_what_a_killed_process_left_is_removed(plan, whole, tmp_path):
    url = f"file://{tmp_path}/out"
    interrupt(plan, RemoteOutput(url, tmp_path / "staging"), after=12)
    for name in ("train-000003.tar.123.tmp", "index.json.123.tmp", f"{WORK_FOLDER}/train-000003.tar.json.123.tmp"):
        storage.write_bytes(b"half", storage.join(url, name))
    storage.write_bytes(b"mine", storage.join(url, "my.tar.123.tmp"))
    build(plan, RemoteOutput(url, tmp_path / "staging"))
    assert stored(url) == {**whole, "my.tar.123.tmp": b"mine"} and not (tmp_path / "out" / WORK_FOLDER).exists()


def test_staging_is_for_urls(root, tmp_path, capsys):
    with pytest.raises(ValueError, match="--staging is for an --out with a URL"):
        open_output(tmp_path / "out", tmp_path)
    assert run_command(main, arguments(root, tmp_path / "out", "--staging", tmp_path / "s")) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- input as well


def test_from_s3_to_s3_as_between_folders(root, s3, tmp_path, capsys):  # noqa: F811
    source = s3.put_tree(root, "CheXpert-v1.0")
    assert run_command(main, arguments(root, tmp_path / "local")) == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    out = f"s3://{BUCKET}/shards/chexpert"
    assert run_command(main, arguments(source, out, "--workers", 2)) == 0
    captured = capsys.readouterr()
    assert "52 images stay there; 2 other files are copied to" in captured.err
    assert stored(out) == local
    assert run_command(main, arguments(source, out)) == 0
    captured = capsys.readouterr()
    assert "finished already by the same command" in captured.out and "bytes of them now" not in captured.err


# ---- killed and continued, with processes of their own


def start(argv: list[str], server: S3Server, cache: Path) -> subprocess.Popen:
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "scaletransfer.make_shards", *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.engine
def test_killed_in_the_middle_and_continued_elsewhere(s3, tmp_path):  # noqa: F811
    root = make_chexpert(tmp_path / "r", rows=400, valid=10, laterals=False)
    source, out = s3.put_tree(root, "kill/in"), f"s3://{BUCKET}/kill/out"
    assert run_command(main, arguments(root, tmp_path / "whole")) == 0
    process = start(arguments(source, out, "--workers", 2), s3, tmp_path / "one")
    deadline = time.monotonic() + 60
    work = storage.join(out, WORK_FOLDER)
    while sum(name.endswith(".tar.json") for name in storage.sizes(work)) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "the build ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    names = storage.list_files(out)
    kept = sum(name.endswith(".tar.json") for name in names)
    assert "index.json" not in names and 3 <= kept < 82, "the build ended before it could be killed"
    time.sleep(0.5)  # workers notice that their parent is gone
    process = start(arguments(source, out, "--workers", 2), s3, tmp_path / "two")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert stored(out) == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert not list((tmp_path / "two").rglob("*.tar"))


def test_a_server_that_dies_is_one_sentence(root, s3, tmp_path):  # noqa: F811
    out = f"s3://{BUCKET}/dies"
    code = (
        "import sys\nfrom scaletransfer import storage\nfrom scaletransfer.cli import run_command\n"
        "storage._FIRST_PAUSE = 0.01\nfrom scaletransfer.make_shards import main\nsys.exit(run_command(main))"
    )
    environment = {**os.environ, **s3.environment, "PYTHONPATH": str(REPOSITORY)}
    environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"  # nobody listens there
    command = [sys.executable, "-c", code, *arguments(root, out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert f"{out}" in done.stderr and "AWS_ENDPOINT_URL" in done.stderr
