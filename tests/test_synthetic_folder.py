from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scaletransfer import synthetic_chexpert, synthetic_folder
from scaletransfer.labels import CHEXPERT_COLUMNS
from scaletransfer.sources import open_source
from scaletransfer.synthetic_draw import Picture
from scaletransfer.synthetic_folder import CLASSES, synthetic_xray_folder
from scaletransfer.synthetic_rows import draw_rows


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "xray5"
    assert synthetic_xray_folder(out, images_per_class=5, valid_per_class=3, seed=3, size=64) == {
        "train": 25,
        "valid": 15,
    }
    return out


def test_the_source_image_folder_reads_it(small: Path) -> None:
    source = open_source("image_folder", small)
    records = list(source)
    assert source.label_names == CLASSES and "normal" in CLASSES and len(CLASSES) == 5
    assert not source.skipped
    counts = Counter((record.split, CLASSES[record.labels]) for record in records)
    assert counts == {("train", name): 5 for name in CLASSES} | {("valid", name): 3 for name in CLASSES}
    sizes = set()
    for record in records:
        with Image.open(small / record.image) as image:
            assert image.mode == "L" and image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 20 and min(min(size) for size in sizes) >= 56


def test_a_name_does_not_tell_the_class(small: Path) -> None:
    paths = sorted(small.rglob("*.jpg"), key=lambda path: path.name)
    assert [path.name for path in paths] == [f"patient{number:05d}.jpg" for number in range(1, 41)]  # each once
    for place in ([path.parent.name for path in paths], [path.parent.parent.name for path in paths]):
        # in the order of names, a class or split follows itself as often as by chance
        same = sum(a == b for a, b in pairwise(place))
        chance = sum(n * (n - 1) for n in Counter(place).values()) / len(place)
        assert abs(same - chance) < 4 * np.sqrt(chance)


def test_equal_bytes_for_any_number_of_workers(small: Path, tmp_path: Path) -> None:
    options = {"images_per_class": 5, "valid_per_class": 3, "size": 64}
    synthetic_xray_folder(tmp_path / "b", seed=3, workers=2, **options)
    synthetic_xray_folder(tmp_path / "c", seed=4, **options)
    first, other = digests(small), digests(tmp_path / "c")
    assert first == digests(tmp_path / "b")
    assert not set(first.values()) & set(other.values())


def test_as_many_for_validation_unless_asked(tmp_path: Path) -> None:
    assert synthetic_xray_folder(tmp_path / "a", images_per_class=1, seed=0, size=64) == {"train": 5, "valid": 5}


def test_other_patients_than_those_of_chexpert() -> None:
    """No seed of the one drawing starts the same generator as any seed of the other."""
    rows = draw_rows(np.random.default_rng(0), 100)
    seeds = (0, 1, 10, 2**32, 10 * 2**32, 11 * 2**32 + 1)  # numpy takes large numbers apart into words
    known = [synthetic_chexpert._picture("train", row, {}, seed, 64) for seed in seeds for row in rows]
    bases = [synthetic_folder._base(seed) for seed in seeds]
    ours = [synthetic_folder._picture("train", "normal", n, base, 64) for base in bases for n in range(1, 101)]

    def states(pictures: list[Picture]) -> set[bytes]:
        streams = {stream for p in pictures for stream in (p.patient_seed, p.study_seed, p.image_seed)}
        return {np.random.SeedSequence(stream).generate_state(8).tobytes() for stream in streams}

    assert len(states(ours)) == 3 * len(ours)
    assert not states(ours) & states(known)


def test_no_class_is_one_of_chexperts() -> None:
    assert not {name.lower() for name in CLASSES} & {column.lower() for column in CHEXPERT_COLUMNS}
