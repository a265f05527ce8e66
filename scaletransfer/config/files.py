"""Typed configuration from YAML files and `a.b=c` overrides, for any tree of frozen dataclasses.

A file is plain data. Its top-level `base:` names files to read first; sections (dataclass fields) merge key
by key, any other value replaces the earlier one whole. Every value remembers where it was written, so an
error can say so. The schema lives in `schema.py`; this module knows no key of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp")
)


class ConfigError(ValueError):
    """A value that a configuration may not have; `key` is its dotted name and `reason` says what it must
    be."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class Value:
    """One leaf as it was written: the parsed value, where it stands, and for an override its raw text."""

    value: Any
    origin: str
    raw: str | None = None


@dataclass(frozen=True)
class Key:
    """One leaf of a schema: dotted name, type, default (`dataclasses.MISSING` where required),
    documentation."""

    name: str
    hint: Any
    default: Any
    doc: str


def check(ok: bool, key: str, value: object, must: str) -> None:
    """Refuse `value` for `key` unless `ok`; every condition is written so that NaN fails it."""
    if not ok:
        raise ConfigError(key, f"must be {must}, not {shown(value)}.")


# --- the schema --------------------------------------------------------------------------------------------


def is_section(hint: Any) -> bool:
    """Whether a field of this type is a section, that is a dataclass, and not a value."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def hints(cls: type) -> dict[str, Any]:
    """The resolved types of a dataclass's fields, by name."""
    types_by_name = get_type_hints(cls)
    return {field.name: types_by_name[field.name] for field in dataclasses.fields(cls)}


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every leaf of the schema `cls`, in the order of the source, with the docstring that stands under it."""
    import docstring_parser  # comes with jsonargparse[signatures]

    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]  # a field may be inherited
    parsed = [docstring_parser.parse_from_object(base) for base in bases]
    documentation = {p.arg_name: p.description for one in parsed for p in one.params}
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}", hints(cls)[field.name]
        if is_section(hint):
            yield from keys(hint, f"{name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Key(name, hint, default, " ".join((documentation.get(field.name) or "").split()))


def type_name(hint: Any) -> str:
    """What a person would call the type `hint`: "a number", "one of sgd, sgd_agc", "a list of text or
    null"."""
    simple = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        Any: "any value",
    }
    if hint in simple:
        return simple[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_plural(arguments[0])} to {type_name(arguments[1])}"
    return str(hint)


def _plural(hint: Any) -> str:
    return {float: "numbers", int: "whole numbers"}.get(hint, type_name(hint))


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean X?)` for the closest of `known`, or nothing when none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


# --- YAML --------------------------------------------------------------------------------------------------


def parse_yaml(text: str, origin: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Plain data from YAML text, and the line of every mapping key by its path.

    Raises ValueError with one sentence that names `origin` for a syntax error, a tag (nothing is constructed
    from it), an alias (its expansion can be exponential), or a key that is written twice.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{origin}: the alias *{event.anchor} is refused; write the value out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            _check_node(node, origin, (), lines)
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}, line {mark.line + 1}" if mark else origin
        raise ValueError(f"{place}: this is not YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{origin}: this is not YAML: {' '.join(str(error).split())}.") from None


def _check_node(node: yaml.Node, origin: str, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    where = f"{origin}, line {node.start_mark.line + 1}"
    if node.tag not in PLAIN_TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ValueError(f"{where}: the tag {tag} is refused; a configuration holds plain values only.")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, origin, path, {})
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            _check_node(key_node, origin, path, lines)
            key = (*path, str(key_node.value))
            line = key_node.start_mark.line + 1
            if key in lines:
                name = ".".join(key)
                raise ValueError(
                    f"{origin}, line {line}: the key {name} stands in line {lines[key]} already; keep one."
                )
            lines[key] = line
            _check_node(value_node, origin, key, lines)


def read_file(path: Path, cls: type, _open: tuple[Path, ...] = ()) -> dict[str, Value]:
    """The values of one YAML file over those of its `base:` files, by dotted key.

    Raises ValueError naming the file, the line and the key for whatever is wrong in it; FileNotFoundError
    where `path` itself is missing.
    """
    chain = (*_open, path.resolve())
    if path.resolve() in _open:
        names = " -> ".join(p.name for p in chain[_open.index(path.resolve()) :])
        raise ValueError(f"{path}: its base files name each other in a circle ({names}); remove one of the links.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not a text file; a configuration is YAML in UTF-8.") from None
    data, lines = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a configuration is a mapping of keys to values, not {shown(data)}.")
    values: dict[str, Value] = {}
    for base in _bases(data.pop("base", []), path):
        if not (path.parent / base).is_file():
            raise ValueError(
                f"{path}: its base file {base} does not exist (looked for {path.parent / base}; "
                "a base is relative to the file that names it)."
            )
        values |= read_file(path.parent / base, cls, chain)
    return values | flatten(data, cls, str(path), lines)


def _bases(value: Any, path: Path) -> list[str]:
    bases = [value] if isinstance(value, str) else value
    if not isinstance(bases, list) or not all(isinstance(item, str) for item in bases):
        raise ValueError(f"{path}: base must be a list of files, not {shown(value)}.")
    return bases


def read_override(text: str, cls: type) -> dict[str, Value]:
    """The values that one override such as `optimizer.base_lr=0.003` sets; the part after = is YAML."""
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise ValueError(
            f"{text!r} is no override: write key=value, for example seed=1; a file is given as --config FILE."
        )
    if name.startswith("-"):
        raise ValueError(f"unknown option {name}: an override has no dashes, write {text.lstrip('-')}.")
    parts = name.split(".")
    known = set(_names(cls))
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        if outer in known and not any(other.startswith(f"{outer}.") for other in known):
            raise ValueError(f"in the override {text!r}: {outer} is one value; write it whole, {outer}=...")
    origin = f"in the override {text!r}"
    data, _ = parse_yaml(raw, origin)
    for part in reversed(parts):
        data = {part: data}
    return {
        key: Value(value.value, value.origin, raw if key == name else None)
        for key, value in flatten(data, cls, origin, {}).items()
    }


def flatten(
    data: Mapping[str, Any],
    cls: type,
    origin: str,
    lines: Mapping[tuple[str, ...], int],
    path: tuple[str, ...] = (),
    root: type | None = None,
) -> dict[str, Value]:
    """`{"a": {"b": 1}}` -> `{"a.b": Value(1, ...)}`; an unknown key or a section that is none is a
    ValueError.

    `path` leads from the schema `root` to its section `cls`; `lines` gives the line of a key where one is
    known.
    """
    values: dict[str, Value] = {}
    root = root or cls
    fields = hints(cls)
    for part, value in data.items():
        here = (*path, str(part))
        name = ".".join(here)
        where = f"{origin}, line {lines[here]}" if here in lines else origin
        if part not in fields:
            raise ValueError(f"{where}: unknown key {name}{_suggestion(here, fields, root)}.")
        if not is_section(fields[part]):
            values[name] = Value(value, where)
        elif isinstance(value, dict):
            values |= flatten(value, fields[part], origin, lines, here, root)
        else:
            known = ", ".join(hints(fields[part]))
            raise ValueError(f"{where}: {name} is a section with the keys {known}; it cannot be {shown(value)}.")
    return values


def _suggestion(path: tuple[str, ...], siblings: Mapping[str, Any], root: type) -> str:
    """What a person may have meant by the unknown key `path`: a sibling, the same name elsewhere, or the
    choice."""
    close = difflib.get_close_matches(path[-1], list(siblings), n=1, cutoff=0.6)
    elsewhere = [name for name in _names(root) if name.rpartition(".")[2] == path[-1]]
    if close or elsewhere:
        return f" (did you mean {'.'.join((*path[:-1], close[0])) if close else ' or '.join(elsewhere)}?)"
    return f" ({'.'.join(path[:-1]) or 'the configuration'} has {', '.join(siblings)})"


def _names(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in hints(cls).items():
        yield f"{prefix}{name}"
        if is_section(hint):
            yield from _names(hint, f"{prefix}{name}.")


# --- values to dataclasses ---------------------------------------------------------------------------------


def build(cls: type[T], values: Mapping[str, Value], prefix: str = "") -> T:
    """The dataclass `cls` from values by dotted key; absent keys take their defaults.

    Raises ValueError with one sentence that names the key, the value, what is expected and where the value
    was written, for a wrong type, a missing required key, or whatever a `__post_init__` refuses by
    `ConfigError`.
    """
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        name, hint = f"{prefix}{field.name}", hints(cls)[field.name]
        if is_section(hint):
            arguments[field.name] = build(hint, values, f"{name}.")
        elif name in values:
            arguments[field.name] = convert(name, values[name], hint)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the key {name} is required ({type_name(hint)}): set it in a file or as {name}=...")
    try:
        return cls(**arguments)
    except ConfigError as error:
        _refuse(error, values)


def _refuse(error: ConfigError, values: Mapping[str, Value]) -> NoReturn:
    written = values.get(error.key)
    raise ValueError(f"{written.origin}: {error}" if written else str(error)) from None


def convert(name: str, written: Value, hint: Any) -> Any:
    """`written` as the type `hint`, by jsonargparse; text such as "1e-4", which YAML 1.1 leaves text, is a
    number.

    The raw text of an override is tried second, so that `name=2024` is text where text is wanted.
    """
    import jsonargparse

    parser = _value_parser(hint)
    candidates = [written.value]
    if written.raw is not None and not isinstance(written.value, dict | list | None):
        candidates.append(written.raw)
    if written.value is None and type(None) not in get_args(hint):
        candidates = []  # jsonargparse takes null for "not given" and lets it pass
    for candidate in candidates:
        try:
            return parser.parse_object({"value": candidate}).value
        except jsonargparse.ArgumentError:
            continue
    close = nearest(str(written.value), [str(c) for c in get_args(hint)]) if get_origin(hint) is Literal else ""
    raise ValueError(f"{written.origin}: {name} must be {type_name(hint)}, not {shown(written.value)}{close}.")


@cache
def _value_parser(hint: Any) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def shown(value: Any) -> str:
    """A value as a person would write it in YAML, cut where it is long."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- dataclasses to YAML -----------------------------------------------------------------------------------


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(config: Any) -> str:
    """The dataclass tree as YAML that reads back equal."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=100)
