"""The first rows of a JPEG without the rest of the file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaletransfer.decode import Decoding, decode_at, plain_jpeg
from scaletransfer.fused import build_fused
from scaletransfer.order import sample_uniforms

_SUBSAMPLING = ("4:4:4", "4:2:2", "4:2:0", "4:1:1")


def _jpeg(height: int, width: int, channels: int, **options) -> bytes:
    """Noise: every block has many coefficients, and a row decoded from wrong bits is seen at once."""
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise[..., 0] if channels == 1 else noise).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _spoiled(data: bytes) -> bytes:
    """The same file, whose last sixth says something else."""
    end = len(data) * 5 // 6
    return data[:end] + bytes(len(data) - end - 2) + data[-2:]


@settings(max_examples=100, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 130), st.integers(1, 70)),
    subsampling=st.sampled_from(_SUBSAMPLING),
    kinds=st.sampled_from([(1, 1), (3, 1), (3, 3), (1, 3)]),
    scale=st.sampled_from([1, 2, 4, 8]),
    restarts=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    share=st.floats(0, 1),
)
def test_the_first_rows_are_those_of_the_whole(sides, subsampling, kinds, scale, restarts, progressive, share):
    options = {"subsampling": subsampling} if kinds[0] == 3 else {}
    data = _jpeg(*sides, kinds[0], quality=80, restart_marker_rows=restarts, progressive=progressive, **options)
    whole = decode_at(data, kinds[1], Decoding(), scale)
    rows = max(1, round(share * len(whole)))
    memory = np.empty((*whole.shape[:2], kinds[1]), np.uint8)
    found = decode_at(data, kinds[1], Decoding(), scale, memory=memory, rows=rows)
    assert len(found) >= rows
    np.testing.assert_array_equal(found[:rows], whole[:rows])


@pytest.mark.parametrize(("channels", "subsampling"), [(1, ""), (3, "4:2:0")])
def test_what_lies_below_is_not_read(channels: int, subsampling: str) -> None:
    data = _jpeg(256, 200, channels, **({"subsampling": subsampling} if subsampling else {}))
    whole = decode_at(data, channels, Decoding())
    found = decode_at(_spoiled(data), channels, Decoding(), rows=128)
    assert len(found) < 160
    np.testing.assert_array_equal(found[:128], whole[:128])


def test_a_file_that_is_cut_off_is_noticed() -> None:
    data = _jpeg(256, 200, 1)
    with pytest.raises(ValueError, match="truncated"):
        decode_at(data[: len(data) * 3 // 4], 1, Decoding(), rows=64)


@pytest.mark.parametrize("options", [{"progressive": True}, {}], ids=["progressive", "a scan for each component"])
def test_a_file_that_is_not_one_scan_is_read_whole(options: dict) -> None:
    data = bytearray(_jpeg(64, 64, 3, **options))
    if not options:
        data[data.index(b"\xff\xda") + 4] = 1  # the header alone decides
    plain = plain_jpeg(bytes(data))
    assert plain is not None and plain.rows_at_once == 0
    if options:
        assert len(decode_at(bytes(data), 3, Decoding(), rows=8)) == 64


@pytest.mark.parametrize("kind", ["xray", "natural"])
def test_the_transforms_see_no_difference(kind: str) -> None:
    """Also with a crop that ends above the end of the file; some of these crops leave rows out, and not all."""
    fused = build_fused(kind, True, 32)
    assert fused is not None
    data = _jpeg(190, 90, fused.channels)
    damaged, shown = _spoiled(data), []
    for position in range(40):
        uniforms = sample_uniforms(0, position)
        pictures = np.empty((3, fused.channels, 32, 32), np.uint8)
        fused(data, Decoding(), uniforms, pictures[0])
        fused(data, Decoding(), uniforms, pictures[1], whole=True)
        np.testing.assert_array_equal(pictures[0], pictures[1])
        fused(damaged, Decoding(), uniforms, pictures[2], whole=True)
        shown.append(not np.array_equal(pictures[0], pictures[2]))
    assert not any(shown) if kind == "xray" else 0 < sum(shown) < 40
