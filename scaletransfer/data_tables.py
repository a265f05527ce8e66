"""Tables of what sets hold: images, patients, states of each label; and patients who are in two places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer import labels
from scaletransfer.checked_sets import CheckedSet, Group, relation

STATES = ("positive", "negative", "uncertain", "unknown")


@dataclass(frozen=True, slots=True)
class LabelCount:
    """Images of a split by what they say of one label."""

    label: str
    positive: int
    negative: int
    uncertain: int
    unknown: int
    """Not mentioned, or masked."""

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """In the order of STATES."""
        return self.positive, self.negative, self.uncertain, self.unknown


def label_counts(group: Group) -> list[LabelCount]:
    """Counts over the whole sample table of a split (not only the rows that were looked at), in label order.

    States are those of the data set.  Of sets that list tokens, the findings are counted as training under
    `labels.targets(..., "corrected")` sees them.  Of classes, an image is a positive of its own and a negative of
    the others.
    """
    index, table = group.set.index, group.table
    if index.label_kind == "classes":
        sizes = np.bincount(table["label"], minlength=len(index.label_names)).tolist()
        return [
            LabelCount(name, size, len(table) - size, 0, 0) for name, size in zip(index.label_names, sizes, strict=True)
        ]
    raw: NDArray[Any] = table["labels"]
    if index.label_kind == "states":
        columns = [np.count_nonzero(raw == state, axis=0).tolist() for state in (1, 0, -1, -2)]
        return [LabelCount(name, *its) for name, *its in zip(index.label_names, *columns, strict=True)]
    names = labels.vocabulary(index.source, "corrected", index.label_names)
    values = labels.targets(raw, index.label_names, index.source, "corrected")
    positive, negative = (np.count_nonzero(values == state, axis=0).tolist() for state in (1, 0))
    return [
        LabelCount(name, its, others, 0, len(table) - its - others)
        for name, its, others in zip(names, positive, negative, strict=True)
    ]


@dataclass(slots=True)
class SharedPatients:
    """What `shared_patients` found."""

    between: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Numbers of two groups -> patients (numbers that mean nothing elsewhere) whom both have."""
    images: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Such a patient -> their images, as (number of the group, row of its table)."""
    not_compared: list[str] = field(default_factory=list)
    """Sentences: pairs of sets that can't be compared, and why."""


def shared_patients(groups: Sequence[Group]) -> SharedPatients:
    """Patients in more than one of the groups.

    Inside a set the numbers of its tables tell, for all rows.  Between sets the codes do that the label members hold
    (`image_features` reads them with the images), so only patients of an image that was looked at are compared.
    Codes made with different salts never agree, and class numbers come without codes: such pairs of sets are named in
    `not_compared`.
    """
    found = SharedPatients()
    sets = list({id(group.set): group.set for group in groups}.values())
    found.not_compared = [reason for one, two in combinations(sets, 2) if (reason := _why_not(one, two))]
    names, rows, owners = _identities(groups, sets)
    if not len(names):
        return found
    _, person = np.unique(names, return_inverse=True)
    person = person.reshape(-1)
    presence = np.unique(np.stack([person, owners], axis=1), axis=0)
    people, places = np.unique(presence[:, 0], return_counts=True)
    shared = people[places > 1]
    inside = np.isin(presence[:, 0], shared)
    by_person: dict[int, list[int]] = {}
    for who, group in presence[inside].tolist():
        by_person.setdefault(who, []).append(group)
    for who, its in by_person.items():
        for one, two in combinations(its, 2):
            if relation(groups[one], groups[two]) != "same split":
                found.between.setdefault((one, two), []).append(who)
    chosen = np.isin(person, shared)
    for who, group, row in zip(person[chosen].tolist(), owners[chosen].tolist(), rows[chosen].tolist(), strict=True):
        found.images.setdefault(who, []).append((group, row))
    return found


def listed(groups: Sequence[Group], shared: SharedPatients) -> Iterator[tuple[str, ...]]:
    """Rows of patients.csv: patient (a running number), relation, set, split, key of each image of a shared patient.

    The relation is "refused" if any two of the patient's splits must share nothing.
    """
    refused = {
        who
        for (one, two), people in shared.between.items()
        if relation(groups[one], groups[two]) == "refused"
        for who in people
    }
    for number, who in enumerate(sorted(shared.images), 1):
        for group, row in sorted(shared.images[who]):
            its = groups[group]
            [key] = its.set.index.keys(its.split, [row])
            yield str(number), "refused" if who in refused else "allowed", its.set.name, its.split, key


def _why_not(one: CheckedSet, two: CheckedSet) -> str:
    """Why the patients of two sets can't be compared, "" if they can or one has none."""
    if not one.patients or not two.patients:
        return ""
    without = [its.name for its in (one, two) if not its.coded]
    if without:
        return (
            f"patients of {one.name} and {two.name} are not compared: shards of classes hold no patient codes "
            f"({' and '.join(without)}); their images are compared"
        )
    salts = one.index.salt_fingerprint, two.index.salt_fingerprint
    if salts[0] != salts[1]:
        return (
            f"patients of {one.name} and {two.name} are not compared: their codes were made with different salts "
            f"({salts[0]} and {salts[1]}); make one of them again with the other's --salt-file; their images are "
            "compared"
        )
    return ""


def _identities(
    groups: Sequence[Group], sets: Sequence[CheckedSet]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """(identity, row, number of the group) of every image with a patient.

    An identity is (realm, value): the salt and the code where the code is known, else the set and its number.
    """
    salts = sorted({its.index.salt_fingerprint for its in sets})
    parts, rows, owners = [], [], []
    for number, its in enumerate(sets):
        codes: dict[int, int] = {}
        for group in groups:
            if group.set is its and its.coded:
                known = group.features["patient"] != 0
                ranks = group.table["patient"][group.rows[known]]
                codes |= dict(zip(ranks.tolist(), group.features["patient"][known].tolist(), strict=True))
        realm = salts.index(its.index.salt_fingerprint)
        for place, group in enumerate(groups):
            if group.set is not its:
                continue
            ranks = group.table["patient"]
            with_patient = np.flatnonzero(ranks >= 0)
            part = np.zeros(len(with_patient), [("realm", "<i8"), ("value", "<u8")])
            distinct, inverse = np.unique(ranks[with_patient], return_inverse=True)
            known = np.array([int(rank) in codes for rank in distinct], dtype=bool)
            values = np.array([codes.get(int(rank), int(rank)) for rank in distinct], dtype=np.uint64)
            realms = np.where(known, realm, -1 - number)
            part["realm"], part["value"] = realms[inverse], values[inverse]
            parts.append(part)
            rows.append(with_patient)
            owners.append(np.full(len(with_patient), place))
    if not parts:
        return np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(parts), np.concatenate(rows), np.concatenate(owners)
