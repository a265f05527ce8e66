"""Finding vocabularies, raw label states, policies, and how vocabularies are combined.

Shards keep what a data set says; this module turns it into targets at load time, so that another policy never
needs other shards. Facts and decisions are those of the CheXpert labeler (arXiv 1901.07031) and of the code
released with arXiv 2106.00116: `paper` is what was published, `corrected` is what the labeler's definition
says. PadChest's tokens have their own rules, in `padchest_labels`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from scaletransfer import padchest_labels

POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

# The order of the official train.csv and valid.csv.
CHEXPERT_COLUMNS: tuple[str, ...] = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

# A data set's own name -> the name that every source shares. Order follows the own name, so "Effusion" of
# CheXpert stands between "No Finding" and "Pleural Other"; published checkpoints have their outputs in that
# order.
SHOWN_NAMES: dict[str, str] = {"Pleural Effusion": "Effusion"}
_OWN_NAMES = {shown: own for own, shown in SHOWN_NAMES.items()}

CHEXPERT_RAW: tuple[str, ...] = tuple(SHOWN_NAMES.get(name, name) for name in sorted(CHEXPERT_COLUMNS))
CHEXPERT_FINDINGS: tuple[str, ...] = tuple(name for name in CHEXPERT_RAW if name != NO_FINDING)

# The 14 findings of ChestX-ray14 (arXiv 1705.02315) in the words of its table, and "No Finding".
NIH_RAW: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "No Finding",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
NIH_FINDINGS: tuple[str, ...] = tuple(name for name in NIH_RAW if name != NO_FINDING)

# Multi-label sources whose raw names are findings (and "No Finding"), and those names in index order. A new source
# adds a line.
STATE_SOURCES: dict[str, tuple[str, ...]] = {"chexpert": CHEXPERT_RAW, "mimic": CHEXPERT_RAW, "nih": NIH_RAW}

# Its raw names are the tokens of its Labels column, each of which stands for some findings, or for none.
PADCHEST = "padchest"
PADCHEST_FINDINGS: tuple[str, ...] = padchest_labels.FINDINGS

PolicyName = Literal["paper", "corrected"]
POLICY_NAMES: tuple[PolicyName, ...] = ("paper", "corrected")
_CHOICES: dict[str, tuple[str, ...]] = {
    "uncertain": ("ignore", "ones", "zeros"),
    "blank": ("ignore", "zeros"),
}
_VALUES: dict[str, float] = {"ignore": np.nan, "ones": 1.0, "zeros": 0.0}

# Rows handled at once: the work arrays stay in the cache and 10 million rows need no second copy of the
# table.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LabelPolicy:
    """How raw states become targets."""

    name: PolicyName = "corrected"
    """What "No Finding" = 1 does. `paper`: all findings become 0, Support Devices too, as the published code
    did. `corrected`: the findings become 0 and Support Devices stays, as the labeler defines it."""
    uncertain: Literal["ignore", "ones", "zeros"] = "ignore"
    """What -1 becomes: unknown (masked), 1 or 0 (U-Ignore, U-Ones, U-Zeros of arXiv 1901.07031)."""
    blank: Literal["ignore", "zeros"] = "ignore"
    """What "not mentioned" becomes: unknown (masked) or 0."""
    per_label: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Exceptions: finding -> {"uncertain": ..., "blank": ...}, either key or both."""

    def __post_init__(self) -> None:
        if self.name not in POLICY_NAMES:
            raise ValueError(
                f"labels.name is {self.name!r}; it must be one of {', '.join(POLICY_NAMES)}"
                f"{_nearest(str(self.name), POLICY_NAMES)}."
            )
        _check_choices("labels", {"uncertain": self.uncertain, "blank": self.blank})
        if not isinstance(self.per_label, Mapping):
            raise ValueError("labels.per_label must be a mapping of finding -> {uncertain: ..., blank: ...}.")
        for label, choices in self.per_label.items():
            if not isinstance(choices, Mapping):
                raise ValueError(
                    f"labels.per_label.{label} must be a mapping such as {{uncertain: ones}}, not {choices!r}."
                )
            _check_choices(f"labels.per_label.{label}", choices)

    def value(self, label: str, kind: Literal["uncertain", "blank"]) -> float:
        """The target (0, 1 or NaN) of an `uncertain` or `blank` cell of the finding `label`."""
        default = self.uncertain if kind == "uncertain" else self.blank
        return _VALUES[self.per_label.get(label, {}).get(kind, default)]


def vocabulary(source: str, policy: LabelPolicy | str, raw_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the columns of `targets` for `source`, in order.

    `policy` is a LabelPolicy or its name; "raw" gives the raw names, with "No Finding". `raw_names` (the
    index's label names) is needed only for a source that this module doesn't know.

    Raises ValueError for an unknown source without `raw_names`, an unknown policy, or an exception in
    `policy.per_label` for a finding that doesn't exist.
    """
    if raw_names is not None:
        names = tuple(raw_names)
    elif source == PADCHEST:
        names = tuple(padchest_labels.reviewed())
    elif source in STATE_SOURCES:
        names = STATE_SOURCES[source]
    else:
        known = (*STATE_SOURCES, PADCHEST)
        raise ValueError(
            f"There is no finding vocabulary for the source {source!r}; known are {', '.join(known)}"
            f"{_nearest(source, known)}."
        )
    if policy == "raw":
        return names
    if isinstance(policy, str):
        policy = LabelPolicy(name=policy)  # type: ignore[arg-type]  # __post_init__ checks it
    findings = PADCHEST_FINDINGS if source == PADCHEST else tuple(name for name in names if name != NO_FINDING)
    every = {name for table in STATE_SOURCES.values() for name in table if name != NO_FINDING}
    every.update(PADCHEST_FINDINGS, findings)
    for label in policy.per_label:
        if label not in every:
            raise ValueError(
                f"labels.per_label names {label!r}, which is no finding of any source{_nearest(label, every)}."
            )
    return findings


def targets(
    raw: npt.NDArray[np.integer],
    raw_names: Sequence[str],
    source: str,
    policy: LabelPolicy | str = "corrected",
) -> npt.NDArray[np.float32]:
    """Raw states to targets.

    raw: integer [n, len(raw_names)] of POSITIVE, NEGATIVE, UNCERTAIN, NOT_MENTIONED; of PadChest's tokens, POSITIVE
    where the row lists the token, else NEGATIVE.
    Returns float32 [n, F] with F = len(vocabulary(source, policy)); NaN is unknown. "No Finding" = 1 comes
    first and overrides what the findings' own cells say, as in the published code; then the policy treats
    what is left. A finding of PadChest is 1 where a token of the row stands for it, by the rule that the policy
    names (`padchest_labels`), else 0: there is nothing uncertain.

    Raises ValueError for another shape, a state outside the four, or names that don't belong to the source.
    """
    if isinstance(policy, str):
        policy = LabelPolicy(name=policy)  # type: ignore[arg-type]  # __post_init__ checks it
    raw_names = tuple(raw_names)
    names = vocabulary(source, policy, None if source in STATE_SOURCES else raw_names)
    raw = np.asarray(raw)
    if raw.ndim != 2 or raw.shape[1] != len(raw_names) or raw.dtype.kind not in "iu":
        raise ValueError(
            f"Raw labels of {source} must be integers of shape [n, {len(raw_names)}], "
            f"not {raw.dtype} {list(raw.shape)}."
        )
    if source == PADCHEST:
        return _token_targets(raw, padchest_labels.token_matrix(raw_names, policy.name), source)
    columns = _columns(names, raw_names, source)
    healthy = raw_names.index(NO_FINDING) if NO_FINDING in raw_names else None
    # table[label, healthy, state + 2] is the target; states run from NOT_MENTIONED (-2) to POSITIVE (1).
    table = np.zeros((len(names), 2, 4), np.float32)
    for row, name in enumerate(names):
        table[row, :] = (policy.value(name, "blank"), policy.value(name, "uncertain"), 0.0, 1.0)
        if policy.name == "paper" or name != SUPPORT_DEVICES:
            table[row, 1] = 0.0
    flat, base = table.reshape(-1), 8 * np.arange(len(names), dtype=np.int16)
    assert flat.size <= np.iinfo(np.int16).max, "more labels than the 16-bit look-up holds"
    out = np.empty((len(raw), len(names)), np.float32)
    for start in range(0, len(raw), _CHUNK):
        part = raw[start : start + _CHUNK]
        _check_states(part, NOT_MENTIONED, f"Raw labels of {source}", "1, 0, -1 (uncertain) and -2 (not mentioned)")
        place = part[:, columns].astype(np.int16) + (base - NOT_MENTIONED).astype(np.int16)
        if healthy is not None:
            place += np.where(part[:, healthy] == POSITIVE, np.int16(4), np.int16(0))[:, None]
        np.take(flat, place, out=out[start : start + _CHUNK], mode="clip")
    return out


def _token_targets(
    raw: npt.NDArray[np.integer], matrix: npt.NDArray[np.float32], source: str
) -> npt.NDArray[np.float32]:
    """float32 [n, F]: 1 where a listed token stands for the finding. raw: [n, T] of 1 and 0; matrix: [T, F]."""
    out = np.empty((len(raw), matrix.shape[1]), np.float32)
    rows = _CHUNK // 8  # a row has some 200 tokens, not 14 states
    for start in range(0, len(raw), rows):
        part = raw[start : start + rows]
        _check_states(part, NEGATIVE, f"Raw labels of {source}", "1 (listed) and 0")
        np.greater(part.astype(np.float32) @ matrix, 0, out=out[start : start + rows], casting="unsafe")
    return out


def _check_states(part: npt.NDArray[np.integer], least: int, what: str, allowed: str) -> None:
    low, high = int(part.min(initial=0)), int(part.max(initial=0))
    if low < least or high > POSITIVE:
        raise ValueError(f"{what} hold the state {low if low < least else high}; allowed are {allowed}.")


def combine(vocabularies: Sequence[Sequence[str]], how: Literal["intersection", "union"] | str) -> tuple[str, ...]:
    """Findings of several sources that train together, in one order for all of them.

    Equal vocabularies keep their order. Otherwise the order is alphabetical by the data sets' own names:
    where every source calls it "Pleural Effusion" (CheXpert, MIMIC), Effusion is sorted as such; where one
    calls it "Effusion" (NIH, PadChest), it is sorted as that. For the paper's merges (intersections) both
    give the same list.

    Raises ValueError for an unknown `how`, no vocabulary, a name that occurs twice, or an empty result.
    """
    if how not in ("intersection", "union"):
        raise ValueError(
            f"Vocabularies are combined by 'intersection' or 'union', not {how!r}"
            f"{_nearest(str(how), ('intersection', 'union'))}."
        )
    tables = [tuple(table) for table in vocabularies]
    if not tables:
        raise ValueError("There is no vocabulary to combine; name at least one source.")
    for table in tables:
        for name in table:
            if table.count(name) > 1:
                raise ValueError(f"The label {name!r} occurs twice in one vocabulary.")
    if len(set(tables)) == 1:
        return tables[0]
    sets = [set(table) for table in tables]
    chosen = set.intersection(*sets) if how == "intersection" else set.union(*sets)
    if not chosen:
        raise ValueError("The sources have no finding in common; combine them by 'union'.")
    own = all(list(table) == sorted(table, key=_own_name) for table in tables)
    return tuple(sorted(chosen, key=_own_name if own else None))


def project(values: npt.NDArray[np.float32], names: Sequence[str], onto: Sequence[str]) -> npt.NDArray[np.float32]:
    """Columns of `values` (float32 [n, len(names)]) in the order of `onto`: float32 [n, len(onto)].

    A name of `onto` that `names` lacks becomes NaN (unknown). Raises ValueError for another shape.
    """
    values = np.asarray(values, np.float32)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"Targets must have shape [n, {len(names)}], not {list(values.shape)}.")
    if tuple(names) == tuple(onto):
        return values
    place = {name: column for column, name in enumerate(names)}
    out = np.full((len(values), len(onto)), np.nan, np.float32)
    there = [column for column, name in enumerate(onto) if name in place]
    out[:, there] = values[:, [place[onto[column]] for column in there]]
    return out


def _own_name(name: str) -> str:
    return _OWN_NAMES.get(name, name)


def _columns(names: Sequence[str], raw_names: Sequence[str], source: str) -> list[int]:
    """Where each finding stands among the raw names. A missing one is an error: the published code repeated
    the column before it in silence."""
    for name in (*names, *((NO_FINDING,) if NO_FINDING in STATE_SOURCES.get(source, ()) else ())):
        if name not in raw_names:
            raise ValueError(
                f"The labels of {source} lack {name!r}; they are {', '.join(raw_names)}. "
                "Make the shards again from the complete table."
            )
    return [raw_names.index(name) for name in names]


def _check_choices(where: str, choices: Mapping[str, str]) -> None:
    for key, value in choices.items():
        if key not in _CHOICES:
            raise ValueError(
                f"{where} has no option {key!r}; it has {' and '.join(_CHOICES)}{_nearest(str(key), _CHOICES)}."
            )
        if value not in _CHOICES[key]:
            raise ValueError(f"{where}.{key} is {value!r}; it must be one of {', '.join(_CHOICES[key])}.")


def _nearest(word: str, words: object) -> str:
    near = difflib.get_close_matches(word, [str(w) for w in words], n=1)  # type: ignore[attr-defined]
    return f" (did you mean {near[0]!r}?)" if near else ""
