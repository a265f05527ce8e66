"""Statistics of pixels, and images that look wrong: empty, crushed into a few grey values, or inverted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer.checked_sets import Group
from scaletransfer.duplicate_search import THUMB
from scaletransfer.image_features import UNREADABLE

FEW_LEVELS = 32
NARROW = 0.125
"""A picture whose percentiles 1 to 99 cover less than this share of black to white has lost most of its greys on the
way, or lies in the dark: 12-bit values beside others of 16 bits cover a sixteenth."""
INVERTED = -0.3
"""Correlation with the middle picture of its view below which a radiograph counts as inverted.  Of 2,000 drawn
X-rays of all views it is 0.44 to 0.99 (mean 0.88), whether none, 5 %, half or all of them were inverted, and the same
below 0 for those that were."""
ALIKE = 0.5
"""Mean size of that correlation below which the pictures are no radiographs of one view."""
LATERALS = ("L", "LL", "RL")
QUANTILES = (0, 1, 50, 99, 100)

_SAMPLE = 4000
_CHESTS = 0.25  # mean size of the correlation with a coarse chest, 0.46 to 0.71 by view of drawn X-rays
_FEW = 20  # pictures whose median is too much like each of them to say that they are of one kind


@dataclass(slots=True)
class PixelReport:
    """What `check_pixels` says of the groups of one set."""

    summary: dict[str, Any]
    """Column -> value, of pixel_summary.csv."""
    flags: dict[int, dict[int, str]] = field(default_factory=dict)
    """Number of the group -> position in its rows -> what is wrong, in words."""
    notes: list[str] = field(default_factory=list)
    """Sentences about the set as a whole."""


def check_pixels(groups: Sequence[Group]) -> PixelReport:
    """Statistics and flags of the groups of one set, which are taken together.

    Statistics give every image the same weight, whatever its size; values are shares of white (255, or the white of
    a 16-bit set).  Inverted images are looked for where 95 % of the images show no colour.
    """
    [its] = {group.set.name for group in groups}
    features = np.concatenate([group.features[group.fine] for group in groups])
    report = PixelReport(summary={"set": its, "images": len(features)})
    for number, group in enumerate(groups):
        report.flags[number] = dict(_plain_flags(group))
    unreadable = sum(int(np.count_nonzero(group.features["state"] == UNREADABLE)) for group in groups)
    if not len(features):
        report.summary |= {"unreadable": unreadable}
        return report
    grey = float(features["grey"].mean())
    if grey >= 0.95:
        _flag_inverted(groups, report)
    report.summary |= _statistics(features) | {"grey": round(grey, 4), "unreadable": unreadable}
    words = [word for flags in report.flags.values() for word in flags.values()]
    for kind in ("empty", "crushed"):
        report.summary[kind] = sum(kind in word for word in words)
    if (report.summary.get("inverted") or 0) > len(features) / 2:
        report.notes.append(
            f"{its}: most images look inverted: the set as a whole shows air white and bones black (MONOCHROME1?)"
        )
    crushed = report.summary["crushed"]
    if crushed > len(features) / 2:
        report.notes.append(
            f"{its}: {crushed:,} of {len(features):,} images use a small part of the range from black to white and "
            "look flat or black to a network; rescale them and make the shards again"
        )
    return report


def _statistics(features: NDArray[Any]) -> dict[str, Any]:
    """Means and standard deviations by channel, sizes, and how extremes are spread over the images."""
    mean = features["mean"].astype(np.float64).mean(axis=0)
    spread = np.sqrt(np.maximum(features["square"].astype(np.float64).mean(axis=0) - mean**2, 0))
    grey = bool(features["grey"].all())
    found: dict[str, Any] = {}
    for name, values in (("mean", mean), ("std", spread)):
        parts = values[:1] if grey else values
        found[name] = " ".join(f"{value:.4f}" for value in parts)
    for name in ("minimum", "low", "middle", "high", "maximum"):
        found |= {
            f"{name} p{q}": round(float(v), 4) for q, v in zip(QUANTILES, _percentiles(features[name]), strict=True)
        }
    for name in ("width", "height", "levels"):
        found |= {f"{name} p{q}": int(v) for q, v in zip(QUANTILES, _percentiles(features[name]), strict=True)}
    return found


def _percentiles(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.percentile(values.astype(np.float64), QUANTILES)


def _plain_flags(group: Group) -> Iterator[tuple[int, str]]:
    """Position -> what is wrong with it, from an image's own statistics."""
    features = group.features
    for position in np.flatnonzero(features["state"] == UNREADABLE).tolist():
        yield position, f"unreadable: {features['problem'][position].decode()}"
    width = features["high"] - features["low"]
    empty = group.fine & (features["minimum"] == features["maximum"])
    crushed = group.fine & ~empty & ((features["levels"] < FEW_LEVELS) | (width < NARROW))
    for position in np.flatnonzero(empty).tolist():
        yield position, "empty: one grey value"
    for position in np.flatnonzero(crushed).tolist():
        levels = int(features["levels"][position])
        yield position, f"crushed: {levels} grey values over {width[position]:.3f} of the range"


def _flag_inverted(groups: Sequence[Group], report: PixelReport) -> None:
    """Add what looks like a negative, each view by itself (white bones on a dark ground are upright)."""
    report.summary["inverted"] = ""
    unlike: list[str] = []
    strange: list[str] = []
    [names] = {group.set.index.views for group in groups}
    [its] = {group.set.name for group in groups}
    views = [group.table["view"][group.rows] for group in groups]
    for view in np.unique(np.concatenate(views)).tolist():
        name = names[view] if view >= 0 else ""
        chosen = [
            np.flatnonzero(group.fine & (which == view) & (group.features["minimum"] < group.features["maximum"]))
            for group, which in zip(groups, views, strict=True)
        ]
        thumbs = np.concatenate([g.features["thumb"][part] for g, part in zip(groups, chosen, strict=True)])
        if not len(thumbs):
            continue
        likeness, chests = upright(thumbs, name)
        if np.abs(likeness).mean() < ALIKE or (len(thumbs) < _FEW and chests < _CHESTS):
            unlike.append(name)
            continue
        if chests < _CHESTS:
            strange.append(name)
        inverted = likeness < INVERTED
        report.summary["inverted"] = (report.summary["inverted"] or 0) + int(inverted.sum())
        start = 0
        for number, part in enumerate(chosen):
            here = slice(start, start + len(part))
            start += len(part)
            for position, value in zip(part[inverted[here]].tolist(), likeness[here][inverted[here]], strict=True):
                word = f"inverted: correlation {value:.2f} with the middle picture of its view"
                flags = report.flags[number]
                flags[position] = f"{flags[position]}; {word}" if position in flags else word
    for views_of, what in (
        (unlike, "the pictures are too different from each other to tell negatives from positives"),
        (strange, "the pictures do not look like chests: only negatives of most of the others are told"),
    ):
        named = [name for name in views_of if name]  # without a view they may be anything
        if named:
            report.notes.append(f"{its}, {'view' if len(named) == 1 else 'views'} {', '.join(named)}: {what}")


def upright(thumbs: NDArray[np.uint8], view: str) -> tuple[NDArray[np.float64], float]:
    """How far each radiograph agrees with the middle one of all, -1 to 1; negatives are below 0.

    thumbs: uint8 [n, THUMB, THUMB] of one view.  Which way round is right comes from a coarse picture of any chest:
    spine and mediastinum bright, abdomen bright, lungs and the air around the body dark; each thumbnail is turned so
    that it agrees with that, then with the median of all that were turned, so that a set of negatives, or a mixture,
    is found as well as one negative among many.

    Returns (correlation of each with that median, mean size of each one's correlation with the coarse picture).  If
    the latter is below 0.25 these are no chests, and most of the pictures count as the right way round.
    """
    coarse = _standard(chest(view)[None])[0]
    sample = _standard(thumbs[:: max(1, len(thumbs) // _SAMPLE)])
    agreement = (sample * coarse).mean(axis=(1, 2))
    middle = coarse
    for _ in range(3):
        sign = np.where((sample * middle).mean(axis=(1, 2)) < 0, -1.0, 1.0).astype(np.float32)
        middle = _standard(np.median(sample * sign[:, None, None], axis=0)[None])[0]
    chests = float(np.abs(agreement).mean())
    right = np.median((sample * middle).mean(axis=(1, 2))) if chests < _CHESTS else (middle * coarse).mean()
    if right < 0:
        middle = -middle
    likeness = np.empty(len(thumbs))
    for start in range(0, len(thumbs), _SAMPLE):
        part = _standard(thumbs[start : start + _SAMPLE])
        likeness[start : start + len(part)] = (part * middle).mean(axis=(1, 2))
    return likeness, chests


def chest(view: str) -> NDArray[np.float32]:
    """float32 [THUMB, THUMB]: how bright any chest radiograph is, coarsely; from the front unless `view` is lateral."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, THUMB)] * 2, indexing="ij")
    body = np.exp(-(x**4) / 0.5) - 0.5 * np.exp(-((y + 1) ** 2) / 0.1) * (
        np.abs(x) > 0.4
    )  # air at the sides, at the neck
    abdomen = 1 / (1 + np.exp(-(y - 0.55) / 0.1))
    if view in LATERALS:
        return (body + 0.5 * abdomen).astype(np.float32)
    spine = np.exp(-((x / 0.25) ** 2))
    lungs = sum(np.exp(-(((x - side) / 0.28) ** 2) - ((y + 0.05) / 0.5) ** 2) for side in (-0.48, 0.48))
    return (0.5 * body + spine + 0.7 * abdomen - lungs).astype(np.float32)


def _standard(pictures: NDArray[Any]) -> NDArray[np.float32]:
    """Each with mean 0 and standard deviation 1."""
    values = np.asarray(pictures, np.float32)
    values = values - values.mean(axis=(1, 2), keepdims=True)
    return values / np.maximum(values.std(axis=(1, 2), keepdims=True), 1e-6)
