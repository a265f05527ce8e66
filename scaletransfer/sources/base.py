"""What every source is: an iterator of records over a data set's own tables, which opens no image."""

from __future__ import annotations

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

SPLITS: tuple[str, ...] = ("train", "valid", "test")

# PA and AP are frontal; L is lateral; LL and RL are the lateral views that CheXpert's AP/PA column names
# itself; "AP Supine" and COSTAL are PadChest's. Options name views so that one list serves several sources.
VIEWS: tuple[str, ...] = ("PA", "AP", "AP Supine", "L", "LL", "RL", "COSTAL")
DEFAULT_VIEWS: tuple[str, ...] = ("PA", "AP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image of a data set, as its official table has it."""

    source_id: str
    """The data set's own identifier. It appears in listings, never in shards."""
    split: str
    """train, valid or test."""
    patient: str
    """The data set's patient id, or "" where there is none."""
    image: str
    """The image's path relative to the source's root, with forward slashes."""
    labels: tuple[int, ...] | int
    """Raw states in the order of `Source.label_names` (multilabel), or the class index (multiclass)."""
    view: str
    """One of VIEWS, or what the table says there; "" where the source has none."""


class Source(ABC):
    """A data set in a folder. Iterating gives its records in the order of the official tables, all splits
    together; every pass gives the same. Keyword arguments of `__init__` are the source's options (see
    `open_source`)."""

    name: ClassVar[str]
    task: ClassVar[Literal["multilabel", "multiclass"]]
    licence: ClassVar[str]
    """Of the data, one line; it travels in the index."""
    public: ClassVar[bool]
    """True: keys are made with PUBLIC_SALT. False: with the user's salt, because identifiers are
    sensitive."""

    root: Path
    label_names: tuple[str, ...]
    skipped: list[str]
    """Files that were passed over in the last complete pass, each with its reason."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.skipped = []
        if not self.root.is_dir():
            raise ValueError(f"The root of {self.name}, {self.root}, is not a folder; give the data set's by --root.")

    @abstractmethod
    def __iter__(self) -> Iterator[Record]:
        """Records; ValueError, naming file and line, for what the table must not say."""


def parse_views(views: str | Iterable[str] | None) -> frozenset[str] | None:
    """Views to keep: names or one string "PA,AP"; "all" (or None) keeps every image and gives None.

    Raises ValueError for a view that no source has, and for an empty list.
    """
    names = [view.strip() for view in (views.split(",") if isinstance(views, str) else views or ["all"])]
    names = [name for name in names if name]
    if names == ["all"]:
        return None
    if not names:
        raise ValueError("--views is empty; name views such as PA,AP or all.")
    for name in names:
        if name not in VIEWS:
            raise ValueError(
                f"There is no view {name!r}; views are {', '.join(VIEWS)}, or all on its own{nearest(name, VIEWS)}."
            )
    return frozenset(names)


def nearest(word: str, words: Iterable[str] | Sequence[str] | Mapping[str, object]) -> str:
    """The hint `(did you mean ...?)` with the word that is nearest, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
