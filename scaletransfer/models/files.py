"""Files of weights, opened without reading them: names, shapes and types now, each tensor when it is asked for.

What a file is, is told by its first bytes and not by its name. Nothing is unpickled beyond plain tensors and values. Of
a checkpoint with an optimizer inside, only what is asked for is ever in memory.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scaletransfer import tensor_file

CHUNK = 1 << 24
"""Bytes read at once."""
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SUFFIXES = (".safetensors", ".npz", ".tar", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """The tensor on the CPU, contiguous. Raises ValueError where its bytes are damaged."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """An opened file."""

    path: Path
    form: Literal["pytorch", "npz", "safetensors"]
    entries: dict[str, Entry]
    epoch: int | None = None


def open_weights(path: Path) -> WeightFile:
    """Open the file `path` of any of the three forms.

    Of a PyTorch file this is the dict `model` or `state_dict` in it, or the dict itself; `module.` (of
    DistributedDataParallel) and `_orig_mod.` (of torch.compile) before every name are dropped.

    Raises ValueError (the file and the reason) for a file that is of none of them, is damaged, or holds pickled objects
    other than tensors and plain values: nothing in it runs.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is empty: copy it again.")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if head[:4] == b"PK\x03\x04":
        with _archive(path) as archive:
            names = archive.namelist()
        return _open_zip(path) if any(name.endswith("/data.pkl") for name in names) else _open_npz(path)
    if head[0] == 0x80:
        return _open_legacy(path)
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if path.suffix in (".npz", ".pth", ".pt", ".tar", ".bin", ".ckpt"):
        what = "a BiT .npz file of plain arrays" if path.suffix == ".npz" else "a readable PyTorch checkpoint"
        raise ValueError(f"{path} is not {what}: it does not begin like one, so it is damaged or something else.")
    raise ValueError(f"{path}: unknown kind of checkpoint; known are {', '.join(_SUFFIXES)}.")


# ---- PyTorch


def _open_zip(path: Path) -> WeightFile:
    with _refusals(path):
        # on meta nothing is read; the storages say where in the file their bytes are
        content = torch.load(path, map_location="meta", weights_only=True)
    with _archive(path) as archive, path.open("rb") as file:
        members = {_data_offset(file, info): info.filename for info in archive.infolist()}

    def entry(name: str, value: Tensor) -> Entry:
        storage = value.untyped_storage()
        offset = storage._checkpoint_offset
        member = None if offset is None else members.get(offset)
        if member is None and value.numel():
            raise ValueError(f"{path} is not a readable PyTorch checkpoint: {name} has no place in it.")
        shape, stride, start, dtype = tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        size = storage.nbytes()

        def read() -> Tensor:
            if member is None or not math.prod(shape):
                return torch.empty(shape, dtype=dtype)
            held = torch.from_numpy(_member(path, member, size)).view(dtype)
            try:
                return held.as_strided(shape, stride, start).contiguous()
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise ValueError(f"{path} is not a readable PyTorch checkpoint: {name} ({first}).") from error

        return Entry(shape=shape, dtype=dtype, read=read)

    return _torch_file(path, content, entry)


def _open_legacy(path: Path) -> WeightFile:
    """The form of PyTorch before 1.6, which can be read as a whole only."""
    with _refusals(path):
        content = torch.load(path, map_location="cpu", weights_only=True)

    def entry(_name: str, value: Tensor) -> Entry:
        return Entry(shape=tuple(value.shape), dtype=value.dtype, read=value.contiguous)

    return _torch_file(path, content, entry)


def _torch_file(path: Path, content: Any, entry: Callable[[str, Tensor], Entry]) -> WeightFile:
    state: Any = content
    if isinstance(content, dict):
        state = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds neither a state_dict nor a dict with the entry 'model'.")
    strange = [str(n) for n, v in state.items() if not (isinstance(n, str) and isinstance(v, Tensor))]
    if strange:
        raise ValueError(f"{path}: the entries {', '.join(strange[:5])} of its state_dict are not tensors.")
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path}: {name} is a sparse or quantized tensor: save it as a plain one.")
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    epoch = content.get("epoch") if isinstance(content, dict) else None
    return WeightFile(
        path=path,
        form="pytorch",
        entries={name: entry(name, value) for name, value in state.items()},
        epoch=epoch if isinstance(epoch, int) else None,
    )


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """torch.load's errors as one sentence, without its warnings on protocols."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except pickle.UnpicklingError as error:
        # torch's own text suggests weights_only=False, the one thing not to do with a stranger's file.
        found = re.search(r"(?:GLOBAL|function) ([\w.]+)", str(error))
        what = f" (it asks for {found[1]})" if found else ""
        raise ValueError(
            f"{path} was refused and nothing in it was run: it is damaged or holds pickled objects "
            f"other than tensors, which could execute code{what}; have it exported as safetensors."
        ) from error
    except (RuntimeError, EOFError, struct.error, KeyError, IndexError, UnicodeDecodeError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {first}.") from error


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again.") from error


def _data_offset(file: Any, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind the local header, whose extra field may differ from the directory's."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _member(path: Path, name: str, size: int) -> np.ndarray:
    """The bytes of a member, uint8 [size]; the library compares their CRC-32 at the end."""
    data = np.empty(size, np.uint8)
    filled = 0
    with _archive(path) as archive, archive.open(name) as stream:
        while piece := stream.read(CHUNK):
            if filled + len(piece) > size:
                break
            data[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
    if filled != size:
        raise ValueError(f"{path} is damaged: {name} has not the {size} bytes that its tensor needs; copy it again.")
    return data


# ---- numpy


def _open_npz(path: Path) -> WeightFile:
    entries = {}
    with _plain_arrays(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name == member:
                raise ValueError(f"the member {member!r} is no array")
            with archive.open(member) as stream:
                version = npy.read_magic(stream)
                header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = header(stream)
            if dtype.hasobject:
                raise ValueError(f"the array {name!r} holds pickled objects, which could execute code")
            kind = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
            entries[name] = Entry(shape=shape, dtype=kind, read=partial(_array, path, member))
    return WeightFile(path=path, form="npz", entries=entries)


def _array(path: Path, member: str) -> Tensor:
    with _plain_arrays(path), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        value = npy.read_array(stream, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))


@contextmanager
def _plain_arrays(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, zipfile.BadZipFile, EOFError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a BiT .npz file of plain arrays: {error}.") from error


# ---- safetensors


def _open_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, framework="np"):
            pass  # the library checks the header, on which what follows relies
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    entries = {}
    for name, (kind, shape, begin) in tensor_file.locate(path).items():
        if kind not in _SAFETENSORS:
            raise ValueError(f"{path}: {name} is of the type {kind}, which no network of ours has.")
        dtype = _SAFETENSORS[kind]
        entries[name] = Entry(
            shape=tuple(shape),
            dtype=dtype,
            read=partial(_piece, path, begin, tuple(shape), dtype),
        )
    return WeightFile(path=path, form="safetensors", entries=entries)


def _piece(path: Path, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(data.data) != len(data):
            raise ValueError(f"{path} ends too early: copy it again.")
    return torch.from_numpy(data).view(dtype).reshape(shape)
