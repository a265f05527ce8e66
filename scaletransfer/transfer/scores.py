"""What a run or an evaluation leaves behind: scores with intervals, calibration, confusion; result.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaletransfer.bootstrap import intervals, log_loss
from scaletransfer.calibration import calibration, confusion
from scaletransfer.files import json_bytes, write_atomically
from scaletransfer.index import ShardIndex
from scaletransfer.losses import Loss
from scaletransfer.metrics import CHEXPERT_FIVE, chexpert_five, multiclass_report, multilabel_report
from scaletransfer.results import FORMAT, FORMAT_VERSION, RESULT


def scores(
    loss: Loss, predicted: dict[str, np.ndarray], index: ShardIndex, split: str, names: Sequence[str], *, resamples: int
) -> dict[str, Any]:
    """``summarise`` of ``predict``'s result on one split.

    The unit of resampling is the patient where the index knows them, else the image.
    """
    patients = index.table(split)["patient"][predicted["position"]].astype(np.int64)
    return summarise(predicted["logits"], predicted["target"], names, loss.task, groups=patients, resamples=resamples)


def summarise(
    values: np.ndarray,
    target: np.ndarray,
    names: Sequence[str],
    task: str,
    *,
    groups: np.ndarray | None = None,
    sources: Sequence[str] = (),
    resamples: int = 1000,
    from_logits: bool = True,
) -> dict[str, Any]:
    """Everything that is reported of a set of images, from its predictions and labels alone.

    values [n, L]: logits, or probabilities with from_logits=False; target as in the reports of ``metrics``; groups: the
    patient of each image as in ``bootstrap.intervals``; sources: the source of each image, where several were merged.

    Returns the report of ``metrics`` with ``loss`` (mean negative log-likelihood), each class with ``specificity`` too,
    ``calibration``, ``confusion``, (``resamples`` > 0) ``intervals``, of X-ray models ``chexpert_five``, and of merged
    sets ``sources``: the same of each source alone.
    """
    make = multilabel_report if task == "multilabel" else multiclass_report
    found = make(values, target, names, from_logits=from_logits)
    known = found.get("known", len(target))
    found["loss"] = float(log_loss(values, target, from_logits).sum()) / max(1, known)
    p = probabilities(values, task) if from_logits else values.astype(np.float64)
    found["calibration"] = calibration(p, target, names)
    found["confusion"] = confusion(p, target, names)
    _add_specificity(found, names)
    if resamples:
        how: dict[str, Any] = {"groups": groups, "samples": resamples, "from_logits": from_logits}
        found["intervals"] = intervals(values, target, names, task=task, **how)
    five = chexpert_five(found) if task == "multilabel" else None
    if five is not None:
        columns = [list(names).index(name) for name in CHEXPERT_FIVE]
        if resamples:
            between = intervals(values[:, columns], target[:, columns], CHEXPERT_FIVE, task=task, **how)
            five["interval"] = between["mean_auroc"]
        found["chexpert_five"] = five
    if len(set(sources)) > 1:
        whose = np.asarray(sources)
        found["sources"] = {
            name: summarise(
                values[whose == name],
                target[whose == name],
                names,
                task,
                groups=None if groups is None else groups[whose == name],
                resamples=resamples,
                from_logits=from_logits,
            )
            for name in dict.fromkeys(sources)
        }
    return found


def _add_specificity(found: dict[str, Any], names: Sequence[str]) -> None:
    """The share of each class's negatives that are not predicted, None where it has no negative."""
    table = found["confusion"]
    if isinstance(table, list):
        counts = np.array(table)
        false = counts.sum(axis=0) - counts.diagonal()
    elif table is None:
        return
    else:
        false = np.array([table[name][0][1] for name in names])
    for number, name in enumerate(names):
        negatives = found["classes"][name]["negatives"]
        found["classes"][name]["specificity"] = 1 - float(false[number]) / negatives if negatives else None


def probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """float64 [n, L]: the sigmoid (multi-label) or softmax (multi-class) of logits [n, L]."""
    from scipy.special import expit, softmax  # here, as it takes a while to import

    values = logits.astype(np.float64)
    return np.asarray(expit(values) if task == "multilabel" else softmax(values, axis=1))


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


def task_of(found: dict[str, Any]) -> str:
    """The task that a report of ``summarise`` is of."""
    return "multilabel" if "known" in found else "multiclass"


def _row(title: str, value: float, between: Sequence[float] | None) -> str:
    return f"{title:30}{value:8.4f}" + (f"  [{between[0]:.4f}, {between[1]:.4f}]" if between else "")


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
            shown.append(_row(title, found[key], bounds.get(key)))
    five = found.get("chexpert_five")
    if five is not None and five["mean_auroc"] is not None:
        shown.append(_row(f"AUROC, {five['mean_classes']} of CheXpert's 5", five["mean_auroc"], five.get("interval")))
    calibrated = found.get("calibration")
    if calibrated and calibrated["ece"] is not None:
        shown.append(f"{'calibration error (ECE)':30}{calibrated['ece']:8.4f}  Brier score {calibrated['brier']:.4f}")
    for title, one in found.get("sources", {}).items():
        main = "mean_auroc" if task_of(found) == "multilabel" else "accuracy"
        if one[main] is not None:
            row = _row(f"{title}: {one['samples']} images", one[main], (one.get("intervals") or {}).get(main))
            more = one.get("chexpert_five")
            shown.append(row + (f"  CheXpert's five {more['mean_auroc']:.4f}" if more and more["mean_auroc"] else ""))
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
