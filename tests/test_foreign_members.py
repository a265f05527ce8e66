"""Whose member is this: names as webdataset reads them, and headers of every form of tar."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from scaletransfer.foreign_members import KEYS_OF, Naming, OtherMember, naming_secret, read_member, split_name

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMING = Naming(naming_secret(b"a salt"), KEYS_OF[0], frozenset({"jpg"}))
PARTS = st.text("aB.é_- ", min_size=1, max_size=8)


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_names_are_split_as_webdataset_does(name):
    """But for hidden files, of which it makes samples named after their folder, and for "./"."""
    parts = name.split("/")
    assume(not any(part in (".", "..") for part in parts) and not parts[-1].startswith("."))
    assume(not (len(parts[0]) > 3 and parts[0].startswith("__") and parts[0].endswith("__")))
    stem, extension = base_plus_ext(name)
    assert split_name(name) == (None if stem is None else (stem, extension.lower()))
    assert split_name(f"./{name}") == split_name(name)


@pytest.mark.parametrize("name", ["a", "a.b/c", ".a.jpg", "f/.jpg", "__x__/a.jpg", "__x__"])
def test_what_belongs_to_no_sample(name):
    assert split_name(name) is None


def tar_of(name: str, data: bytes, form: int, **fields: object) -> tuple[bytes, int]:
    """A tar of some member, then this one; its bytes and where the data are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for each, content in (("first.jpg", b"0" * 700), (name, data)):
            info = tarfile.TarInfo(each)
            info.size = len(content)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
        end = tar.fileobj.tell()  # type: ignore[union-attr]
    return buffer.getvalue(), end - -(-len(data) // 512) * 512


@given(
    st.text("ab/é", min_size=1, max_size=400).map(lambda text: "x" + text.replace("/", "/y")),
    st.binary(min_size=1, max_size=600),
    st.sampled_from(FORMS),
    st.sampled_from([{}, {"mtime": 1.5}, {"uid": 8**9}]),
)
def test_an_image_is_known_by_the_header_before_it(stem, data, form, fields):
    """In every form, with long names, fractions of seconds, large numbers; and another's is not."""
    try:
        tar, offset = tar_of(f"{stem}.jpg", data, form, **fields)
    except ValueError:  # ustar cannot say that
        assume(False)
    calls = []

    def read(start: int, size: int) -> bytes:
        calls.append(size)
        return tar[start : start + size]

    key = NAMING.number(stem, "a.tar")
    assert read_member(read, NAMING, "a.tar", key, offset, len(data)) == data
    assert len(calls) <= 2 and (len(calls) == 1 or len(stem.encode()) > 90 or not stem.isascii())
    others = [(key + 1) % 2**64, NAMING.number("first", "a.tar"), NAMING.number(stem[:-1], "a.tar")]
    for other in others:
        with pytest.raises(OtherMember):
            read_member(read, NAMING, "a.tar", other, offset, len(data))
    for place, size in (
        (offset, len(data) + 1),
        (offset + 512, len(data)),
        (offset - 512, len(data)),
        (0, 1),
        (513, 1),
    ):
        with pytest.raises(OtherMember):
            read_member(read, NAMING, "a.tar", key, place, size)


@given(st.binary(max_size=4096), st.integers(0, 7))
def test_any_bytes_before_an_image_are_refused(noise, shift):
    """And nothing but that happens."""
    data = noise.ljust(4096, b"x")
    for kind in b"xLK0g":
        block = bytearray(data)
        block[512 * shift + 156] = kind
        with pytest.raises(OtherMember):
            read_member(lambda start, size, b=bytes(block): b[start : start + size], NAMING, "a", 1, 4096, 0)


def test_keys_of_shards():
    naming = Naming(NAMING.secret, KEYS_OF[1], NAMING.extensions)
    assert naming.number("a", "0.tar") != naming.number("a", "1.tar") != NAMING.number("a", "1.tar")
    assert NAMING.number("a", "0.tar") == NAMING.number("a", "1.tar")
    assert Naming.of(naming.encoder()) == naming


@pytest.mark.parametrize("field", ["secret", "keys_of", "extensions"])
def test_a_damaged_encoder(field):
    for value in (None, 1, [1], [[]], {"x": 1} if field == "secret" else 2, "x" if field != "extensions" else 3):
        with pytest.raises(ValueError, match="'encoder' of the index is damaged"):
            Naming.of({**NAMING.encoder(), field: value})
