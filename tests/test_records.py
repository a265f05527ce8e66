"""What the headers of a set's images tell: channels, bits, and which file is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_data import draw_image
from PIL import Image

from scaletransfer.records import probe_images
from scaletransfer.sources import Record


def _records(root: Path, names: list[str]) -> list[Record]:
    return [
        Record(source_id=name, split="train", patient="", image=name, labels=0, view="")
        for name in names
        if (root / name).exists()
    ]


def test_one_colour_image_among_many_grey_ones(tmp_path):
    names = [f"{number:03}.png" for number in range(90)]
    for number, name in enumerate(names):
        draw_image(tmp_path / name, number, width=6, height=5)
    records = _records(tmp_path, names)
    info = probe_images(tmp_path, records)
    assert (info.channels, info.bit_depth, info.pixel_max, info.extension) == (1, 8, 255, "png")
    for place in (1, 41, 89):
        draw_image(tmp_path / names[place], place, width=6, height=5, mode="RGB")
        assert probe_images(tmp_path, records).channels == 3
        draw_image(tmp_path / names[place], place, width=6, height=5)


@pytest.mark.parametrize(
    ("modes", "channels", "depth"),
    [
        (("L", "I;16"), 1, 16),
        (("I;16", "RGB"), 3, 8),
        (("1", "LA"), 1, 8),
        (("L", "P"), 3, 8),
        (("I;16",), 1, 16),
        (("RGBA",), 3, 8),
    ],
)
def test_channels_and_bits(tmp_path, modes, channels, depth):
    for number, mode in enumerate(modes):
        Image.new(mode, (5, 4)).save(tmp_path / f"{number}.png")
    info = probe_images(tmp_path, _records(tmp_path, [f"{number}.png" for number in range(len(modes))]))
    assert (info.channels, info.bit_depth, info.pixel_max) == (channels, depth, 2**depth - 1)


def test_the_first_file_that_is_no_image_is_named(tmp_path):
    names = [f"{number}.jpg" for number in range(8)]
    for number, name in enumerate(names):
        draw_image(tmp_path / name, number)
    (tmp_path / "5.jpg").write_text("no picture")
    (tmp_path / "6.jpg").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValueError, match=r"5\.jpg is not an image that can be read; replace it$"):
        probe_images(tmp_path, _records(tmp_path, names))
    (tmp_path / "5.jpg").unlink()
    with pytest.raises(ValueError, match=r"6\.jpg is not an image"):
        probe_images(tmp_path, _records(tmp_path, names))


def test_probes_are_spread_over_the_records(tmp_path):
    """With fewer probes than records, each place is as likely to be looked at as any other."""
    names = [f"{number:02}.png" for number in range(20)]
    for number, name in enumerate(names):
        draw_image(tmp_path / name, number, width=6, height=5)
    records = _records(tmp_path, names)
    for place in range(20):
        draw_image(tmp_path / names[place], place, width=6, height=5, mode="RGB")
        assert probe_images(tmp_path, records, probes=5).channels == (3 if place % 4 == 0 else 1)
        draw_image(tmp_path / names[place], place, width=6, height=5)
