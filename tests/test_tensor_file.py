"""Our safetensors files against the library that reads them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scaletransfer.tensor_file import locate, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(3, 4, 5)).astype(np.float32),
    "ä.scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "b": RNG.normal(size=1001).astype(np.float32),
    "bytes": RNG.integers(0, 256, 13, dtype=np.uint8),
}


def layout() -> dict[str, tuple[str, list[int]]]:
    return {name: ("U8" if t.dtype == np.uint8 else "F32", list(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_the_library_reads_what_we_write(tmp_path, cut):
    pieces = (flat[i : i + cut] for t in TENSORS.values() for flat in [t.reshape(-1)] for i in range(0, len(flat), cut))
    digest = write_tensors(tmp_path / "x", layout(), pieces)
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name
    with safe_open(tmp_path / "x", framework="np") as handle:
        assert handle.get_slice("a.weight")[1:2].shape == (1, 4, 5)


def test_tensors_lie_where_we_say(tmp_path):
    """In the library's own files and in ours."""
    write_tensors(tmp_path / "ours", layout(), [t.reshape(-1) for t in TENSORS.values()])
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "np"})
    for name in ("ours", "theirs"):
        content = (tmp_path / name).read_bytes()
        places = locate(tmp_path / name)
        assert places.keys() == TENSORS.keys()
        for key, (kind, shape, begin) in places.items():
            assert kind == layout()[key][0] and shape == layout()[key][1]
            assert content[begin : begin + TENSORS[key].nbytes] == TENSORS[key].tobytes(), key
    (kind, shape, begin) = locate(tmp_path / "ours")["a.weight"]
    assert begin % 64 == 0


def test_too_little_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="4 bytes are missing"):
        write_tensors(tmp_path / "x", {"a": ("F32", [2])}, [np.zeros(1, np.float32)])
