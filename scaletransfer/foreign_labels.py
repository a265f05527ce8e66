"""Labels in tars that others made: a class number in a member `.cls`, or a field of a member `.json`."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletransfer.labels import NOT_MENTIONED, POSITIVE

LARGEST_JSON = 1 << 20
"""Bytes of a `.json` that are parsed."""
LARGEST_CLS = 64
SOURCES = (
    "--label cls (a member .cls with the class number), or --label json:FIELD (a field of the member .json that holds "
    "a class number, a class name with --label-names, a list of states or of findings, or an object of finding: state)"
)
_MOST_CLASSES = 1_000_000
_MOST_FINDINGS = 10_000
_STATES = "1, 0, -1 (uncertain), -2 or null (not mentioned)"

Label = int | str | tuple[int, ...] | tuple[str, ...] | dict[str, int]
"""Of one sample: class number, class name, states in order, findings that are there, states by finding."""
FORMS = {
    "class number": "classes",
    "class name": "classes",
    "list of states": "states",
    "list of findings": "tokens",
    "object of states": "states",
}
"""What a label can look like -> `label_kind` of the index."""
_FORM_WITH = {form: f"{'an' if form[0] == 'o' else 'a'} {form}" for form in FORMS}


@dataclass(frozen=True, slots=True)
class LabelRule:
    """Where the label of a sample is: a member's extension, and of JSON the field."""

    extension: str
    field: str

    @classmethod
    def of(cls, text: str) -> LabelRule:
        """From the option --label; ValueError, naming what there is, for anything else."""
        kind, colon, name = text.partition(":")
        if text == "cls" or (kind == "json" and colon and name):
            return cls(kind, name)
        raise ValueError(f"--label {text}: no label can be read from that; there are {SOURCES}")

    @property
    def largest(self) -> int:
        """Bytes that the member may have."""
        return LARGEST_CLS if self.extension == "cls" else LARGEST_JSON

    def parse(self, content: bytes) -> Label | None:
        """The label in the content of the member; None for a field that is absent or null.

        Raises ValueError, naming neither file nor member, for anything that is no label.
        """
        if self.extension == "cls":
            if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
                raise ValueError(f"is no class number but {content[:40]!r}")
            return int(content)
        try:
            value = json.loads(content, parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON ({str(error)[:80]})") from None
        for part in (self.field,) if isinstance(value, dict) and self.field in value else self.field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        empty = value is None or (isinstance(value, float) and math.isnan(value))
        return None if empty else self._label(value)

    def _label(self, value: Any) -> Label:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # tables with empty cells make floats of classes
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            if isinstance(value, int) and not 0 <= value < 10**9:
                raise ValueError(f"has the class number {str(value)[:40]} in {self.field!r}; classes are 0, 1, 2, ...")
            return value
        if isinstance(value, dict):
            return {str(name): self._state(state) for name, state in value.items()}
        if isinstance(value, list) and len(value) <= _MOST_FINDINGS:
            if value and all(isinstance(name, str) for name in value):
                return tuple(value)
            return tuple(self._state(state) for state in value)
        raise ValueError(f"has no label in {self.field!r} but {str(value)[:40]!r}; {SOURCES}")

    def _state(self, value: Any) -> int:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return NOT_MENTIONED
        if not isinstance(value, (int, float)) or value not in (1, 0, -1, -2):
            raise ValueError(f"has the state {str(value)[:40]!r} in {self.field!r}; states are {_STATES}")
        return int(value)


@dataclass(slots=True)
class LabelColumn:
    """The labels of all samples in their order, kept small; what they are called is known at the end."""

    names: tuple[str, ...] | None
    """From --label-names; None: as found."""
    form: str = ""
    """One of FORMS; "" until a label tells."""
    _classes: array[int] = field(default_factory=lambda: array("i"))
    _place: dict[str, int] = field(default_factory=dict)
    _lengths: array[int] = field(default_factory=lambda: array("i"))
    _columns: array[int] = field(default_factory=lambda: array("H"))
    _states: array[int] = field(default_factory=lambda: array("b"))

    def __post_init__(self) -> None:
        self._place = {name: number for number, name in enumerate(self.names or ())}

    def add(self, label: Label) -> None:
        """The next sample's; ValueError, naming neither file nor member, where it does not fit those before it."""
        form = _form(label)
        if form and form != self.form:
            # an empty list, which may be either, came before
            if self.form and not (self.form == "list of findings" and not self._columns and form == "list of states"):
                raise ValueError(f"has {_FORM_WITH[form]} where samples before it have {_FORM_WITH[self.form]}")
            if form == "list of states" and len(self._lengths):
                raise ValueError("has a list of states where samples before it have an empty list")
            self.form = form
        self.form = self.form or "list of findings"  # an empty list
        if isinstance(label, int):
            self._add_class(label)
        elif isinstance(label, str):
            if self.names is None:
                raise ValueError(f"has the class name {label!r}, whose number --label-names tells: give it")
            self._add_class(self._known(label))
        elif isinstance(label, dict):
            self._add_states([self._known(name) for name in label], list(label.values()))
        elif self.form == "list of findings":
            columns = sorted({self._known(str(name)) for name in label})
            self._add_states(columns, [POSITIVE] * len(columns))
        else:
            expected = len(self.names) if self.names is not None else (self._lengths[0] if self._lengths else None)
            if expected is not None and len(label) != expected:
                why = "--label-names has" if self.names is not None else "samples before it have"
                raise ValueError(f"has {len(label)} states where {why} {expected}")
            self._add_states(list(range(len(label))), [int(state) for state in label])

    def finish(self) -> tuple[str, tuple[str, ...], NDArray[Any]]:
        """(label_kind, label names, i4 [n] of classes or i1 [n, L] of states).  Findings that were not named beforehand
        are in alphabetical order, lists of states and classes have numbers for names."""
        kind = FORMS[self.form]
        if kind == "classes":
            classes = np.array(self._classes, "<i4")
            return kind, self.names or tuple(str(number) for number in range(int(classes.max()) + 1)), classes
        lengths = np.array(self._lengths, np.int64)
        columns, states = np.array(self._columns, np.int64), np.array(self._states, "i1")
        if self.names is not None:
            names = self.names
        elif self.form == "list of states":
            names = tuple(str(number) for number in range(int(lengths[0])))
        else:
            names = tuple(sorted(self._place))
            place = {name: number for number, name in enumerate(names)}
            columns = np.array([place[name] for name in self._place], np.int64)[columns]
        if not names:
            raise ValueError("not one sample has a finding; name them by --label-names")
        rows = np.full((len(lengths), len(names)), 0 if kind == "tokens" else NOT_MENTIONED, "i1")
        rows[np.repeat(np.arange(len(lengths)), lengths), columns] = states
        return kind, names, rows

    def _add_class(self, number: int) -> None:
        if self.names is not None and number >= len(self.names):
            raise ValueError(f"has the class {number}, and --label-names has {len(self.names)}: 0 to the last of them")
        if number >= _MOST_CLASSES:
            raise ValueError(f"has the class {number}; there can be {_MOST_CLASSES:,} classes")
        self._classes.append(number)

    def _add_states(self, columns: Sequence[int], states: Sequence[int]) -> None:
        self._lengths.append(len(columns))
        self._columns.extend(columns)
        self._states.extend(states)

    def _known(self, name: str) -> int:
        place = self._place.get(name)
        if place is None:
            if self.names is not None:
                raise ValueError(f"has the label {name!r}, which is not among the {len(self.names)} of --label-names")
            if not name.strip() or len(self._place) >= _MOST_FINDINGS:
                raise ValueError(f"has the finding {name[:40]!r}; there can be {_MOST_FINDINGS:,}, each with a name")
            place = self._place[name] = len(self._place)
        return place


def _form(label: Label) -> str:
    """One of FORMS; "" for an empty list."""
    if isinstance(label, (int, str)):
        return "class number" if isinstance(label, int) else "class name"
    if isinstance(label, dict):
        return "object of states"
    if not label:
        return ""
    return "list of findings" if isinstance(label[0], str) else "list of states"


def read_label_names(text: str | None) -> tuple[str, ...] | None:
    """The option --label-names: a text file with one name a line, or the names with commas between them.

    Raises ValueError for a file that cannot be read, and for an empty name or one that is there twice.
    """
    if text is None:
        return None
    path = Path(text)
    if path.is_file():
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--label-names {path} is not a readable text file ({error})") from None
        while names and not names[-1].strip():
            names.pop()
    elif "/" in text or text.endswith((".txt", ".csv")):
        raise ValueError(f"--label-names {path} does not exist; give a file with one name a line, or the names: a,b,c")
    else:
        names = text.split(",")
    names = [name.strip() for name in names]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if not names or "" in names or twice:
        what = f"names {twice[0]!r} twice" if twice and twice[0] else "has an empty name"
        raise ValueError(f"--label-names {text} {what}; give each label once, in the order of the classes")
    return tuple(names)
