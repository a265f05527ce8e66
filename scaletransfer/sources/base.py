"""What every source is: an iterator of records over a data set's own tables, which opens no image."""

from __future__ import annotations

import difflib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """The image's path relative to the source's root, with forward slashes; in an archive, the archive's path, two
    slashes, and the name inside ("0.zip//1.png", "train.tar//n01440764.tar//n01440764_10026.JPEG")."""
    labels: tuple[int, ...] | tuple[str, ...] | int
    """By `Source.label_kind`: raw states in the order of `label_names`, the row's tokens in the order of the table,
    or the class index."""
    view: str
    """One of VIEWS, or what the table says there; "" where the source has none."""
    span: tuple[int, int] | None = None
    """(offset, bytes) of the image in the file that `image` begins with, where it is part of a plain tar."""
    line: int = field(default=0, compare=False)
    """The line of the official table or list that names it, for error sentences; 0 where there is none."""


class Source(ABC):
    """A data set in a folder. Iterating gives its records in the order of the official tables, all splits
    together; every pass gives the same. Keyword arguments of `__init__` are the source's options (see
    `open_source`)."""

    name: ClassVar[str]
    task: Literal["multilabel", "multiclass"]
    licence: ClassVar[str]
    """Of the data, one line; it travels in the index."""
    public: ClassVar[bool]
    """True: keys are made with PUBLIC_SALT. False: with the user's salt, because identifiers are
    sensitive."""

    root: Path
    label_names: tuple[str, ...]
    """Of states and tokens: all that a record may have; of classes: their names by index."""
    tokens: bool = False
    """Whether a multi-label source lists what an image shows by name; what is not listed is absent."""
    skipped: list[str]
    """Files that were passed over in the last complete pass, each with its reason."""
    left_out: Counter[str]
    """Rows of the table that gave no record in the last complete pass, by reason; not those of other views."""
    notes: list[str]
    """Sentences that whoever uses these records should read, of the last complete pass."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.skipped, self.left_out, self.notes = [], Counter(), []
        if not self.root.is_dir():
            raise ValueError(
                f"The root of {self.name}, {self.root}, is not a folder; give the data set's by --root, or data.root."
            )

    @abstractmethod
    def __iter__(self) -> Iterator[Record]:
        """Records; ValueError, naming file and line, for what the table must not say."""

    @property
    def label_kind(self) -> Literal["states", "tokens", "classes"]:
        """What `Record.labels` holds."""
        if self.task == "multiclass":
            return "classes"
        return "tokens" if self.tokens else "states"

    def listed(self) -> Iterator[Record]:
        """The records in the order of the official table, where a protocol trains in another one."""
        return iter(self)

    def locate(self, records: Sequence[Record]) -> list[Record]:
        """The records with `image` and `span` where the image really lies; as they are where none was found.

        Called where images are needed, never for a listing alone.  Here: the same name with the suffix .dcm.
        """
        return [self._or_dicom(record) for record in records]

    def _or_dicom(self, record: Record) -> Record:
        if "//" in record.image or os.path.exists(self.root / record.image):
            return record
        dicom = os.path.splitext(record.image)[0] + ".dcm"
        return replace(record, image=dicom) if os.path.exists(self.root / dicom) else record


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
