"""verify: hostile members, undecodable images, damage, keys, patients; nothing is written, run or allocated."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers_data import SALT, make_chexpert, make_image_folder
from PIL import Image
from test_shards import accept_files, hashes, members, rewrite

from scaletransfer.cli import run_command
from scaletransfer.index import INDEX_NAME, load_index
from scaletransfer.shard_scan import entries
from scaletransfer.shards import Encoding, build, plan_shards, shards_main, verify
from scaletransfer.sources import open_source
from scaletransfer.tars import Damaged

REPOSITORY = Path(__file__).parents[1]
_BIG = (1 << 30) + 512


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = make_chexpert(tmp_path_factory.mktemp("verify") / "CheXpert-v1.0", rows=30, valid=8, laterals=False)
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=7), root.parent / "finished")
    return root.parent / "finished"


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def insert(folder: Path, name: str, info: tarfile.TarInfo, data: bytes = b"", *, at: int = 2) -> int:
    """Put a member between others, as it is; the byte of its header."""
    pairs = members(folder / name)
    out = io.BytesIO()
    place = 0
    for number, (member, content) in enumerate([*pairs, (None, b"")]):
        if number == at:
            place = out.tell()
            out.write(info.tobuf(tarfile.USTAR_FORMAT if info.size < 8**11 else tarfile.GNU_FORMAT))
            out.write(data + bytes(-len(data) % 512))
        if member is not None:
            out.write(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    (folder / name).write_bytes(out.getvalue() + bytes(1024))
    accept_files(folder)
    return place


def info(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, link
    return member


class Runs:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (info("../canary"), "its name leaves the folder"),
        (info("/tmp/canary"), "its name leaves the folder"),
        (info("a\\..\\canary"), "its name leaves the folder"),
        (info("deep/er.jpg"), "its name is no plain name"),
        (info("link.jpg", tarfile.SYMTYPE, link="/etc/passwd"), "it is a symbolic link"),
        (info("hard.jpg", tarfile.LNKTYPE, link="../canary"), "it is a hard link"),
        (info("zero.jpg", tarfile.CHRTYPE), "it is a device"),
        (info("sda.jpg", tarfile.BLKTYPE), "it is a device"),
        (info("pipe.jpg", tarfile.FIFOTYPE), "it is a named pipe"),
        (info("folder", tarfile.DIRTYPE), "it is a folder"),
        (info("x", tarfile.XHDTYPE), "it is an extended header"),
        (info("g", tarfile.XGLTYPE), "it is an extended header"),
        (info("././@LongLink", tarfile.GNUTYPE_LONGNAME), "it is an extended header"),
        (info("sparse.jpg", tarfile.GNUTYPE_SPARSE), "it is a sparse file"),
        (info("odd.jpg", b"Z"), "it is no plain file"),
    ],
)
def test_hostile_members_are_named_with_their_byte(folder, member, reason):
    before = hashes(folder.parent)
    at = insert(folder, "train-000001.tar", member)
    problems = verify(folder)
    named = f"{folder / 'train-000001.tar'} at byte {at}: member {member.name!r} does not belong here: {reason}"
    assert named in problems
    after = hashes(folder.parent)
    changed = {"copy/index.json", "copy/train-000001.tar", "copy/wids-train.json"}
    assert {n for n in after if after[n] != before.get(n)} <= changed and after.keys() == before.keys()


@pytest.mark.parametrize("name", ["evil.pyd", "evil.pickle", "evil.pth", "evil.py"])
def test_planted_code_is_named_and_not_run(folder, tmp_path, name):
    canary = tmp_path / "canary"
    data = pickle.dumps(Runs(canary)) if name.endswith(("pickle", "pth")) else f"open({str(canary)!r}, 'w')".encode()
    at = insert(folder, "train-000001.tar", info(name, size=len(data)), data)
    assert f"{folder / 'train-000001.tar'} at byte {at}: unexpected member {name!r}" in verify(folder)
    assert not canary.exists()


LIMITED = """
import resource, sys
from scaletransfer.shards import verify
verify(sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(verify(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024)
"""


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [10 * 10**9, 8**11 + 5])
def test_a_claim_of_ten_gigabytes_allocates_nothing(folder, finished, kind, size):
    at = insert(folder, "train-000001.tar", info("big.jpg", kind, size=size))
    command = [sys.executable, "-c", LIMITED, folder, finished]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    problems, grown = result.stdout.splitlines()
    assert f"train-000001.tar at byte {at}: 'big.jpg' claims {size} bytes, and " in problems
    assert int(grown) < 64


def test_a_sparse_file_as_an_image_is_not_read(folder):
    """The claim is true: the file has the bytes."""
    path = folder / "train-000001.tar"
    (first, _), *_ = members(path)
    with open(path, "r+b") as file:
        first.size = _BIG
        file.write(first.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(_BIG + 10240)
    content = json.loads((folder / INDEX_NAME).read_text())
    content["splits"]["train"]["shards"][1]["bytes"] = _BIG + 10240
    (folder / INDEX_NAME).write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert any("train-000001.tar" in problem for problem in verify(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def png(mode: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def replace_image(folder: Path, data: bytes, number: int = 1) -> None:
    """Another image in the place of one, in tar, table and index: only its content can object."""
    name = "train-000001.tar"
    rewrite(folder, name, lambda pairs: [(n, data if row == 2 * number else d) for row, (n, d) in enumerate(pairs)])
    index = load_index_of(folder)
    path = folder / index["splits"]["train"]["table"]
    table = np.load(path)
    places = [entry for entry in entries(folder / name) if entry.name.endswith(".jpg")]
    rows = np.flatnonzero(table["shard"] == 1)
    table["offset"][rows], table["size"][rows] = [e.offset for e in places], [e.size for e in places]
    tar = (folder / name).read_bytes()
    table["crc"][rows] = [zlib.crc32(tar[e.offset : e.offset + e.size]) for e in places]
    np.save(path, table)
    accept_files(folder)
    accept_tables(folder)


def load_index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX_NAME).read_text())


def accept_tables(folder: Path) -> None:
    content = load_index_of(folder)
    for split in content["splits"].values():
        split["table_sha256"] = hashlib.sha256((folder / split["table"]).read_bytes()).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "reaches outside|the file is empty"),
        (lambda data: data[: len(data) // 2], "the image is truncated"),
        (lambda data: b"<html>404</html>", "not an image of a known format"),
        (lambda data: png("1", (14_000, 14_000)), "decompression bomb"),
        (lambda data: data[:60] + bytes(200) + data[260:], "cannot be"),
    ],
)
def test_what_make_shards_would_leave_out_is_named(folder, change, reason):
    data = members(folder / "train-000001.tar")[2][1]
    replace_image(folder, change(data))
    problems = "\n".join(verify(folder))
    assert re.search(reason, problems), problems
    if "outside" not in reason:
        image = r"train-000001\.tar at byte \d+: the image 'chexpert-[0-9a-f]{16}\.jpg' cannot be used"
        assert re.search(image, problems)
        assert len(problems.splitlines()) == 1
        assert verify(folder, decode=False) == []


def test_images_are_what_the_index_says(tmp_path):
    root = make_image_folder(tmp_path / "images", classes=("a",), per_class=4, splits=("train",))
    build(plan_shards(open_source("image_folder", root), SALT, encoding=Encoding(size=30)), tmp_path / "out")
    content = load_index_of(tmp_path / "out")
    for change, message in (
        ({"channels": 1}, "has colour, and index.json says grey"),
        ({"bit_depth": 16}, "has 8 bits, and index.json says 16"),
        ({"size": 20}, "has a short side above 20, which index.json excludes"),
    ):
        (tmp_path / "out" / INDEX_NAME).write_text(json.dumps({**content, "image": {**content["image"], **change}}))
        problems = verify(tmp_path / "out")
        assert len(problems) == 4 and all(message in problem for problem in problems)


def test_metadata_that_was_to_be_removed_is_named(folder):
    data = members(folder / "train-000001.tar")[2][1]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "JPEG", comment=b"Jane Doe")
    assert load_index_of(folder)["encoder"] == {"name": "original", "metadata": "removed"}
    replace_image(folder, buffer.getvalue())
    (problem,) = verify(folder)
    assert "has metadata, which index.json excludes" in problem


# ---- damage


def test_every_broken_shard_is_named_at_once(folder, finished):
    (folder / "train-000000.tar").unlink()
    with open(folder / "train-000001.tar", "r+b") as file:
        file.truncate(2000)
    shutil.copy(finished / "train-000000.tar", folder / "train-000003.tar")
    (folder / "samples-valid.npy").unlink()
    problems = "\n".join(verify(folder))
    assert "train-000000.tar is missing" in problems and "train-000001.tar is truncated: 2000 bytes" in problems
    assert "train-000003.tar" in problems and "unexpected member" in problems
    assert "samples-valid.npy cannot be read" in problems


def test_a_flipped_byte_is_found_in_a_folder_that_is_verified_in_processes(folder):
    data = bytearray((folder / "train-000002.tar").read_bytes())
    data[900] ^= 255
    (folder / "train-000002.tar").write_bytes(data)
    one, two = verify(folder), verify(folder, workers=2)
    assert one == two and f"{folder / 'train-000002.tar'}: sha256 differs" in one[0]


def test_sound_in_processes_with_progress(finished):
    done = []
    assert verify(finished, workers=2, progress=done.append) == []
    assert sum(done) == sum(split.samples for split in load_index(finished).splits.values())


def test_a_key_in_two_splits_and_twice_in_one(folder):
    content = load_index_of(folder)
    tables = {split: np.load(folder / content["splits"][split]["table"]) for split in ("train", "valid")}
    tables["valid"]["key"][0] = tables["train"]["key"][3]
    tables["train"]["key"][5] = tables["train"]["key"][4]
    for split, table in tables.items():
        np.save(folder / content["splits"][split]["table"], table)
    accept_tables(folder)
    problems = verify(folder)
    shared, twice = int(tables["train"]["key"][3]), int(tables["train"]["key"][4])
    for key, files in ((shared, ("train-000000.tar", "valid-000000.tar")), (twice, ("train-000000.tar",) * 2)):
        where = " and in ".join(f"{file} at byte \\d+" for file in files)
        assert any(re.search(f"the key chexpert-{key:016x} is in {where}$", problem) for problem in problems)


def test_a_patient_with_two_numbers(folder):
    content = load_index_of(folder)
    path = folder / content["splits"]["train"]["table"]
    table = np.load(path)
    patients, counts = np.unique(table["patient"], return_counts=True)
    row = np.flatnonzero(table["patient"] == patients[counts > 1][0])[0]
    table["patient"][row] = table["patient"].max() + 1
    np.save(path, table)
    accept_tables(folder)
    problems = "\n".join(verify(folder))
    assert "has more than one number in the tables" in problems


def test_something_behind_the_end_is_named(folder):
    with open(folder / "train-000001.tar", "ab") as file:
        file.write(b"\0" * 511 + b"x")
    accept_files(folder)
    assert any("something stands behind the end mark" in problem for problem in verify(folder))


@pytest.mark.parametrize("data", [b"", b"x" * 512, bytes(100), b"\xff" * 2048])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(Damaged, match="at byte 0"):
        list(entries(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"labels": ' + b"[" * 50_000, b"1" * 5000, b"null", b'{"patient": null}', b"\xff"]
)
def test_hostile_labels(folder, text):
    rewrite(folder, "train-000001.tar", lambda pairs: [pairs[0], (pairs[1][0], text), *pairs[2:]])
    accept_files(folder)
    assert any("does not say what the table says" in problem for problem in verify(folder, decode=False))


def test_the_command(folder, finished, capsys):
    assert run_command(shards_main, ["verify", str(finished), "--no-decode", "--workers", "2"]) == 0
    assert capsys.readouterr().out == f"{finished}: ok\n"
    (folder / "train-000001.tar").unlink()
    assert run_command(shards_main, ["verify", str(folder), str(finished)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"{folder}: 1 problem(s)", f"{finished}: ok"] and "is missing" in lines[0]


# ---- behind a URL


def test_a_folder_behind_a_url(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(finished), "/verified", recursive=True)
    try:
        assert verify("memory://verified") == []
        path = "/verified/train-000002.tar"
        data = bytearray(memory.cat_file(path))
        data[700] ^= 1
        memory.pipe_file(path, bytes(data))
        memory.rm("/verified/_info.json")
        problems = verify("memory://verified")
        assert problems[0].startswith("memory://verified/train-000002.tar: sha256 differs")
        assert problems[-1] == "memory://verified/_info.json is missing or does not fit index.json"
        memory.rm(path)
        assert run_command(shards_main, ["verify", "memory://verified"]) == 1
        assert "memory://verified/train-000002.tar is missing" in capsys.readouterr().out
        assert run_command(shards_main, ["verify", "--repair", "memory://verified"]) == 2
    finally:
        memory.rm("/verified", recursive=True)
    assert verify(f"file://{finished}") == []
