"""The search for pictures that look the same: nothing is lost, nothing made up, and few pairs are looked at."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers_check_data import drawing, drawn_xrays, encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from scaletransfer import duplicate_search
from scaletransfer.duplicate_search import BITS, MIN_DETAIL, MIN_LIKENESS, THUMB, alike_pairs, confirm, hashes
from scaletransfer.image_features import features_of


def thumbs_of(pictures, how=lambda picture: picture, suffix="png", **options):
    return np.stack([features_of(encoded(how(picture), suffix, **options))["thumb"] for picture in pictures])


def everything(thumbs):
    """All pairs that `confirm` accepts: what the search is measured against."""
    one, two = np.triu_indices(len(thumbs), 1)
    likeness = confirm(thumbs, one, two)
    return set(zip(one[likeness > 0].tolist(), two[likeness > 0].tolist(), strict=True))


@pytest.fixture(scope="module")
def xrays(tmp_path_factory):
    return [picture for picture, _ in drawn_xrays(tmp_path_factory.mktemp("xrays"), 200)]


def test_different_xrays_are_not_alike(xrays):
    """Several of each patient, in the same views: 19,900 pairs, none of them the same picture."""
    thumbs = thumbs_of(xrays)
    assert len(alike_pairs(thumbs).first) == 0 and everything(thumbs) == set()
    one, two = np.triu_indices(len(thumbs), 1)
    flat = thumbs.reshape(len(thumbs), -1).astype(float)
    assert np.corrcoef(flat)[one, two].max() > 0.95, "they do look alike; only the details tell them apart"


@pytest.mark.parametrize(
    ("name", "how", "options"),
    [
        ("quality 60", lambda p: p, {"suffix": "jpg", "quality": 60}),
        ("half", lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.BICUBIC), {}),
        ("square", lambda p: p.resize((224, 224), Image.Resampling.BILINEAR), {"suffix": "jpg", "quality": 80}),
        ("brighter", lambda p: ImageEnhance.Brightness(p).enhance(1.1), {"suffix": "jpg", "quality": 75}),
        ("darker", lambda p: ImageEnhance.Brightness(p).enhance(0.9), {}),
    ],
)
def test_altered_copies_are_found(xrays, name, how, options):
    originals = thumbs_of(xrays)
    copies = thumbs_of(xrays[:60], how, **options)
    found = alike_pairs(np.concatenate([originals, copies]))
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs == {(number, len(xrays) + number) for number in range(60)}
    assert found.likeness.min() >= MIN_DETAIL


def planted(seed, number, copies, noise):
    """Thumbnails, some of them altered copies of others."""
    rng = np.random.default_rng(seed)
    originals = np.stack([np.asarray(drawing(seed + i, (THUMB, THUMB))) for i in range(number)]).astype(float)
    chosen = rng.integers(0, number, copies)
    altered = originals[chosen] * rng.uniform(0.7, 1, (copies, 1, 1)) + rng.normal(0, noise, (copies, THUMB, THUMB))
    return np.clip(np.concatenate([originals, altered]), 0, 255).astype(np.uint8)


def pairs_of(found):
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and all(one < two for one, two in pairs)
    return set(pairs)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 60), st.floats(0, 6))
def test_a_small_set_is_searched_completely(seed, number, copies, noise):
    thumbs = planted(seed, number, copies, noise)
    assert pairs_of(alike_pairs(thumbs)) == everything(thumbs)


@pytest.mark.parametrize(("short", "noise", "share"), [(1 << 16, 3, 0.99), (0, 1, 1.0), (0, 3, 0.97)])
def test_hashes_lose_next_to_nothing(monkeypatch, short, noise, share):
    """With bands of 16 and of 24 bits, as for large sets; one picture is there sixty times."""
    monkeypatch.setattr(duplicate_search, "_ALL_PAIRS", 0)
    monkeypatch.setattr(duplicate_search, "_SHORT_BANDS", short)
    thumbs = np.concatenate([planted(77, 1, 60, noise), planted(0, 100, 150, noise)])
    found, wanted = pairs_of(alike_pairs(thumbs)), everything(thumbs)
    assert found <= wanted and len(found) >= share * len(wanted) > 1500


def test_confirm_is_the_smaller_of_two_correlations():
    """Against numpy's correlation of whole thumbnails and of what scipy's blur leaves of them."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    one = np.asarray(drawing(1, (THUMB, THUMB)), np.uint8)
    two = np.clip(one * 0.8 + rng.normal(0, 1, one.shape), 0, 255).astype(np.uint8)
    [got] = confirm(np.stack([one, two]), np.array([0]), np.array([1]))
    details = [picture.astype(np.float32) - gaussian_filter(picture.astype(np.float32), 1) for picture in (one, two)]
    whole = np.corrcoef(one.ravel(), two.ravel())[0, 1]
    detail = np.corrcoef(details[0].ravel(), details[1].ravel())[0, 1]
    assert whole > MIN_LIKENESS and detail > MIN_DETAIL
    assert got == pytest.approx(min(whole, detail), abs=1e-5)
    assert confirm(np.stack([one, 255 - one]), np.array([0]), np.array([1])) == 0


def test_hashes_do_not_depend_on_brightness_and_contrast():
    thumbs = np.stack([np.asarray(drawing(i, (THUMB, THUMB))) for i in range(40)])
    plain = hashes(thumbs // 2)
    assert plain.shape == (40, BITS // 64)
    distance = np.bitwise_count(plain ^ hashes(thumbs // 2 + 100)).sum(axis=1)
    assert distance.max() == 0
    others = np.bitwise_count(plain[:1] ^ plain[1:]).sum(axis=1)
    assert 60 < others.mean() < 130, "different pictures differ in about half of the bits"


def test_thirty_thousand_pictures_take_seconds(monkeypatch):
    """450 million pairs, of which few are looked at."""
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (30_000, THUMB, THUMB), dtype=np.uint8)
    thumbs[29_000:] = np.clip(thumbs[:1000] * 0.9 + 5, 0, 255)
    looked, real = [], duplicate_search._bucket_pairs

    def counting(*arguments):
        for pair in real(*arguments):
            looked.append(len(pair[0]))
            yield pair

    monkeypatch.setattr(duplicate_search, "_bucket_pairs", counting)
    start = time.process_time()
    found = alike_pairs(thumbs)
    assert time.process_time() - start < 20
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == {(i, 29_000 + i) for i in range(1000)}
    assert sum(looked) < 1e6


def test_a_crowd_is_told_and_bounded(monkeypatch):
    """Pictures that all look the same: each is compared with its neighbours only, and that is said."""
    monkeypatch.setattr(duplicate_search, "_ALL_PAIRS", 0)
    monkeypatch.setattr(duplicate_search, "NEIGHBOURS", 10)
    rng = np.random.default_rng(0)
    base = np.asarray(drawing(0, (THUMB, THUMB)), float)
    thumbs = np.clip(base + rng.normal(0, 1, (100, THUMB, THUMB)), 0, 255).astype(np.uint8)
    other = np.stack([np.asarray(drawing(i, (THUMB, THUMB))) for i in range(1, 201)])
    found = alike_pairs(np.concatenate([thumbs, other]))
    assert 80 < found.crowded <= 100 and 100 < len(found.first) < 100 * 99 / 2
    assert set(found.first.tolist()) | set(found.second.tolist()) <= set(range(100))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_very_few_pictures(number):
    thumbs = np.repeat(np.asarray(drawing(0, (THUMB, THUMB)), np.uint8)[None], number, axis=0)
    found = alike_pairs(thumbs)
    assert len(found.first) == (number == 2) and found.crowded == 0
