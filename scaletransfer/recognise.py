"""What a checkpoint of others is, told by its content: published, Google's, timm's, or an export of ours.

Files are opened, not read: names and shapes are known, each tensor is read when it is asked for.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaletransfer.model_facts import Facts, of_card, of_google, of_published, of_timm
from scaletransfer.model_folder import FORMAT
from scaletransfer.models.convolution import TIMM_WS_EPS
from scaletransfer.models.files import Entry, open_weights
from scaletransfer.models.weights import card_beside, from_google, from_timm, is_timm_bit, stem_of
from scaletransfer.transfer.network import check_card

HEAD = ("head.conv.weight", "head.conv.bias")
FORMS = {
    "published": "a published PyTorch checkpoint",
    "google": "one of Google's BiT .npz files",
    "timm": "weights of timm's resnetv2_*_bit",
    "export": "a model that scaletransfer exported",
}
_INDEXES = ("model.safetensors", "pytorch_model.bin", "model.pth.tar", "model.pth")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file that was recognised."""

    form: str
    """Of FORMS."""
    where: str
    entries: dict[str, Entry]
    """In our names."""
    facts: Facts
    ws_eps: float | None = TIMM_WS_EPS
    """What is added to the variance of a weight; None: as in our own models, 1e-10."""
    epoch: int | None = None
    provenance: dict[str, Any] | None = None

    @property
    def outputs(self) -> int:
        """Of its head; 0 where it has none."""
        return _outputs(self.entries)


def recognise(given: str, names: Sequence[str] = (), config: Path | None = None) -> Found:
    """Open what the user gave: a file, a folder, or a name of timm.

    names: other names that may be a published model's, such as that of the folder that is written; config: the
    configuration that a published model was trained with.

    Raises ValueError for what is none of FORMS, is damaged, or holds pickled objects; FileNotFoundError for nothing.
    """
    path = Path(given)
    if not path.exists():
        return _fetched(given)
    file = _file_in(path)
    opened = open_weights(file)
    card = card_beside(file) if opened.form != "npz" else {}
    above = file.absolute().parent.name
    called = above if stem_of(file) == "model" else stem_of(file)
    if opened.form == "npz":
        entries = from_google(opened.entries, file)
        outputs = _outputs(entries)
        return Found(form="google", where=given, entries=entries, facts=of_google(called, outputs))
    if card.get("format") == FORMAT:
        check_card(card, file.parent)
        return Found(
            form="export",
            where=given,
            entries=from_timm(opened.entries) if is_timm_bit(opened.entries) else opened.entries,
            facts=of_card(card, file.with_suffix(".json")),
            ws_eps=card.get("ws_eps"),
            provenance=card.get("provenance"),
        )
    if is_timm_bit(opened.entries):
        facts = of_timm(called, _hub_config(file), _outputs(entries := from_timm(opened.entries)))
        return Found(form="timm", where=given, entries=entries, facts=facts, epoch=opened.epoch)
    facts = of_published([called, above, *names], config)
    return Found(form="published", where=given, entries=opened.entries, facts=facts, epoch=opened.epoch)


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _INDEXES if (path / name).is_file()] or sorted(path.glob("*.npz"))
    if not found and (path / "model" / "model.safetensors").is_file():  # a fine-tuning run
        found = [path / "model" / "model.safetensors"]
    if len(found) == 0:
        raise ValueError(f"{path} holds none of {', '.join(_INDEXES)} and no .npz file: give the file itself")
    if found[0].suffix == ".npz" and len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} .npz files: give one of them")
    return found[0]


def _outputs(entries: Mapping[str, Entry]) -> int:
    head = entries.get(HEAD[0])
    return head.shape[0] if head is not None and head.shape else 0


def _hub_config(file: Path) -> dict[str, Any] | None:
    """Timm's config.json beside the file, if it is one."""
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return (
        content if isinstance(content, dict) and str(content.get("architecture", "")).startswith("resnetv2") else None
    )


def _fetched(name: str) -> Found:
    """A model by timm's name, as timm's own cache or hub gives it."""
    try:
        import timm
    except ImportError:
        raise FileNotFoundError(
            f"there is no {name}; names of timm need the extra: pip install 'scaletransfer[timm]'"
        ) from None
    if "/" in name or not timm.is_model(name):
        raise FileNotFoundError(f"there is no file or folder {name}, and timm knows no model of that name")
    if not name.startswith("resnetv2_") or "_bit" not in name:
        raise ValueError(f"{name} is not one of timm's resnetv2_*_bit: fine-tune it by its name, model.name={name}")
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the libraries that timm downloads with raise
        reason = textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
        raise ValueError(
            f"timm cannot fetch {name} here ({reason}): download its file where there is a network, and import that"
        ) from error
    state = network.state_dict()
    entries = {
        key: Entry(shape=tuple(value.shape), dtype=value.dtype, read=value.contiguous) for key, value in state.items()
    }
    ours = from_timm(entries)
    cfg = {"pretrained_cfg": dict(network.pretrained_cfg)}
    facts = replace(of_timm(name, cfg, _outputs(ours)), why=f"timm's configuration of {name}")
    return Found(form="timm", where=name, entries=ours, facts=facts)
