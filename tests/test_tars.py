"""Where files lie in tars, against the standard library's own extraction; hostile and damaged tars are refused."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletransfer import tars
from scaletransfer.tars import Damaged, members, packed_files

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def packed(files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_header(kind: bytes = tarfile.REGTYPE, name: str = "a", size: int = 0, link: str = "") -> bytes:
    """A tar of one header, by hand; a base-256 size where it is negative."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"%011o\0" % size if size >= 0 else b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(10240 - 512)


def contents(path: Path, start: int = 0, size: int | None = None) -> dict[str, bytes]:
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in members(path, start, size)}


NAMES = st.lists(st.text("abä/", min_size=1, max_size=150).map(lambda t: f"x{t.replace('/', '/y')}"), unique=True)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, kind=st.sampled_from(sorted(FORMATS)), sizes=st.lists(st.integers(0, 1500), min_size=1))
def test_the_files_are_those_that_tarfile_extracts(tmp_path_factory, names, kind, sizes):
    if kind == "ustar":
        names = [name[:90] for name in names if name.isascii()]
    files = {name: bytes([i % 251]) * sizes[i % len(sizes)] for i, name in enumerate(dict.fromkeys(names))}
    inner = packed(files, FORMATS[kind])
    path = tmp_path_factory.mktemp("t") / "a.tar"
    path.write_bytes(inner)
    with tarfile.open(path) as tar:
        assert contents(path) == {info.name: tar.extractfile(info).read() for info in tar} == files
    path = path.with_name("outer.tar")
    path.write_bytes(packed({"first": b"1" * 700, "n.tar": inner, "last": b"2"}, FORMATS[kind]))
    first, middle, last = members(path)
    assert (first.name, middle.name, last.name) == ("first", "n.tar", "last")
    assert contents(path, middle.offset, middle.size) == files


def test_old_headers_folders_and_dots(tmp_path: Path) -> None:
    path = tmp_path / "v7.tar"
    data = bytearray(packed({"./d/a.JPEG": b"abc"}))
    data[156:157], data[257:265] = b"\0", bytes(8)  # a header from before POSIX: no magic, type NUL
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    folder = with_header(tarfile.DIRTYPE, "d/")[:512]
    path.write_bytes(folder + data)
    assert contents(path) == {"d/a.JPEG": b"abc"}
    path.write_bytes(packed({}))
    assert members(path) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (packed({"a/../../b": b""}), "no plain name"),
        (packed({"/etc/x": b""}), "no plain name"),
        (packed({"a\\b": b""}), "no plain name"),
        (packed({"a\nb": b""}), "no plain name"),
        (packed({"a\udcff": b""}), "no plain name"),
        (packed({"a": b"1", "./a": b"2"}), "two files of the name a"),
        (with_header(tarfile.SYMTYPE, link="/etc/passwd"), "is a link"),
        (with_header(tarfile.LNKTYPE, link="b"), "is a link"),
        (with_header(tarfile.FIFOTYPE), "a device"),
        (with_header(tarfile.CHRTYPE), "a device"),
        (with_header(tarfile.GNUTYPE_SPARSE), "sparse file"),
        (with_header(b"?"), "is a link, a device"),
        (with_header(size=10_000), "ends inside of 'a'"),
        (with_header(size=-512), "ends inside of 'a'"),
        (with_header(tarfile.XHDTYPE, size=-512), "claims -512 bytes"),
        (with_header(tarfile.GNUTYPE_LONGNAME, size=2**33 - 1), "claims"),
        (with_header(tarfile.XGLTYPE, size=2**33 - 1), "claims"),
        (b"", "not a readable plain tar"),
        (b"no tar" * 1000, "not a readable plain tar"),
        (gzip.compress(packed({"a": b""})), "not a readable plain tar"),
        (packed({"a": b"1"})[:1024], "no end mark"),
        (with_header(tarfile.XHDTYPE)[:512] * 3000, "not a readable plain tar"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    with pytest.raises(Damaged, match=words) as error:
        members(path)
    assert "bad.tar" in str(error.value)


def test_a_tar_that_is_cut_off_or_damaged_is_never_shorter_in_silence(tmp_path: Path) -> None:
    """The standard library takes a header with a wrong sum for the end of the tar."""
    whole = packed({f"{n}.JPEG": b"x" * 600 for n in range(4)})
    path = tmp_path / "a.tar"
    end = 4 * (512 + 1024)
    for length in range(0, end + 1, 256):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            members(path)
    for at in range(0, end, 1536):
        path.write_bytes(whole[: at + 3] + b"?" + whole[at + 4 :])
        with pytest.raises(Damaged):
            members(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6 * 512), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_other_error_comes_out(tmp_path_factory, changes):
    data = bytearray(packed({"a" * 120: b"12", "b": b"3"}, tarfile.PAX_FORMAT))
    for at, value in changes:
        data[at] = value
    for head in range(0, 6 * 512, 512):  # sums that fit, so that tarfile looks at the rest
        data[head + 148 : head + 156] = b" " * 8
        data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
    path = tmp_path_factory.mktemp("t") / "a.tar"
    path.write_bytes(data)
    try:
        found = members(path)
    except Damaged:
        return
    assert all(0 <= m.offset <= m.offset + m.size <= len(data) for m in found)


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 18 GB: the images of a large tar are not read, and offsets go beyond 32 bits."""
    size, path = 9 << 30, tmp_path / "large.tar"
    read = []
    original = tars.Guarded.read
    monkeypatch.setattr(tars.Guarded, "read", lambda self, n=-1: read.append(n) or original(self, n))
    with path.open("wb") as file:
        for name in ("a.tar", "b.tar"):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, 1)
        file.truncate(file.tell() + 1024)
    start = time.process_time()
    assert [(m.name, m.offset, m.size) for m in members(path)] == [("a.tar", 512, size), ("b.tar", size + 1024, size)]
    assert time.process_time() - start < 1 and sum(read) < 8192


def test_a_tar_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed({"a": b"1"}))
    first = members(path)
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_headers", lambda *_: pytest.fail("it was read again"))
        assert members(path) == first
    path.write_bytes(packed({"a": b"1", "b": b"2"}) + bytes(10240))
    assert [m.name for m in members(path)] == ["a", "b"]
    with pytest.raises(Damaged, match="ends inside"):
        members(path, 512, 1 << 40)
    with pytest.raises(FileNotFoundError):
        members(tmp_path / "none.tar")


def test_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(packed({"d/a": b"1", "d/b": b"2" * 2000, "d/c": b"3"})))
    assert dict(packed_files(path, ("d/c", "d/a", "d/none"), 4096)) == {"d/a": b"1", "d/c": b"3"}
    with pytest.raises(Damaged, match="d/b is no plain file of a possible size"):
        dict(packed_files(path, ("d/b",), 1000))
    path.write_bytes(gzip.compress(with_header(tarfile.SYMTYPE, "d/a", link="/etc/passwd")))
    with pytest.raises(Damaged, match="d/a is no plain file"):
        dict(packed_files(path, ("d/a",), 4096))
    whole = gzip.compress(packed({"d/a": bytes(range(256)) * 40}))
    for data in (b"", b"no gzip", whole[: len(whole) // 2], whole[:60] + b"????" + whole[64:]):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"not a readable tar\.gz"):
            dict(packed_files(path, ("d/a", "d/z"), 1 << 20))
