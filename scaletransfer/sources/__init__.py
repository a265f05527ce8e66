"""Data sets as their publishers lay them out: `open_source(name, root, **options)` gives an iterator of
records.

A new source is one module with a subclass of `Source` and one line in SOURCES.  A source of the user's own needs no
line: it is named `module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Sequence
from typing import Any

from scaletransfer.sources.base import DEFAULT_VIEWS, SPLITS, VIEWS, Record, Source, nearest, parse_views

__all__ = ["DEFAULT_VIEWS", "SOURCES", "SPLITS", "VIEWS", "Record", "Source", "open_source", "parse_views"]
__all__ += ["named_values", "source_class", "source_options"]

# name -> module and class, imported only when the source is opened.
SOURCES: dict[str, tuple[str, str]] = {
    "chexpert": ("scaletransfer.sources.chexpert", "CheXpert"),
    "mimic": ("scaletransfer.sources.mimic", "MIMIC"),
    "nih": ("scaletransfer.sources.nih", "NIH"),
    "padchest": ("scaletransfer.sources.padchest", "PadChest"),
    "imagenet1k": ("scaletransfer.sources.imagenet", "ImageNet1k"),
    "imagenet21k": ("scaletransfer.sources.imagenet", "ImageNet21k"),
    "cifar10": ("scaletransfer.sources.cifar", "CIFAR10"),
    "cifar100": ("scaletransfer.sources.cifar", "CIFAR100"),
    "flowers": ("scaletransfer.sources.flowers", "Flowers"),
    "pets": ("scaletransfer.sources.pets", "Pets"),
    "covidx": ("scaletransfer.sources.covidx", "COVIDx"),
    "tuberculosis": ("scaletransfer.sources.tuberculosis", "Tuberculosis"),
    "image_folder": ("scaletransfer.sources.image_folder", "ImageFolder"),
}


def source_class(name: str) -> type[Source]:
    """The class of the source `name`. Raises ValueError, with the nearest name, if there is none."""
    if ":" in name:
        return _foreign_class(name)
    if name not in SOURCES:
        raise ValueError(f"There is no source {name!r}{nearest(name, SOURCES)}; sources are {', '.join(SOURCES)}.")
    module, attribute = SOURCES[name]
    found = getattr(importlib.import_module(module), attribute)
    assert issubclass(found, Source) and found.name == name
    return found  # type: ignore[no-any-return]


def _foreign_class(name: str) -> type[Source]:
    """A source outside of this package, `module:Class`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The source {name} can't be imported ({error}); name it as module:Class.") from error
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise ValueError(f"{name} is no subclass of scaletransfer.sources.Source.")
    return found


def source_options(name: str) -> tuple[str, ...]:
    """Names of the options that `open_source(name, root, **options)` takes."""
    parameters = inspect.signature(source_class(name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def named_values(entries: Sequence[str]) -> dict[str, Any]:
    """Options as a command takes them: {name: value} of entries such as "valid_share=0.1"; a value is JSON, or text.

    Raises ValueError for an entry of another form, and for protocol and views, which commands take by themselves.
    """
    values: dict[str, Any] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise ValueError(f"--option is {entry!r}; give NAME=VALUE, for example valid_share=0.1")
        if name in ("protocol", "views"):  # the command's own option would win, unseen
            raise ValueError(f"--option is {entry!r}; that is an option of its own: --{name} {value}")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def open_source(name: str, root: str | os.PathLike[str], **options: object) -> Source:
    """Open a data set without opening an image.

    name: one of SOURCES, or module:Class; root: its folder; options: those of its class (`source_options(name)`).
    Raises ValueError for an unknown source or option (with the nearest name) and for a folder that isn't that
    data set's.
    """
    cls, known = source_class(name), source_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"The source {name} has no option {option!r}{nearest(option, known)}; "
                f"it has {', '.join(known) if known else 'none'}."
            )
    return cls(root, **options)
