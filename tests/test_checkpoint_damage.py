"""Damaged or hostile checkpoints are refused in one sentence, nothing is unpickled; a full disk loses nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_checkpoint import FACTS, listing, make, save_3_and_6, sentence

from scaletransfer.engine import checkpoint_save
from scaletransfer.engine.checkpoint import find_latest, generator_states, open_checkpoint
from scaletransfer.engine.checkpoint_saver import save


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_3_and_6(tmp_path)


def rewrite_manifest(folder: Path, change) -> None:
    """Change the manifest and mend its marker, as somebody would who makes a checkpoint by hand."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    text = json.dumps(content)
    (folder / "manifest.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


# ---- damage and hostility


@pytest.mark.parametrize("place", [0.001, 0.06, 0.1, 0.6, 0.999])
def test_a_flipped_bit(saved, place):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(content)
    found = open_checkpoint(path.parent)
    with pytest.raises(ValueError, match="differs from what the training process saved") as caught:
        for name in found.parts:
            found.read(name)
        generator_states(found, 0, 1)
    assert str(path) in sentence(caught)


@pytest.mark.parametrize("size", [0, 5, 400])
def test_a_truncated_file(saved, size):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    found = open_checkpoint(path.parent)
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        found.read("model.conv.weight")
    assert str(path) in sentence(caught)


def test_a_file_that_is_gone(saved):
    path = saved / "step-00000006" / "rank-00000.safetensors"
    path.unlink()
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        open_checkpoint(path.parent).read("model.conv.weight")
    sentence(caught)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_executed(saved, tmp_path):
    planted = tmp_path / "executed"
    payload = pickle.dumps(Touch(planted))
    pickle.loads(payload)  # noqa: S301 - the trap works
    assert planted.exists()
    planted.unlink()
    folder = saved / "step-00000006"
    torch.save({"model": Touch(planted)}, tmp_path / "torch.pt")
    for content in (payload, (tmp_path / "torch.pt").read_bytes()):
        (folder / "rank-00000.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
            open_checkpoint(folder).read("model.conv.weight")
        sentence(caught)
    for name in ("manifest.json", "COMPLETE"):
        broken = Path(shutil.copytree(folder, tmp_path / f"broken-{name}"))
        (broken / name).write_bytes(payload)
        with pytest.raises(ValueError, match="damaged"):
            open_checkpoint(broken)
    assert not planted.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b", "", "..\\x\\..", 7])
def test_a_manifest_that_names_files_elsewhere(saved, name):
    folder = saved / "step-00000006"
    shutil.copy(folder / "rank-00000.safetensors", saved / "x.safetensors")
    rewrite_manifest(folder, lambda content: content["ranks"][0].update(file=name))
    with pytest.raises(ValueError, match="refused") as caught:
        open_checkpoint(folder)
    sentence(caught)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format="other"),
        lambda content: content.update(format_version=2),
        lambda content: content.pop("ranks"),
        lambda content: content.update(tensors=[]),
        lambda content: content["ranks"][0]["pieces"][0].pop("sha256"),
        lambda content: content["ranks"][0]["pieces"][0].update(stop="9"),
    ],
)
def test_a_manifest_of_another_form(saved, change):
    rewrite_manifest(saved / "step-00000006", change)
    with pytest.raises(ValueError, match="step-00000006") as caught:
        open_checkpoint(saved / "step-00000006")
    sentence(caught)


def test_a_manifest_whose_ranges_fit_but_whose_tensors_do_not(saved):
    """Shape and bytes are checked before anything is taken from the file."""
    folder = saved / "step-00000006"

    def swap(content: dict[str, Any]) -> None:
        pieces = {piece["tensor"]: piece for piece in content["ranks"][0]["pieces"]}
        content["tensors"]["model.norm.weight"] = [7]
        pieces["model.norm.weight"]["stop"] = 7

    rewrite_manifest(folder, swap)
    with pytest.raises(ValueError, match=r"model\.norm\.weight") as caught:
        open_checkpoint(folder).read("model.norm.weight")
    sentence(caught)


# ---- a full disk


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing on past `size` bytes fails with EFBIG, as it does with ENOSPC on a full disk; no privilege needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 300, 1500])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(saved, size):
    """300 bytes: inside the tensors; 1500: the tensors fit, the manifest does not."""
    before = listing(saved)
    engine = make()
    with files_no_larger_than(size), pytest.raises(OSError, match=r"rank-00000|manifest|File too large") as caught:
        save(engine, saved, 9, FACTS, keep=1)
    assert "\n" not in str(caught.value)
    assert listing(saved) == before
    assert find_latest(saved) == saved / "step-00000006"
    assert (saved / "latest").read_text() == "step-00000006\n"
    save(engine, saved, 9, FACTS, keep=1)  # room again
    assert find_latest(saved) == saved / "step-00000009" and not list(saved.glob(".step-*"))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_any_failing_write_costs_nothing_that_was_saved(saved, monkeypatch, failing):
    before = listing(saved)
    original = getattr(checkpoint_save.os, failing)
    for nth in range(1, 4):
        calls = []

        def fail(*arguments: Any, nth: int = nth, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == nth:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        monkeypatch.setattr(checkpoint_save.os, failing, fail)
        try:
            save(make(), saved, 9, FACTS, keep=5)
        except OSError:
            pass
        else:
            assert failing == "replace" and nth == 3  # there are two renames: the folder's and latest's
        monkeypatch.setattr(checkpoint_save.os, failing, original)
        shown = listing(saved)
        assert {name: shown[name] for name in before if name != "latest"} == {
            name: digest for name, digest in before.items() if name != "latest"
        }
        newest = find_latest(saved)
        assert newest is not None
        assert np.isfinite(open_checkpoint(newest).read("model.conv.weight").numpy()).all()
        named = saved / (saved / "latest").read_text().strip()
        assert open_checkpoint(named).step in (6, 9)
