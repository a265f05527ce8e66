"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the archives of https://www.cs.toronto.edu/~kriz/cifar.html as they are,
or what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from scaletransfer.cifar_batches import BATCHES_10, Batch, read_batch
from scaletransfer.image_files import INSIDE
from scaletransfer.sources.base import Record, Source, nearest

_LICENCE = "no licence given; cite A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"


class _CIFAR(Source):
    """What both have in common: batches of rows, and a file with the names of the classes."""

    task = "multiclass"
    licence = _LICENCE
    public = True

    folder: ClassVar[str]
    archive: ClassVar[str]
    batches: ClassVar[Mapping[str, tuple[str, ...]]]
    """Files of each split."""
    names_file: ClassVar[str]
    official: ClassVar[Mapping[str, int]] = {"train": 50_000, "test": 10_000}

    def _open(self, names_key: str, labels_key: str, classes: int) -> None:
        """Find the files and read the names of the classes."""
        self._labels_key = labels_key
        self._file, self._inner = self._find()
        names = self._batch(self.names_file).values.get(names_key)
        where = self._where(self.names_file)
        if isinstance(names, list):  # pickles of Python 3 may hold them as bytes
            names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{where} has no list {names_key!r} of names; download {self.archive} again.")
        if len(names) != classes or len(set(names)) != classes:
            raise ValueError(
                f"{where} names {len(set(names))} classes in {names_key!r}, {self.name} has {classes}; "
                f"download {self.archive} again."
            )
        self.label_names = tuple(names)

    def __iter__(self) -> Iterator[Record]:
        self.left_out.clear()
        self.notes.clear()
        for split, files in self.batches.items():
            rows = 0
            for file in files:
                labels = self._labels(file)
                rows += len(labels)
                for row, label in enumerate(labels):
                    yield Record(
                        source_id=f"{file}/{row}",
                        split=split,
                        patient="",
                        image=f"{self._place(file)}{INSIDE}{row}.png",
                        labels=label,
                        view="",
                    )
            if rows != self.official[split]:
                self.notes.append(
                    f"the split {split} has {rows:,} images; the official {self.name} has {self.official[split]:,}."
                )

    def locate(self, records: Sequence[Record]) -> list[Record]:
        """As they are: an image is a row of a batch."""
        return list(records)

    def _find(self) -> tuple[str, bool]:
        """The file or folder, relative to the root, in which the batches lie, and whether it is the archive."""
        if (self.root / self.folder).is_dir():
            return f"{self.folder}/", False
        if (self.root / self.names_file).is_file():
            return "", False
        if (self.root / self.archive).is_file():
            return self.archive, True
        raise ValueError(
            f"{self.root} holds neither {self.folder} nor {self.archive}; --root must be the folder with one of them."
        )

    def _place(self, name: str) -> str:
        """As an image of the batch begins."""
        return f"{self._file}{INSIDE}{self.folder}/{name}" if self._inner else f"{self._file}{name}"

    def _where(self, name: str) -> str:
        return f"{self.root}/{self._place(name)}"

    def _batch(self, name: str) -> Batch:
        file, _, member = self._place(name).partition(INSIDE)
        try:
            return read_batch(self.root / file, member)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ValueError(f"{self._where(name)} is missing; download {self.archive} again.") from None

    def _labels(self, name: str) -> list[int]:
        """A class an image, all of them checked."""
        batch, where = self._batch(name), self._where(name)
        rows = len(batch.pixels(where))
        labels: Any = batch.values.get(self._labels_key)
        if not isinstance(labels, list) or len(labels) != rows:
            found = f"{len(labels)} labels" if isinstance(labels, list) else "no labels"
            raise ValueError(
                f"{where} has {rows} images and {found} in {self._labels_key!r}; download {self.archive} again."
            )
        for row, label in enumerate(labels):
            # bool is an int for isinstance
            if type(label) is not int or not 0 <= label < len(self.label_names):
                shown = label if type(label) is int and abs(label) < 1 << 64 else f"of the type {type(label).__name__}"
                raise ValueError(
                    f"{where}, image {row}: the label {shown} is not a class from 0 to {len(self.label_names) - 1}; "
                    f"download {self.archive} again."
                )
        return labels


class CIFAR10(_CIFAR):
    """`root` is the folder that holds cifar-10-python.tar.gz or cifar-10-batches-py, or is the latter.

    Training: data_batch_1 to data_batch_5; test: test_batch. An image is kept as a PNG of its 32 x 32 pixels.
    """

    name = "cifar10"
    folder, archive = "cifar-10-batches-py", "cifar-10-python.tar.gz"
    batches: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": BATCHES_10, "test": ("test_batch",)}
    names_file = "batches.meta"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._open("label_names", "labels", 10)


class CIFAR100(_CIFAR):
    """`root` is the folder that holds cifar-100-python.tar.gz or cifar-100-python, or is the latter.

    Options: `labels`: "fine", the 100 classes, or "coarse", the 20 groups of them.
    """

    name = "cifar100"
    folder, archive = "cifar-100-python", "cifar-100-python.tar.gz"
    batches: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    names_file = "meta"

    def __init__(self, root: str | os.PathLike[str], *, labels: str = "fine") -> None:
        super().__init__(root)
        classes = {"fine": 100, "coarse": 20}
        if labels not in classes:
            raise ValueError(f"There are no labels {labels!r}{nearest(str(labels), classes)}; give fine or coarse.")
        self.labels = labels
        self._open(f"{labels}_label_names", f"{labels}_labels", classes[labels])
