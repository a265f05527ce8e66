"""What a run or an evaluation leaves behind: predictions of every image, scores with intervals."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer import keys as keys_of
from scaletransfer.bootstrap import intervals
from scaletransfer.engine.evaluate import report
from scaletransfer.files import json_bytes, write_atomically
from scaletransfer.index import ShardIndex
from scaletransfer.losses import Loss
from scaletransfer.results import FORMAT, FORMAT_VERSION, RESULT

PREDICTIONS = "predictions.csv"
WIDE = 200
"""Classes up to which predictions have a column a class; beyond, the five most probable."""


def scores(
    loss: Loss, predicted: dict[str, np.ndarray], index: ShardIndex, split: str, names: Sequence[str], *, resamples: int
) -> dict[str, Any]:
    """Loss, metrics and (``resamples`` > 0) bootstrap intervals of ``predict``'s result.

    The unit of resampling is the patient where the index knows them, else the image.
    """
    found = report(loss, predicted, names)
    if resamples:
        patients = index.table(split)["patient"][predicted["position"]].astype(np.int64)
        found["intervals"] = intervals(
            predicted["logits"], predicted["target"], names, task=loss.task, groups=patients, samples=resamples
        )
    return found


def probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """float64 [n, L]: the sigmoid (multi-label) or softmax (multi-class) of logits [n, L]."""
    from scipy.special import expit, softmax  # here, as it takes a while to import

    values = logits.astype(np.float64)
    return np.asarray(expit(values) if task == "multilabel" else softmax(values, axis=1))


def write_predictions(
    path: Path, task: str, predicted: dict[str, np.ndarray], index: ShardIndex, split: str, names: Sequence[str]
) -> None:
    """One row an image: key, for image files their path (but of a data set whose identifiers are kept secret, where it
    would name the patient), labels, probabilities.

    Multi-class: ``label``, ``predicted`` and ``p:<class>`` (above 200 classes the five most probable as
    ``class_1, p_1, ...``). Multi-label: ``label:<name>`` (1, 0, empty for unknown) and ``p:<name>``. Atomic.
    """
    rows = predicted["position"]
    keys = index.keys(split, rows)
    table = index.table(split)
    p = probabilities(predicted["logits"], task)
    wide = task == "multilabel" or len(names) <= WIDE
    named = index.in_memory and index.salt_fingerprint == keys_of.fingerprint(keys_of.PUBLIC_SALT)
    header = ["key", *(["image"] if named else [])]
    if task == "multilabel":
        header += [f"label:{name}" for name in names] + [f"p:{name}" for name in names]
    elif wide:
        header += ["label", "predicted", *(f"p:{name}" for name in names)]
    else:
        header += ["label", *(f"{what}_{rank}" for rank in range(1, 6) for what in ("class", "p"))]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        for number, key in enumerate(keys):
            line: list[Any] = [key]
            if named:
                line.append(index.splits[split].shards[int(table["shard"][rows[number]])].file)
            target = predicted["target"][number]
            if task == "multilabel":
                line += ["" if np.isnan(value) else int(value) for value in target]
                line += [f"{value:.6g}" for value in p[number]]
            elif wide:
                line += [names[int(target)], names[int(p[number].argmax())], *(f"{value:.6g}" for value in p[number])]
            else:
                line.append(names[int(target)])
                for best in np.argsort(-p[number], kind="stable")[:5]:
                    line += [names[int(best)], f"{p[number, best]:.6g}"]
            writer.writerow(line)
    os.replace(temporary, path)


def write_result(folder: Path, content: dict[str, Any]) -> None:
    """result.json of a run, written last and atomically: its presence says that the run is finished."""
    write_atomically(folder / RESULT, json_bytes({"format": FORMAT, "format_version": FORMAT_VERSION, **content}))


def read_result(folder: Path) -> dict[str, Any]:
    """The content of a finished run's result.json. ValueError where it is none."""
    path = folder / RESULT
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and start the run again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not the result of a fine-tuning run: delete it and start the run again")
    return content


def lines(found: dict[str, Any], names: Sequence[str], most: int = 30) -> str:
    """Scores as a table for a terminal: means with intervals, then a row a class."""
    bounds = found.get("intervals") or {}
    shown = [f"{found['samples']} images, loss {found['loss']:.4f}"]
    for key, title in (
        ("accuracy", "accuracy"),
        ("accuracy_top5", "top-5 accuracy"),
        ("mean_auroc", "mean AUROC"),
        ("mean_average_precision", "mean average precision"),
        ("mean_precision", "mean precision"),
        ("mean_recall", "mean recall"),
        ("mean_f1", "mean F1"),
    ):
        if found.get(key) is not None:
            between = bounds.get(key)
            interval = f"  [{between[0]:.4f}, {between[1]:.4f}]" if between else ""
            shown.append(f"{title:24}{found[key]:8.4f}{interval}")
    if bounds:
        shown.append(
            f"intervals: {bounds['level']:.0%}, bootstrap of {bounds['units']} {bounds['unit']}s, "
            f"{bounds['samples']} times"
        )
    columns = (
        ("auroc", "AUROC"),
        ("average_precision", "AP"),
        ("precision", "prec."),
        ("recall", "recall"),
        ("f1", "F1"),
    )
    wide = max(len(name) for name in names[:most])
    shown.append(f"{'':{wide}}{'images':>8}" + "".join(f"{title:>8}" for _, title in columns))
    for name in names[:most]:
        row = found["classes"][name]
        cells = "".join("       -" if row[key] is None else f"{row[key]:8.4f}" for key, _ in columns)
        shown.append(f"{name:{wide}}{row['positives']:8}{cells}")
    if len(names) > most:
        shown.append(f"and {len(names) - most} more classes in {RESULT}")
    shown.append(f"means over the {found['mean_classes']} classes that have both outcomes")
    return "\n".join(shown)
