"""Images that are in two places: the same bytes, the same pixels, or pictures that look the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from scaletransfer.checked_sets import Group, Relation, relation
from scaletransfer.duplicate_search import alike_pairs

KINDS = ("bytes", "pixels", "alike")


@dataclass(frozen=True, slots=True)
class Double:
    """An image of one split that is also in another."""

    kind: str
    """One of KINDS: the same file, the same decoded pixels in another file, or pictures that look the same."""
    likeness: float
    """Correlation of the thumbnails' details; 1 for equal bytes and pixels."""
    first: tuple[int, int]
    """(number of the group, position in its rows)."""
    second: tuple[int, int]


@dataclass(slots=True)
class Doubles:
    """What `find_doubles` found."""

    between: dict[tuple[int, int], list[Double]] = field(default_factory=dict)
    """Numbers of two groups -> images that both have.  An image with several copies is named once for each copy."""
    inside: dict[int, Counter[str]] = field(default_factory=dict)
    """Number of a group -> surplus copies of equal bytes or pixels, and pairs that look the same, in it."""
    crowded: int = 0
    """See `duplicate_search.Alike`."""
    constant: int = 0
    """Images of a single grey value, which are not compared."""

    def refused(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Group, list[Double]]]:
        """The pairs of splits that must share nothing, and what they share."""
        for one, two, its in self.all(groups):
            if relation(one, two) == "refused":
                yield one, two, its

    def all(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Group, list[Double]]]:
        """Every pair of splits that shares images."""
        for (one, two), its in sorted(self.between.items()):
            yield groups[one], groups[two], its


def find_doubles(groups: Sequence[Group]) -> Doubles:
    """Compare all images of all groups with each other, but for those that can't be read or have one grey value.

    Takes 1.3 kB of memory an image.
    """
    found = Doubles()
    chosen = [np.flatnonzero(group.fine & (group.features["minimum"] < group.features["maximum"])) for group in groups]
    found.constant = sum(
        int(np.count_nonzero(group.fine)) - len(its) for group, its in zip(groups, chosen, strict=True)
    )
    if not sum(map(len, chosen)):
        return found
    group_of = np.repeat(np.arange(len(groups)), [len(its) for its in chosen])
    place = np.concatenate(chosen)
    files, pixels, thumbs = (
        np.concatenate([group.features[name][its] for group, its in zip(groups, chosen, strict=True)])
        for name in ("bytes", "pixels", "thumb")
    )
    # images of equal pixels stand for each other: one of them is searched for pictures that look the same
    _, representative, cluster = np.unique(pixels, return_index=True, return_inverse=True)
    order = np.lexsort((group_of, cluster))
    starts = np.searchsorted(cluster[order], np.arange(len(representative) + 1))
    sizes = np.diff(starts)

    def members(number: int) -> dict[int, NDArray[np.int64]]:
        """The images of a cluster by group."""
        its = order[starts[number] : starts[number + 1]]
        return {int(group): its[group_of[its] == group] for group in np.unique(group_of[its])}

    def add(one: int, two: int, kind: str, likeness: float) -> None:
        ends = sorted((int(group_of[i]), int(place[i])) for i in (one, two))
        pair = Double(kind, likeness, ends[0], ends[1])
        found.between.setdefault((ends[0][0], ends[1][0]), []).append(pair)

    for number in np.flatnonzero(sizes > 1).tolist():
        by_group = members(number)
        for group, its in by_group.items():
            if len(its) > 1:
                same_file = len(its) - len(np.unique(files[its]))
                inside = found.inside.setdefault(group, Counter())
                inside.update({"bytes": same_file, "pixels": len(its) - 1 - same_file})
        for mine, theirs in combinations(by_group.values(), 2):
            for one, two in _links(mine, theirs):
                add(one, two, "bytes" if files[one] == files[two] else "pixels", 1.0)
    alike = alike_pairs(thumbs[representative])
    found.crowded = alike.crowded
    for left, right, likeness in zip(*(values.tolist() for values in alike[:3]), strict=True):
        for group, mine in members(left).items():
            for other, theirs in members(right).items():
                if group == other:
                    found.inside.setdefault(group, Counter()).update(alike=1)
                    continue
                for one, two in _links(mine, theirs):
                    add(one, two, "alike", likeness)
    return found


def _links(mine: NDArray[np.int64], theirs: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs that name every image of both sides once at least, without naming all combinations."""
    yield from ((int(mine[0]), int(other)) for other in theirs)
    yield from ((int(other), int(theirs[0])) for other in mine[1:])


def listed(groups: Sequence[Group], doubles: Doubles) -> Iterator[tuple[str, ...]]:
    """Rows of duplicates.csv: relation, kind, likeness, then set, split, key of both images."""
    for one, two, its in doubles.all(groups):
        its = sorted(its, key=lambda double: (KINDS.index(double.kind), -double.likeness, double.first, double.second))
        state: Relation = relation(one, two)
        keys = zip(one.keys([d.first[1] for d in its]), two.keys([d.second[1] for d in its]), strict=True)
        for double, (first, second) in zip(its, keys, strict=True):
            yield (
                *(state, double.kind, f"{double.likeness:.4f}"),
                *(one.set.name, one.split, first),
                *(two.set.name, two.split, second),
            )
