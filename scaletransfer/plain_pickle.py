"""Pickles that hold lists, dictionaries, text, numbers and arrays of bytes, read without unpickling.

`pickle` builds whatever a file asks for, and a filter in front of it still hands the file's values to numpy's own
readers of states.  Here the standard library only takes the file apart into its instructions (`pickletools.genops`);
those that a plain pickle needs are carried out on values of ours, and everything else is refused.  Nothing that a file
names is imported or called.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_ARRAY, _DTYPE = "numpy ndarray", "numpy dtype"
_ENCODE = "_codecs encode"
"""How Python 3 writes bytes in the protocols 0 to 2: as text in latin-1 and the call that makes bytes of it."""
_NO_BYTES = ("__builtin__ bytes", "builtins bytes")
"""The same for empty ones: a call without arguments."""
_GLOBALS = (*_RECONSTRUCT, _ARRAY, _DTYPE, _ENCODE, *_NO_BYTES)
_MOST_DIMENSIONS = 4


class UnsafePickle(ValueError):
    """What a plain pickle does not hold."""


def load_plain(data: bytes) -> Any:
    """The value in a pickle of protocol 0 to 4: dict, list, tuple, str (text of Python 2 as latin-1), bytes, int,
    float, bool, None, and read-only NDArray of uint8.

    Raises UnsafePickle, naming the global or the instruction, for anything else (other globals, arrays of other types,
    persistent and extension ids, objects) and for what is damaged or claims sizes that it doesn't have.
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.result()
            machine.carry_out(opcode.name, argument, position or 0)
    except UnsafePickle:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        # pickletools' readers of arguments, an empty stack, an unknown memo, a key that can't be one
        raise UnsafePickle(f"it is damaged ({type(error).__name__}: {error})") from None
    raise AssertionError("genops ends at STOP, or raises")


@dataclass(frozen=True)
class _Global:
    """A name that the file asks for; never imported."""

    name: str


@dataclass
class _ByteType:
    """dtype("u1"), before (`complete` False) and after its state was said."""

    complete: bool = False


@dataclass
class _Array:
    """An array of bytes; None until its state was said."""

    value: NDArray[np.uint8] | None = None


class _Parts(tuple[Any, ...]):
    """A tuple with stand-ins in it: what an array is made from."""


_MARK = object()


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is on the stack at the end."""
        return _plain(self._stack.pop())

    def carry_out(self, name: str, argument: Any, position: int) -> None:
        """One instruction; UnsafePickle if a plain pickle has no such one."""
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._global(str(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self._stack.pop(), self._stack.pop()
            self._global(f"{module} {attribute}")
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise UnsafePickle(f"it has the instruction {name} at byte {position}, which plain values don't need")

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            raise UnsafePickle(f"it asks for {name.replace(' ', '.')}, which plain values don't need")
        self._stack.append(_Global(name))

    def _marked(self) -> list[Any]:
        """Take what was put on the stack since the last mark."""
        at = max(place for place, value in enumerate(self._stack) if value is _MARK)
        taken = self._stack[at + 1 :]
        del self._stack[at:]
        return taken

    def append(self) -> None:
        """APPEND."""
        value = self._stack.pop()
        self._top(list).append(_plain(value))

    def appends(self) -> None:
        """APPENDS."""
        values = self._marked()
        self._top(list).extend(map(_plain, values))

    def setitem(self) -> None:
        """SETITEM."""
        value, key = self._stack.pop(), self._stack.pop()
        self._top(dict)[_key(key)] = _plain(value)

    def setitems(self) -> None:
        """SETITEMS."""
        values = self._marked()
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._top(dict)[_key(key)] = _plain(value)

    def list_(self) -> None:
        """LIST."""
        self._stack.append([_plain(value) for value in self._marked()])

    def dict_(self) -> None:
        """DICT."""
        values = self._marked()
        self._stack.append({_key(k): _plain(v) for k, v in zip(values[::2], values[1::2], strict=True)})

    def tuple_(self) -> None:
        """TUPLE."""
        self._stack.append(_tuple(self._marked()))

    def tuple_of(self, count: int) -> None:
        """TUPLE1, TUPLE2, TUPLE3."""
        values = self._stack[-count:]
        if len(values) != count or any(value is _MARK for value in values):
            raise UnsafePickle("it is damaged (a tuple lacks its values)")
        del self._stack[-count:]
        self._stack.append(_tuple(values))

    def reduce(self) -> None:
        """REDUCE, of the calls that make an empty array, its type, and bytes."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnsafePickle("it calls something that is no function of an array")
        if function.name in _RECONSTRUCT:
            if arguments not in ((_Global(_ARRAY), (0,), "b"), (_Global(_ARRAY), (0,), b"b")):
                raise UnsafePickle(f"it makes an array from {_shown(arguments)}")
            self._stack.append(_Array())
        elif function.name == _DTYPE:
            if arguments not in (("u1", 0, 1), ("|u1", 0, 1)):
                raise UnsafePickle(f"it has an array of {_shown(arguments[:1])}, not of unsigned bytes")
            self._stack.append(_ByteType())
        elif function.name == _ENCODE:
            if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1"):
                raise UnsafePickle(f"it makes bytes from {_shown(arguments)}")
            self._stack.append(arguments[0].encode("latin-1"))
        elif function.name in _NO_BYTES and not arguments:
            self._stack.append(b"")
        else:
            raise UnsafePickle(f"it calls {function.name.replace(' ', '.')}, which plain values don't need")

    def build(self) -> None:
        """BUILD, of an array or its type."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _ByteType):
            if state != (3, "|", None, None, None, -1, -1, 0):
                raise UnsafePickle(f"it gives the type of an array the state {_shown(state)}")
            target.complete = True
        elif isinstance(target, _Array):
            if target.value is not None:
                raise UnsafePickle("it fills one array twice")
            target.value = _array(state)
        else:
            raise UnsafePickle(f"it gives a state to {_shown(target)}, which is no array")

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise UnsafePickle(f"it adds to {_shown(self._stack[-1])} as if it were a {kind.__name__}")
        return self._stack[-1]


def _key(key: Any) -> Any:
    if type(key) not in (str, bytes, int):
        raise UnsafePickle(f"it has {_shown(key)} as a key")
    return key


def _array(state: Any) -> NDArray[np.uint8]:
    """The array of numpy's state (version, shape, type, whether in Fortran's order, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise UnsafePickle(f"it gives an array the state {_shown(state)}")
    version, shape, kind, fortran, content = state
    if version != 1 or type(fortran) is not bool or not isinstance(kind, _ByteType) or not kind.complete:
        raise UnsafePickle("it has an array that is not of unsigned bytes")
    if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise UnsafePickle(f"it gives an array the shape {_shown(shape)}")
    data = content.encode("latin-1") if type(content) is str else content
    # in Python's integers: a product of hostile sizes doesn't wrap around
    if type(data) is not bytes or math.prod(shape) != len(data):
        raise UnsafePickle(f"it claims an array of the shape {_shown(shape)} and has other bytes for it")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _plain(value: Any) -> Any:
    """`value` if it is no stand-in of ours, the array of one; what lists and dictionaries may hold."""
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, (_Array, _Global, _ByteType, _Parts)) or value is _MARK:
        raise UnsafePickle("it has an array without content, or a part of one as a value")
    return value


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    """A tuple, marked as `_Parts` if it may stand in no list or dictionary."""
    values = [value.value if isinstance(value, _Array) and value.value is not None else value for value in values]
    if any(isinstance(value, (_Array, _Global, _ByteType, _Parts)) for value in values):
        return _Parts(values)
    return tuple(values)


def _shown(value: Any) -> str:
    """A short look at a hostile value, which may hold itself."""
    if isinstance(value, (int, str, bytes, bool, type(None), _Global)):
        return repr(value)[:80]
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(entry) if not isinstance(entry, tuple) else "(...)" for entry in value[:4]) + ")"
    return f"a {type(value).__name__.strip('_').lower()}"


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
