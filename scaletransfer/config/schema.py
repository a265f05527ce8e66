"""What every key of a configuration means, its default, and what it may be.

One frozen dataclass a concern; the text under a field is its documentation everywhere (`--help` prints it).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from scaletransfer.config.data import DataConfig
from scaletransfer.config.files import check


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    name: str
    """BiT-S-R50x1, BiT-M-R152x4, ... (depth 50, 101, 152; any width), BiT-tiny (about 2 million parameters,
    for tests), or a name that timm knows."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time. R152x4 needs it."""
    compile: bool = False
    """Run the network through torch.compile in training, BiT unit by unit. Code is made in the first step, which takes
    minutes on a CPU; where that fails, training goes on without it."""
    init_from: str | None = None
    """A checkpoint to start from: an exported folder, a published .pth.tar, .npz or .safetensors. null: drawn
    from the seed and the tensors' names."""
    new_head: bool = False
    """Draw the classifier anew where init_from brings one, as other classes need it."""

    def __post_init__(self) -> None:
        check(bool(self.name), "model.name", self.name, "the name of a network, such as BiT-S-R50x1")


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
    asynchronous: bool = True
    """Training waits for a copy in host memory only, and a thread writes it. false: it waits for the disk, and needs
    no memory: the copy takes 8 bytes a parameter (weights and momentum), divided by the ranks, once."""
    timeout_minutes: float = 30.0
    """How long rank 0 waits for the files of the other ranks once its own is there."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a run does when a checkpoint cannot be written (disk full). stop: end with an error. continue: say so, go
    on, and try again when the next is due. The checkpoints before it stay; a run's last one must be written."""
    upload: str | None = None
    """URL (s3://bucket/folder, file:///folder) below which finished checkpoints are copied while training goes on, in
    a folder with the run's name. What goes wrong there is said and ends nothing. null: nowhere."""
    upload_keep: int = 3
    """How many complete checkpoints stay there."""
    resume: str = "latest"
    """latest: go on from the newest checkpoint in the run folder, or in upload where that has a newer one. A folder or
    URL (of a run or of one checkpoint): look there instead of in upload. The command line has --resume for it."""

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
        limit = self.timeout_minutes
        check(0 < limit < float("inf"), "checkpoint.timeout_minutes", limit, "a positive number")
        check(self.upload_keep >= 1, "checkpoint.upload_keep", self.upload_keep, "1 or more")
        check(self.upload is None or self.upload != "", "checkpoint.upload", self.upload, "a URL, or null")
        check(self.resume != "", "checkpoint.resume", self.resume, "latest, a folder or a URL")


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
class FailingConfig:
    """What ends a run in which something goes wrong, and when."""

    timeout_minutes: float = 10.0
    """A rank that dies, or does not move, ends the run on all hosts within so many minutes, with a sentence that names
    it. One step, one batch of a validation and one checkpoint must each take less than half of it."""
    skip_nonfinite: int = 0
    """So many steps whose loss or gradient is NaN or infinite are left out (weights and momentum stay as they are)
    before the next one stops the run; 0: the first one does. More than 0 makes the host wait for the device in every
    step."""

    def __post_init__(self) -> None:
        minutes = self.timeout_minutes
        check(0.1 <= minutes < float("inf"), "failing.timeout_minutes", minutes, "0.1 or more")
        check(self.skip_nonfinite >= 0, "failing.skip_nonfinite", self.skip_nonfinite, "0 or more")


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
    failing: FailingConfig = field(default_factory=FailingConfig)
    """What ends a run in which something goes wrong, and when."""

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
