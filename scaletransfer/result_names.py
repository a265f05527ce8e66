"""What targets, pre-trained models, networks and metrics are called in results, and how a report writes them."""

from __future__ import annotations

import re

PAPER = "paper"
TINY = "BiT-tiny"
TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "covidx_cxr2": "COVIDx",
    "flowers": "Flowers-102",
    "flowers_oversampling": "Flowers-102 (oversampled)",
    "flowers_high_lr": "Flowers-102 (high rate)",
    "padchest": "PadChest",
    "padchest_cl": "PadChest-Cl",
    "pets": "Pets",
    "tuberculosis_full": "Tuberculosis",
    "imagenet1k": "ImageNet-1k",
    "imagenet21k": "ImageNet-21k",
    "chexpert": "CheXpert",
    "mimic": "MIMIC-CXR",
    "nih": "NIH ChestX-ray14",
    "chexpert_mimic": "CheXpert + MIMIC",
    "chexpert_mimic_nih": "CheXpert + MIMIC + NIH",
    "chexpert_mimic_nih_padchest": "CheXpert + MIMIC + NIH + PadChest",
}
METRICS = {
    "accuracy": "accuracy",
    "accuracy_top5": "top-5 accuracy",
    "mean_auroc": "mean AUROC",
    "mean_average_precision": "mean average precision",
    "mean_precision": "mean precision",
    "mean_recall": "mean recall",
    "mean_f1": "mean F1",
}
ALIASES = {"acc": "accuracy", "acc1": "accuracy", "acc5": "accuracy_top5", "mean_auc": "mean_auroc"}
"""Published names of metrics, without test/ or test_ before them."""
PUBLISHED = {"accuracy": "acc", "mean_auroc": "mean_auc"}
"""The same from ours."""
_LOWER = re.compile(r"(^|_)(loss|nll|ece|mce|brier|error)(_|$)")
_MODEL = re.compile(r"(?i)^(?P<before>.*?)[-_]?(?:bit-?[sm]?-?r?|\br)(?P<size>\d+x\d+)(?P<after>[-_].+)?$")


def title(name: str) -> str:
    """A target's or a pre-training's name for readers; names that are not of the paper stay as they are."""
    return TITLES.get(name, name)


def canonical_metric(name: str) -> str:
    """Our name of a metric that is called "test/acc", "test_acc", "acc" or "accuracy", and so on."""
    bare = re.sub(r"^(test|valid|val)[/_]", "", name.strip())
    bare = re.sub(r"^AUC_class_", "auroc_class_", bare)
    return ALIASES.get(bare, bare)


def published_metric(name: str) -> str:
    """The published tables' name of one of our metrics: "test/acc", "test/mean_auc", ..."""
    return f"test/{PUBLISHED.get(name, name)}"


def lower_is_better(metric: str) -> bool:
    """Losses and calibration errors; they are no shares either, and are shown as they are."""
    return _LOWER.search(metric) is not None


def metric_title(metric: str) -> str:
    """A metric's name as a label, with its unit."""
    shown = METRICS.get(metric) or metric.replace("_", " ").replace("auroc", "AUROC").replace("/", " ")
    return shown if lower_is_better(metric) else f"{shown} (%)"


def split_model(name: str) -> tuple[str, str]:
    """Pre-training and network of a published name: "chexpert_mimic_bit152x4" is ("chexpert_mimic", "bit152x4").

    "imagenet1k_bit50x1_optimized" is ("imagenet1k_optimized", "bit50x1"), "BiT-M-R50x1" is ("BiT-M", "bit50x1"). A name
    that says no network, or nothing else, is (name, "").
    """
    found = _MODEL.match(name)
    if found is None:
        before, _, network = name.rpartition("_")
        return (before, network) if network == TINY and before else (name, "")
    before, after = found["before"], found["after"] or ""
    kind = re.match(r"(?i)bit-?([sm])", name[len(before) :].lstrip("-_"))
    if kind:  # Google's names: BiT-S and BiT-M are pre-trainings
        before = "_".join(part for part in (before, f"BiT-{kind[1].upper()}") if part)
    pretraining = (before + after) if before else after.lstrip("-_")
    return (pretraining, f"bit{found['size']}") if pretraining else (name, "")


def network_name(architecture: str) -> str:
    """The network's name in results of an architecture as models call it: "BiT-S-R50x1" is "bit50x1"."""
    found = re.fullmatch(r"(?i)(?:bit-?[sm]?-?r?|r)(\d+x\d+)", architecture)
    return f"bit{found[1]}" if found else architecture


def network_title(name: str) -> str:
    """ "bit152x4" is R152x4; other names stay as they are."""
    found = re.fullmatch(r"bit(\d+x\d+)", name)
    return f"R{found[1]}" if found else name


def network_order(name: str) -> tuple[float, str]:
    """Sorts networks by size: depth times the square of the width, to which the parameters are proportional."""
    found = re.fullmatch(r"bit(\d+)x(\d+)", name)
    return (float(found[1]) * float(found[2]) ** 2, name) if found else (0.0, name)


def model_title(pretraining: str, network: str, source: str = "") -> str:
    """One line that names a model: "R152x4, ImageNet-21k", with "(paper)" behind it if it is theirs."""
    shown = ", ".join(part for part in (network_title(network), title(pretraining)) if part)
    return f"{shown} ({source})" if source else shown


def parse_shot(text: str) -> int | None:
    """Images per class in "5_shot" or "5"; None, all of them, in "full_shot", "full" or "all". ValueError otherwise."""
    bare = text.strip().removesuffix("_shot")
    if bare in ("full", "all"):
        return None
    if not re.fullmatch(r"[0-9]{1,9}", bare) or int(bare) < 1:
        raise ValueError(f"{text!r} is neither a number of images per class (5_shot) nor full_shot")
    return int(bare)


def shot_name(shot: int | None) -> str:
    """As the published tables write it: "5_shot", "full_shot"."""
    return "full_shot" if shot is None else f"{shot}_shot"
