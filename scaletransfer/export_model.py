"""Hand a network out: a run's as model.safetensors and model.json, or a model in the form of others.

    scaletransfer export RUN_OR_MODEL --to DIR [--format safetensors | timm | published | onnx]

RUN is a run folder, MODEL a folder with model.safetensors and model.json. --to is a folder, or a file by its suffix.
Of a run every tensor is proven to be what the training process had in memory when it saved. timm: what
timm.create_model(..., checkpoint_path=) loads. published: a model.pth.tar for the published transfer code. onnx:
checked with onnxruntime. A model.json goes with each, from which scaletransfer import reads labels and
normalisation again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scaletransfer.cli import CommandParser
from scaletransfer.engine.checkpoint import open_checkpoint
from scaletransfer.export import choose, export
from scaletransfer.export_formats import FILES, convert

WEIGHT_FILES = ("model.safetensors", "model.pth.tar")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    parser = CommandParser(
        prog="scaletransfer export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_MODEL", help="run folder, or exported model folder")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; pretrained_models/<name> is usual")
    parser.add_argument("--which", default="latest", help="of a run: latest (default), best, or a step number")
    parser.add_argument("--format", choices=list(FILES), default="safetensors", help="default: safetensors")
    options = parser.parse_args(argv)
    if options.which not in ("latest", "best") and not options.which.isdigit():
        raise ValueError(f"--which {options.which}: must be latest, best or a step number")
    said = export_any(options.run, options.to, options.format, options.which)
    print("\n".join(said))
    return 0


def export_any(run: Path, to: Path, form: str, which: str = "latest") -> list[str]:
    """Write ``run``, a run's folder or an exported model, to ``to`` as ``form``; what is to be known, a line each."""
    model = _model_of(run)
    if model is not None:
        return [*convert(model, to, form), f"{to}: {form} of {run}"]
    checkpoint = open_checkpoint(choose(run, which))
    facts = checkpoint.facts
    proven = (
        f"{facts['model']} with {len(facts['label_names'])} outputs after {checkpoint.step} steps; every tensor equals "
        "what the training process had in memory when it saved (sha256)"
    )
    if form == "safetensors" and to.suffix != ".safetensors":
        export(checkpoint, to)
        return [f"{to}: {proven}"]
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.absolute().parent) as made:
        export(checkpoint, Path(made) / "model")
        said = convert(Path(made) / "model", to, form)
    return [*said, f"{to}: {form} of {run}; {proven}"]


def _model_of(run: Path) -> Path | None:
    """The exported model that was named; None where it is a run, or nothing."""
    if run.is_file():
        return run
    if (run / "checkpoints").is_dir():  # its checkpoint is proven, and newer or the same
        return None
    places = (run, run / "model")
    return next((place for place in places for name in WEIGHT_FILES if (place / name).is_file()), None)
