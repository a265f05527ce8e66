"""What every key of a configuration means, its default, and what it may be.

One frozen dataclass a concern; the text under a field is its documentation everywhere (`--help` prints it).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from scaletransfer.config.files import ConfigError, shown


def check(ok: bool, key: str, value: object, must: str) -> None:
    """Refuse `value` for `key` unless `ok`; every condition is written so that NaN fails it."""
    if not ok:
        raise ConfigError(key, f"must be {must}, not {shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str
    """BiT-S-R50x1, BiT-M-R152x4, ... (depth 50, 101, 152; any width), BiT-tiny (about 2 million parameters,
    for tests), or a name that timm knows."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time. R152x4 needs it."""
    compile: bool = False
    """Run the network through torch.compile."""
    init_from: str | None = None
    """A checkpoint to start from: an exported folder, a published .pth.tar, .npz or .safetensors. null: drawn
    from the seed and the tensors' names."""
    new_head: bool = False
    """Draw the classifier anew where init_from brings one, as other classes need it."""

    def __post_init__(self) -> None:
        check(bool(self.name), "model.name", self.name, "the name of a network, such as BiT-S-R50x1")


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
        check(self.cache_gb > 0, "data.remote.cache_gb", self.cache_gb, "above 0")
        check(self.attempts >= 1, "data.remote.attempts", self.attempts, "1 or more")
        check(self.timeout > 0, "data.remote.timeout", self.timeout, "above 0")


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
    """How many training samples may be unreadable before the run stops. They are named, and train nothing. 0: the
    first one stops it. In validation the first one always does."""
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


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights follow gradients."""

    name: Literal["sgd", "sgd_agc"] = "sgd_agc"
    """sgd: torch's. sgd_agc: SGD with adaptive gradient clipping (arXiv 2102.06171)."""
    base_lr: float = 0.01
    """Learning rate for 256 images: the peak is base_lr x global_batch / 256."""
    momentum: float = 0.9
    """Share of the last update that is kept."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    dampening: float = 0.0
    """How much less the gradient counts in the momentum."""
    weight_decay: float = 1e-4
    """Added to the gradient times the weight, after clipping."""
    clipping: float = 0.01
    """sgd_agc: a unit's gradient norm is at most this share of its weight norm."""
    eps: float = 1e-3
    """sgd_agc: the least weight norm that counts, so that zero units can move."""
    head_exempt: Literal["paper", "corrected"] = "corrected"
    """sgd_agc: what of the head is not clipped. paper: its weight only. corrected: weight and bias."""

    def __post_init__(self) -> None:
        for key in ("base_lr", "clipping", "eps"):
            value = getattr(self, key)
            check(0 < value < float("inf"), f"optimizer.{key}", value, "a positive number")
        check(0 <= self.weight_decay < float("inf"), "optimizer.weight_decay", self.weight_decay, "0 or more")
        for key in ("momentum", "dampening"):
            value = getattr(self, key)
            check(0 <= value < 1, f"optimizer.{key}", value, "at least 0 and below 1")
        check(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "optimizer.nesterov",
            self.nesterov,
            "false where momentum is 0 or dampening is not 0",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes: a pure function of samples seen and the global batch."""

    kind: Literal["step", "cosine"] = "step"
    """step: x decay_factor at each of decay_epochs. cosine: half a cosine from the peak down to min_lr."""
    warmup_epochs: float = 15.0
    """Epochs in which the rate rises linearly to the peak."""
    warmup_start_factor: float = 0.0
    """The rate at the start of the warm-up as a share of the peak; the published runs had 1 / number of
    GPUs."""
    decay_epochs: list[float] = field(default_factory=lambda: [30.0, 60.0, 80.0])
    """step: the epochs at which the rate falls."""
    decay_factor: float = 0.1
    """step: what the rate is multiplied by there."""
    min_lr: float = 0.0
    """cosine: the rate at the end."""

    def __post_init__(self) -> None:
        check(
            0 <= self.warmup_epochs < float("inf"),
            "schedule.warmup_epochs",
            self.warmup_epochs,
            "0 or more epochs",
        )
        check(
            0 <= self.warmup_start_factor <= 1,
            "schedule.warmup_start_factor",
            self.warmup_start_factor,
            "of 0 to 1",
        )
        steps = [0.0, *self.decay_epochs]
        check(
            all(a < b for a, b in itertools.pairwise(steps)),
            "schedule.decay_epochs",
            self.decay_epochs,
            "positive epochs in rising order",
        )
        check(0 < self.decay_factor <= 1, "schedule.decay_factor", self.decay_factor, "above 0 and at most 1")
        check(0 <= self.min_lr < float("inf"), "schedule.min_lr", self.min_lr, "0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run saves itself, and how many of these it keeps."""

    every_steps: int | None = 1000
    """Save after so many steps; null: not by steps."""
    every_minutes: float | None = 30.0
    """Save when so many minutes have passed since the last save; null: not by time."""
    keep: int = 3
    """How many complete checkpoints stay; older ones are deleted."""

    def __post_init__(self) -> None:
        check(
            self.every_steps is None or self.every_steps >= 1,
            "checkpoint.every_steps",
            self.every_steps,
            "1 or more, or null",
        )
        minutes = self.every_minutes
        check(
            minutes is None or 0 < minutes < float("inf"),
            "checkpoint.every_minutes",
            minutes,
            "above 0, or null",
        )
        check(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the run writes about itself while it runs."""

    every_steps: int = 10
    """Steps between two points in TensorBoard; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Whether TensorBoard events are written."""

    def __post_init__(self) -> None:
        check(self.every_steps >= 1, "log.every_steps", self.every_steps, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """When the run validates: whenever either is due, and never where both are null."""

    every_steps: int | None = None
    """Validate after so many steps; null: not by steps."""
    every_epochs: int | None = 1
    """Validate after so many epochs; null: not by epochs."""
    batch: int | None = None
    """Images a rank at once; null: micro_batch."""
    max_samples: int | None = None
    """Validate on the first so many samples only; null: all."""

    def __post_init__(self) -> None:
        for key in ("every_steps", "every_epochs", "batch", "max_samples"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"validate.{key}", value, "1 or more, or null")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training run."""

    name: str = "run"
    """Name of the run, and of its folder in run_dir. Default: the names of the --config files, joined by a
    dash."""
    run_dir: str = "runs"
    """Where run folders are made, relative to the working directory."""
    seed: int = 0
    """Initial values, order of samples and augmentation are functions of it."""
    global_batch: int = 256
    """Images a step over all ranks. The learning rate scales with it; it never changes inside a run."""
    micro_batch: int = 16
    """Images a rank has in one forward pass. global_batch / (ranks x micro_batch) passes are accumulated."""
    epochs: int = 90
    """Length of the run."""
    max_steps: int | None = None
    """Stop after so many steps of the run, with the schedule of the whole; null: at the end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on CPU. Master weights are fp32 always."""
    model: ModelConfig
    """Which network."""
    data: DataConfig
    """What is trained on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How weights follow gradients."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate changes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run saves itself."""
    log: LogConfig = field(default_factory=LogConfig)
    """What the run writes about itself."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    """When the run validates."""

    def __post_init__(self) -> None:
        check(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", self.name) is not None,
            "name",
            self.name,
            "a folder name of letters, digits and _ . + - (set name=...)",
        )
        check(0 <= self.seed < 2**63, "seed", self.seed, "of 0 to 2^63 - 1")
        for key in ("global_batch", "micro_batch", "epochs"):
            check(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        check(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more, or null")
        check(
            self.global_batch % self.micro_batch == 0,
            "global_batch",
            self.global_batch,
            f"a multiple of micro_batch ({self.micro_batch})",
        )
