"""What plain pickles hold comes out as Python's own pickler put it in; everything else is refused and runs nothing."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official.cifar10 import pickle2

from scaletransfer.plain_pickle import UnsafePickle, load_plain

SIMPLE = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300)
NESTED = st.recursive(
    SIMPLE | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
)
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
BYTE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def state(shape: bytes = b"K\x02\x85", kind: bytes = BYTE + STATE, fortran: bytes = b"\x89", data: bytes = b"U\x02ab"):
    return b"(K\x01" + shape + kind + fortran + data + b"tb"


def wrapped(value: bytes) -> bytes:
    """{"a": value} in protocol 2."""
    return b"\x80\x02}U\x01a" + value + b"s."


@given(NESTED, st.sampled_from([3, 4]))
def test_plain_values(value: object, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol)) == value


@given(st.dictionaries(st.binary(max_size=9), st.binary(max_size=300), max_size=4))
def test_bytes_in_the_old_protocols(value: object) -> None:
    # Python 3 writes them as text and a call of _codecs.encode.
    for protocol in (0, 1, 2):
        assert load_plain(pickle.dumps(value, protocol)) == value


@given(st.recursive(SIMPLE, lambda i: st.lists(i, max_size=4) | st.dictionaries(st.text(max_size=3), i, max_size=4)))
def test_plain_values_of_the_old_protocols(value: object) -> None:
    for protocol in (1, 2):
        assert load_plain(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 3), (4, 2, 3), (0, 7)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_arrays_of_bytes(shape: tuple[int, ...], order: str, protocol: int) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8), order=order)
    found = load_plain(pickle.dumps({"data": array, "again": array}, protocol))
    for name in ("data", "again"):
        assert found[name].dtype == np.uint8
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


def test_the_form_of_python_2() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    found = load_plain(pickle2({"labels": [1, 2], "data": array, "name": "\xe4" * 300}))
    np.testing.assert_array_equal(found.pop("data"), array)
    assert found == {"labels": [1, 2], "name": "\xe4" * 300}
    np.testing.assert_array_equal(load_plain(wrapped(ARRAY + state()))["a"], [97, 98])


class Runs:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {Runs.mark}",)

    mark = ""


def hostile() -> dict[str, tuple[bytes, str]]:
    touch = f"touch {Runs.mark}".encode()
    call = b"(S'" + touch + b"'\ntR."
    import_this = b"\x8c\x04this\x8c\x01c\x93."
    huge = b"K\x01" + b"\x8a\x08" + (2**62).to_bytes(8, "little") + b"\x86"
    return {
        **{f"protocol {p}": (pickle.dumps({"data": Runs()}, p), r"asks for \w+\.system") for p in range(6)},
        "GLOBAL and REDUCE": (b"cposix\nsystem\n" + call, r"posix\.system"),
        "eval": (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
        "eval of Python 2": (b"c__builtin__\neval\n(S'1'\ntR.", r"__builtin__\.eval"),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + call, r"os\.system"),
        "only imported": (b"\x80\x04" + import_this, r"this\.c"),
        "a pickle in a pickle": (b"c_pickle\nloads\n(C\x02N.tR.", r"_pickle\.loads"),
        "getattr": (b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'x'\ntR.", r"builtins\.getattr"),
        "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "asks for numpy"),
        "a name beside": (b"cnumpy.core.multiarray\nfrombuffer\n.", r"multiarray\.frombuffer"),
        "another numpy": (b"cnumpy\nload\n(S'x'\ntR.", r"numpy\.load"),
        "INST": (b"(S'" + touch + b"'\nios\nsystem\n.", "instruction INST"),
        "OBJ": (b"(cnumpy\nndarray\nK\x01o.", "instruction OBJ"),
        "NEWOBJ": (b"cnumpy\nndarray\nK\x02\x85\x85\x81.", "instruction NEWOBJ"),
        "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\n)}\x92.", "instruction NEWOBJ_EX"),
        "PERSID": (b"Pid\n.", "instruction PERSID"),
        "BINPERSID": (b"K\x01Q.", "instruction BINPERSID"),
        "EXT1": (b"\x80\x02\x82\x01.", "instruction EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00.", "instruction EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "instruction EXT4"),
        "a buffer": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        "a bytearray": (b"\x80\x05\x96" + bytes(8) + b".", "instruction BYTEARRAY8"),
        "a set": (b"\x80\x04\x8f.", "instruction EMPTY_SET"),
        "another codec": (wrapped(b"c_codecs\nencode\nX\x01\x00\x00\x00aU\x04zlib\x86R"), "makes bytes from"),
        "a codec of one": (wrapped(b"c_codecs\nencode\nX\x01\x00\x00\x00a\x85R"), "makes bytes from"),
        "bytes of a size": (wrapped(b"c__builtin__\nbytes\nK\x05\x85R"), r"calls __builtin__\.bytes"),
        "the codec as a value": (wrapped(b"c_codecs\nencode\n"), "a part of one"),
        "ndarray called": (wrapped(b"cnumpy\nndarray\nK\x02\x85\x85R"), r"calls numpy\.ndarray"),
        "a state for a dict": (wrapped(b"}}U\x01aK\x01sb"), "gives a state to a dict"),
        "a state for a list": (wrapped(b"]K\x01b"), "gives a state to a list"),
        "a state for a global": (wrapped(b"cnumpy\nndarray\n}b"), "gives a state to"),
        "a call of a text": (wrapped(b"U\x01a)R"), "calls something"),
        "another array": (wrapped(ARRAY.replace(b"K\x00\x85", b"K\x07\x85")), "makes an array from"),
        "an array of a type": (wrapped(ARRAY.replace(b"cnumpy\nndarray", b"cnumpy\ndtype")), "makes an array from"),
        "objects": (wrapped(ARRAY + state(kind=BYTE.replace(b"u1", b"O8") + STATE)), "not of unsigned bytes"),
        "floats": (wrapped(ARRAY + state(kind=BYTE.replace(b"u1", b"f4") + STATE)), "not of unsigned bytes"),
        "records": (wrapped(ARRAY + state(kind=BYTE.replace(b"u1", b"V1") + STATE)), "not of unsigned bytes"),
        "a type with fields": (wrapped(BYTE + STATE.replace(b"NNN", b"N)}")), "type of an array the state"),
        "a type without state": (wrapped(ARRAY + state(kind=BYTE)), "not of unsigned bytes"),
        "no type": (wrapped(ARRAY + state(kind=b"N")), "not of unsigned bytes"),
        "sizes that wrap around": (wrapped(ARRAY + state(shape=huge)), "claims an array of the shape"),
        "a negative size": (wrapped(ARRAY + state(shape=b"J\xff\xff\xff\xff\x85")), "the shape"),
        "no size": (wrapped(ARRAY + state(shape=b"N")), "the shape"),
        "too few bytes": (wrapped(ARRAY + state(data=b"U\x01a")), "other bytes for it"),
        "a list of bytes": (wrapped(ARRAY + state(data=b"]")), "other bytes for it"),
        "filled twice": (wrapped(ARRAY + state() + state()), "twice"),
        "never filled": (wrapped(ARRAY), "without content"),
        "a global as a value": (wrapped(b"cnumpy\nndarray\n"), "a part of one"),
        "a global in a list": (wrapped(b"]cnumpy\nndarray\na"), "a part of one"),
        "a global in a tuple": (wrapped(b"cnumpy\nndarray\n\x85\x85"), "a part of one"),
        "an array in a list, never filled": (wrapped(b"](" + ARRAY + b"e"), "without content"),
        "an array as a key": (b"}" + ARRAY + state() + b"Ns.", "as a key"),
        "a list as a key": (b"}]Ns.", "as a key"),
        "a claim of bytes": (b"T" + struct.pack("<i", 2**31 - 1) + b"a.", "it is damaged"),
        "a claim of more": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.", "it is damaged"),
        "an empty stack": (b"\x80\x02s.", "it is damaged"),
        "an unknown memo": (b"h\x07.", "it is damaged"),
        "no mark": (b"K\x01t.", "it is damaged"),
        "a mark in a tuple": (b"(K\x01\x86.", "lacks its values"),
        "an append to a number": (b"K\x01K\x02a.", "as if it were a list"),
        "no pickle": (b"hello", "it is damaged"),
        "nothing": (b"", "it is damaged"),
    }


@pytest.mark.parametrize("name", sorted(hostile()))
def test_hostile_pickles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "mark", str(tmp_path / "it ran").replace(" ", "_"))
    sys.modules.pop("this", None)
    data, words = hostile()[name]
    with pytest.raises(UnsafePickle, match=words):
        load_plain(data)
    assert not any(tmp_path.iterdir()) and "this" not in sys.modules


def test_the_command_of_these_tests_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "mark", str(tmp_path / "it_ran"))
    pickle.loads(pickle.dumps(Runs()))  # noqa: S301 - ours; without it the test above could not fail
    assert (tmp_path / "it_ran").exists()


GOOD = pickle2({"labels": [1, 2, 3], "data": np.zeros((2, 3), np.uint8), "name": "a"})


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(GOOD)))
def test_a_damaged_pickle_gives_plain_values_or_one_error(changes, end) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    try:
        found = load_plain(bytes(data[:end]))
    except UnsafePickle:
        return
    assert found is None or isinstance(found, (dict, list, tuple, str, bytes, int, float, np.ndarray))


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    try:
        load_plain(data)
    except UnsafePickle as error:
        assert len(str(error)) < 1000
