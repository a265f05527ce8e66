"""The keys that say what is trained on and how images are read; see `schema` for how they are documented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scaletransfer.config.files import check


@dataclass(frozen=True, kw_only=True)
class LabelPolicyConfig:
    """How raw label states become targets (labels.LabelPolicy); a class index has none."""

    name: Literal["paper", "corrected"] = "corrected"
    """What "No Finding" = 1 does. paper: all findings become 0, Support Devices too, as published. corrected:
    the findings become 0, Support Devices stays as it is."""
    uncertain: Literal["ignore", "ones", "zeros"] = "ignore"
    """What an uncertain label becomes: unknown (masked in the loss), 1, or 0."""
    blank: Literal["ignore", "zeros"] = "ignore"
    """What a finding that is not mentioned becomes: unknown (masked in the loss), or 0."""
    per_label: dict[str, dict[str, str]] = field(default_factory=dict)
    """Exceptions by finding, for example {Edema: {uncertain: ones}}."""

    def __post_init__(self) -> None:
        choices = {"uncertain": ("ignore", "ones", "zeros"), "blank": ("ignore", "zeros")}
        for label, exceptions in self.per_label.items():
            for kind, choice in exceptions.items():
                check(
                    choice in choices.get(kind, ()),
                    "data.policy.per_label",
                    {label: exceptions},
                    "of the form {finding: {uncertain: ignore|ones|zeros, blank: ignore|zeros}}",
                )


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How shards are read that are named by a URL (s3://bucket/folder, or whatever else fsspec reaches)."""

    mode: Literal["auto", "cache", "range"] = "auto"
    """cache: whole shards are copied to cache_dir. range: one request a sample. auto: cache where the shards of the
    split fit into cache_gb, else range."""
    cache_dir: str | None = None
    """The folder of copies, shared by the ranks of a machine; null: ~/.cache/scaletransfer."""
    cache_gb: float = 50.0
    """How large that folder may become, in GB; what was not read for longest goes first."""
    attempts: int = 5
    """How often a request is tried, with growing pauses, before the run ends with an error."""
    timeout: float = 60.0
    """Seconds that one request may take."""

    def __post_init__(self) -> None:
        check(0 < self.cache_gb < float("inf"), "data.remote.cache_gb", self.cache_gb, "above 0")
        check(self.attempts >= 1, "data.remote.attempts", self.attempts, "1 or more")
        check(0 < self.timeout < float("inf"), "data.remote.timeout", self.timeout, "above 0")


def check_reading(workers: int, prefetch_mb: float) -> None:
    """The conditions of the keys by which every run reads its images."""
    check(workers >= 0, "data.workers", workers, "0 or more")
    check(0 < prefetch_mb < float("inf"), "data.prefetch_mb", prefetch_mb, "above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and what is done to an image. Folders are relative to the working directory."""

    train: str | list[str] | dict[str, float | None] | None = None
    """Shard folders (made by make_shards): one, a list, or a mapping of folder to weight. Without weights an
    epoch is every sample once; with weights it is as many draws, a folder in proportion to its weight."""
    sources: list[str] | dict[str, float | None] | None = None
    """Instead of data.train: names of folders below shards_dir, as a list or with weights, for example
    {chexpert: 0.4, mimic: 0.6}."""
    shards_dir: str = "shards"
    """Where make_shards put the folders that data.sources names."""
    valid: str | list[str] | None = None
    """Shard folders for validation; null: the training folders."""
    train_split: str = "train"
    """The split of the training folders that is trained on."""
    valid_split: str = "valid"
    """The split of the validation folders that is validated on."""
    format: Literal["shards", "webdataset"] = "shards"
    """shards: folders made by make_shards. webdataset: folders of tars that others made, after `scaletransfer shards
    index` has made a table for them."""
    policy: LabelPolicyConfig = field(default_factory=LabelPolicyConfig)
    """How raw label states become targets."""
    findings: Literal["intersection", "union"] = "intersection"
    """Which findings several sources train together: those that all have, or all, unknown where a source has
    none."""
    expect_labels: list[str] | None = None
    """Label names in order; a run whose data has others stops. null: whatever the data has."""
    nb_classes: int | None = None
    """Number of labels or classes that the data must have; a run whose shards have another stops. null: not
    checked."""
    image_size: int = 224
    """Height and width that the network gets, in pixels."""
    transform: Literal["xray", "natural"] = "xray"
    """xray: centre square, resize, in training one affine. natural: random resized crop and flip in training,
    resize and centre crop in validation."""
    augment_protocol: Literal["paper", "corrected"] = "corrected"
    """X-ray augmentation. paper: shifts up to 25 % and horizontal flips. corrected: 15 %, no flips, since
    anatomy has sides."""
    rand_augment: list[int] | None = None
    """RandAugment as [operations an image, magnitude of 0 to 30], published with [2, 9]; null: none."""
    mean: float | list[float] = 0.5
    """Subtracted from pixels in 0..1: one number, or one a channel."""
    std: float | list[float] = 0.5
    """What pixels are then divided by: one number, or one a channel."""
    workers: int = 4
    """Threads or processes a rank that read and decode; 0: the training process itself."""
    worker_kind: Literal["auto", "threads", "processes"] = "auto"
    """auto: threads, but processes for RandAugment, which would keep the interpreter from the training loop."""
    prefetch_mb: float = 256.0
    """Most memory a rank, in MB, for batches that are prepared ahead."""
    max_bad_samples: int = 0
    """How many training samples may be unreadable before the run stops, each counted once since its start or resume.
    They are named, and train nothing. 0: the first one stops it. In validation the first one always does."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """How shards named by a URL are read."""

    def __post_init__(self) -> None:
        both = self.train is not None and self.sources is not None
        check(not both, "data.sources", self.sources, "null where data.train is given")
        check(
            self.train is not None or self.sources is not None,
            "data.train",
            self.train,
            "given: one shard folder or several (or data.sources, their names)",
        )
        given = "data.train" if self.sources is None else "data.sources"
        check(len(self.train or self.sources or ()) > 0, given, self.train or self.sources, "at least one shard folder")
        check(
            self.valid is None or len(self.valid) > 0,
            "data.valid",
            self.valid,
            "at least one folder, or null",
        )
        names = [folder for folder, _ in self.folders]
        check(len(set(names)) == len(names), given, self.train or self.sources, "a list that names no folder twice")
        weights = [weight for _, weight in self.folders]
        check(
            all(w is None for w in weights) or all(w is not None and 0 < w < float("inf") for w in weights),
            given,
            self.train or self.sources,
            "a mapping in which every folder has a positive weight, or none has one (null)",
        )
        for key in ("train_split", "valid_split"):
            check(bool(getattr(self, key)), f"data.{key}", getattr(self, key), "the name of a split")
        names = self.expect_labels or []
        check(
            self.expect_labels is None or 0 < len(set(names)) == len(names),
            "data.expect_labels",
            self.expect_labels,
            "a list of label names, each once, or null",
        )
        count = self.nb_classes
        check(count is None or count >= 1, "data.nb_classes", count, "1 or more, or null")
        check(self.image_size >= 8, "data.image_size", self.image_size, "at least 8 pixels")
        ops = self.rand_augment
        check(
            ops is None or (len(ops) == 2 and ops[0] >= 1 and 0 <= ops[1] <= 30),
            "data.rand_augment",
            ops,
            "[operations, magnitude], for example [2, 9], or null",
        )
        for key in ("mean", "std"):
            value = getattr(self, key)
            numbers = value if isinstance(value, list) else [value]
            low = 0.0 if key == "mean" else 1e-6
            check(
                len(numbers) in (1, 3) and all(low <= number <= 1 for number in numbers),
                f"data.{key}",
                value,
                f"one number of {low:g} to 1 (pixels are 0..1), or a list of one or three such",
            )
        check_reading(self.workers, self.prefetch_mb)
        check(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")

    @property
    def folders(self) -> tuple[tuple[str, float | None], ...]:
        """The training folders with their weights, in the order written; the weight is None where none is
        given."""
        chosen = [self.train] if isinstance(self.train, str) else self.train
        if chosen is None:
            names = self.sources if isinstance(self.sources, dict) else dict.fromkeys(self.sources or ())
            return tuple((f"{self.shards_dir}/{name}", weight) for name, weight in names.items())
        if isinstance(chosen, dict):
            return tuple(chosen.items())
        return tuple((folder, None) for folder in chosen)

    @property
    def valid_folders(self) -> tuple[str, ...]:
        """The validation folders: `valid`, or those of training."""
        if self.valid is None:
            return tuple(folder for folder, _ in self.folders)
        return (self.valid,) if isinstance(self.valid, str) else tuple(self.valid)
