"""The keys of a fine-tuning configuration. null nearly always means: by the rule, or from the checkpoint and the data.

What was decided is printed at the start and stands in the run's config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scaletransfer.config.data import LabelPolicyConfig, check_reading
from scaletransfer.config.files import check
from scaletransfer.config.schema import CheckpointConfig, FailingConfig, LogConfig, OptimizerConfig, ValidateConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneModelConfig:
    """Which network, and from where."""

    name: str | None = None
    """Name of the network; null: what the checkpoint or the pre-training configuration says."""
    type: str | None = None
    """The same as name."""
    path: str | None = None
    """A pre-trained model: an exported folder, .safetensors, a published .pth.tar, Google's .npz, or a checkpoint of
    timm. null: pretrained_models/<name of the pre-training configuration>; of a network of timm, timm's own weights."""
    title: str | None = None
    """Name of the pre-trained model in results; null: that of its folder or file, or scratch."""
    from_scratch: bool = False
    """Start from drawn values instead of a checkpoint: the comparison that every transfer needs."""
    head: Literal["auto", "new", "keep"] = "auto"
    """new: a new classifier. keep: the checkpoint's, whose label names must be those of the data. auto: keep it
    where the label names are equal, a new one where their number differs, refuse anything else."""
    activation_checkpointing: bool | None = None
    """Recompute each block in the backward pass: less memory, about a third more time. null: where memory needs
    it."""
    compile: bool = False
    """Run the network through torch.compile."""
    freeze_through: str | None = None
    """Leave all tensors up to and with this part of the network as they are: root, block1 to block4 of BiT, or a
    module of another network such as layer3. null: train all."""
    linear_probe: bool = False
    """Train the classifier alone; all else stays as it is."""

    def __post_init__(self) -> None:
        check(self.type is None or self.name in (None, self.type), "model.type", self.type, "given alone, or as name")
        if self.type is not None and self.name is None:
            object.__setattr__(self, "name", self.type)
        frozen = self.freeze_through is None or not self.linear_probe
        check(frozen, "model.freeze_through", self.freeze_through, "null with model.linear_probe, which freezes more")


@dataclass(frozen=True, kw_only=True)
class FinetuneDataConfig:
    """The target: a folder of images, shards, or an official data set folder. Give one of them."""

    dataset: str | None = None
    """Name of the target in results; null: the name of its folder."""
    images: str | None = None
    """A folder with train/<class>/<image> and val/<class>/<image>, or with <class>/<image> alone."""
    shards: str | None = None
    """A folder made by make_shards, or its URL."""
    source: str | None = None
    """A data set by the name that make_shards knows it by, read from its own files in root."""
    root: str | None = None
    """The folder of that data set."""
    protocol: Literal["corrected", "paper"] = "corrected"
    """Splits and rows of data.source, as make_shards has them. paper: those of arXiv 2106.00116, for comparison with
    its results. Labels are data.policy's."""
    views: str | list[str] | None = None
    """Views of data.source to keep, such as [PA, AP], or all; null: the source's default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of data.source, for example {valid_share: 0.1} or {single_label: true}."""
    train_split: str = "train"
    """The split that is trained on."""
    valid_split: str | None = None
    """The split that is validated on; null: valid, or test where data.source or data.shards has no valid."""
    valid_share: float = 0.2
    """Share of an image folder's training images that becomes the validation split where it has none; drawn by
    their names alone, the same for every seed."""
    valid_ratio: float | None = None
    """Hold out this share of the training split for validation, by patient where patients are known, in place of the
    validation split that the set may have. null: that split; of shards with a training split alone, valid_share."""
    valid_seed: int = 0
    """Seed of the images that are held out; the run's own seed does not move them."""
    train_ratio: float | None = None
    """Train on this share of the training split (after valid_ratio), by patient where known, every class in it, drawn
    by the run's seed. null: all."""
    multilabel_force_classification: bool = False
    """Of a multi-label set the images with exactly one positive label, as classes (of PadChest: PadChest-Cl)."""
    policy: LabelPolicyConfig = field(default_factory=LabelPolicyConfig)
    """How raw label states become targets (multi-label shards)."""
    salt_file: str | None = None
    """Secret that makes the keys of a licensed data set read from its files; null: the one make_shards uses."""
    resolution: list[int] | None = None
    """[side before the crop, side of the crop]; null: BiT-HyperRule's (160, 128 below 96 x 96 pixels, else
    512, 480), from the training images' sizes."""
    flip: float | None = None
    """Probability of a horizontal flip in training. null: 0.5, but 0 for networks pre-trained on X-rays (anatomy
    has sides) unless protocol is paper."""
    mean: float | list[float] | None = None
    """Subtracted from pixels in 0..1; null: what the network was pre-trained with. Another value is refused."""
    std: float | list[float] | None = None
    """What pixels are then divided by; null: as with mean."""
    workers: int = 4
    """Processes that read and decode; 0: the training process itself."""
    prefetch_mb: float = 256.0
    """Most memory, in MB, for batches that are prepared ahead."""
    check_images: bool = True
    """Decode every image file once before training starts, so that a damaged one does not end it hours later.
    Shards were checked when they were made."""
    cache: str | None = None
    """Folder for decoded and resized images, shared by all runs that name it: an image is decoded once for all seeds,
    shots and starts, with the same result, bit for bit. It may be deleted at any time. null: none are kept."""
    cache_gb: float = 20.0
    """Most disk that data.cache may take, in 10^9 bytes."""

    def __post_init__(self) -> None:
        check(0 < self.valid_share < 1, "data.valid_share", self.valid_share, "above 0 and below 1")
        for key in ("valid_ratio", "train_ratio"):
            ratio = getattr(self, key)
            fits = ratio is None or 0 < ratio < 1 or (key == "train_ratio" and ratio == 1)
            check(fits, f"data.{key}", ratio, "a share above 0 and below 1, or null")
        check(0 <= self.valid_seed < 2**63, "data.valid_seed", self.valid_seed, "of 0 to 2^63 - 1")
        both = self.valid_ratio is None or self.valid_split in (None, "valid")
        check(both, "data.valid_split", self.valid_split, "null with data.valid_ratio, which makes a split of its own")
        size = self.resolution
        check(
            size is None or (len(size) == 2 and 8 <= size[1] <= size[0]),
            "data.resolution",
            size,
            "[side before the crop, side of the crop], the second at least 8 and not larger, or null",
        )
        check(self.flip is None or 0 <= self.flip <= 1, "data.flip", self.flip, "a probability, or null")
        check_reading(self.workers, self.prefetch_mb)
        check(0 < self.cache_gb < float("inf"), "data.cache_gb", self.cache_gb, "above 0 (no cache: data.cache=null)")
        check((self.source is None) == (self.root is None), "data.root", self.root, "given together with data.source")
        read = self.source is not None
        check(read or self.protocol == "corrected", "data.protocol", self.protocol, "corrected without data.source")
        check(read or self.views is None, "data.views", self.views, "null without data.source")
        check(read or not self.options, "data.options", self.options, "{} without data.source")
        for name in ("protocol", "views"):
            check(name not in self.options, "data.options", self.options, f"without {name}: that is data.{name}")
        for key in ("mean", "std"):
            value = getattr(self, key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            low = 0.0 if key == "mean" else 1e-6
            check(
                value is None or (len(numbers) in (1, 3) and all(low <= number <= 1 for number in numbers)),
                f"data.{key}",
                value,
                f"one number of {low:g} to 1 (pixels are 0..1), a list of one or three such, or null",
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimizerConfig:
    """How weights follow gradients. The schedule is BiT-HyperRule's."""

    name: Literal["sgd", "sgd_agc", "adamw"] = "sgd_agc"
    """sgd, adamw: torch's. sgd_agc: SGD with adaptive gradient clipping, as in arXiv 2106.00116."""
    lr: float | None = None
    """The peak learning rate. null: 0.003 x global_batch / 512 (bit) or 0.001 x global_batch / 128 (paper). adamw has
    no default."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """adamw: shares of the running means of gradient and squared gradient that are kept."""
    layer_decay: float | None = None
    """Each layer below the head learns at this share of the rate of the one above it (arXiv 2106.08254; timm's layers,
    so timm must be installed). null: all layers learn alike."""
    momentum: float = 0.9
    """sgd, sgd_agc: share of the last update that is kept."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: float = 0.0
    """sgd, sgd_agc: added to the gradient times the weight, after clipping; BiT-HyperRule has none. adamw: subtracted
    from the weight times the rate, but of vectors (norms, biases) nothing."""
    clipping: float = 0.01
    """sgd_agc: a unit's gradient norm is at most this share of its weight norm."""
    eps: float = 1e-3
    """sgd_agc: the least weight norm that counts."""
    head_exempt: Literal["paper", "corrected"] = "corrected"
    """sgd_agc: what of the head is not clipped. paper: its weight only. corrected: weight and bias."""

    def __post_init__(self) -> None:
        check(self.lr is None or 0 < self.lr < float("inf"), "optimizer.lr", self.lr, "a positive number, or null")
        check(self.name != "adamw" or self.lr is not None, "optimizer.lr", self.lr, "a number with adamw, such as 1e-4")
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(pair, "optimizer.betas", self.betas, "two numbers of 0 to below 1")
        decay = self.layer_decay
        check(decay is None or 0 < decay <= 1, "optimizer.layer_decay", decay, "above 0 and at most 1, or null")
        self.resolved(1.0)

    def resolved(self, peak: float) -> OptimizerConfig:
        """The same as the engine takes it; its checks name the keys."""
        return OptimizerConfig(
            name="sgd" if self.name == "adamw" else self.name,
            base_lr=peak,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            clipping=self.clipping,
            eps=self.eps,
            head_exempt=self.head_exempt,
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneCheckpointConfig(CheckpointConfig):
    """When the run saves itself, and how many of these it keeps."""

    every_steps: int | None = 100
    """Save after so many steps; null: not by steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.upload is None, "checkpoint.upload", self.upload, "null: fine-tuning runs are not copied away")
        check(self.resume == "latest", "checkpoint.resume", self.resume, "latest: fine-tuning has its own folder")

    every_minutes: float | None = 30.0
    """Save when so many minutes have passed since the last save; null: not by time."""
    keep: int = 1
    """How many complete checkpoints stay; older ones are deleted."""


@dataclass(frozen=True, kw_only=True)
class FinetuneValidateConfig(ValidateConfig):
    """When the run validates; always at its end as well."""

    every_steps: int | None = 100
    """Validate after so many steps; null: at the end only."""
    every_epochs: int | None = None
    """Not used: a fine-tuning run is counted in steps."""
    batch: int | None = None
    """Images at once; null: micro_batch."""
    max_samples: int | None = None
    """Not used: results are on all validation samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.every_epochs is None, "validate.every_epochs", self.every_epochs, "null; use validate.every_steps")
        check(self.max_samples is None, "validate.max_samples", self.max_samples, "null: results are on all samples")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run."""

    protocol: Literal["bit", "paper"] = "bit"
    """bit: BiT-HyperRule as published (square first resize, head of zeros, the rate falls at its steps). paper:
    what the code of arXiv 2106.00116 did (short side, PyTorch's default head, one step later)."""
    seed: int = 0
    """Few-shot selection, order, augmentation and drawn values are functions of it."""
    train_dir: str | None = None
    """Folder with one folder a class: training images (the key of the published configurations)."""
    val_dir: str | None = None
    """The same for validation; null with train_dir: data.valid_share of the training images."""
    nb_classes: int | None = None
    """Number of classes that the data must have; null: not checked."""
    examples_per_class: int | None = None
    """Training samples a class (few-shot); null: all."""
    allow_fewer: bool = False
    """Take what there is where a class has fewer."""
    few_shot: Literal["auto", "nested", "paper"] = "auto"
    """How examples are chosen. nested: the same images for every data form, a selection part of every larger one.
    paper: as the code of arXiv 2106.00116 did (the data set's own files only). auto: paper under protocol paper where
    the files are read, else nested."""
    selection: str | None = None
    """A selection.json of an earlier run: train on exactly these samples."""
    steps: int | None = None
    """Optimizer updates; the schedule's edges keep their shares. null: BiT-HyperRule's 500, 10,000 or 20,000."""
    mixup: float | None = None
    """Both parameters of mixup's Beta distribution; null: 0.1 from 20,000 training images on, else 0 (none)."""
    cutmix: float = 0.0
    """Both parameters of CutMix's Beta distribution (arXiv 1905.04899); 0: none. With mixup, one of the two an update,
    drawn with equal chances."""
    label_smoothing: float = 0.0
    """This share of each target is spread over all classes (arXiv 1512.00567). Multi-class only."""
    ema_decay: float | None = None
    """Keep a running mean of the weights, of which each update keeps this share; validation, result and model are the
    mean's. null: none."""
    oversampling: bool = False
    """Draw every class equally often, with replacement. As published, only of a full training set: it does nothing
    with examples_per_class or selection, where classes are equally large, and the run says so."""
    sampling: Literal["auto", "permutation", "replacement"] = "auto"
    """permutation: every sample once before any comes again. replacement: independent draws. auto: replacement
    where micro_batch is set and larger than the training set, as published."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class's loss counts (smallest class / its class) times. Multi-class only."""
    global_batch: int = 128
    """Images an update."""
    micro_batch: int | None = None
    """Images in one forward pass, a divisor of global_batch; null: the most that memory holds. Results are the
    same up to rounding (but see sampling)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA, fp32 on CPU. Master weights are fp32 always."""
    memory_gb: float | None = None
    """Memory to stay below when micro_batch or checkpointing is chosen, in 10^9 bytes; null: what is free (on a CPU
    rounded down to a power of two, so that the choice is the same each time)."""
    bootstrap: int = 1000
    """Resamples for the intervals of the final scores; 0: no intervals."""
    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    """Which network, and from where."""
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    """The target."""
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    """How weights follow gradients."""
    checkpoint: FinetuneCheckpointConfig = field(default_factory=FinetuneCheckpointConfig)
    """When the run saves itself."""
    log: LogConfig = field(default_factory=LogConfig)
    """What the run writes about itself."""
    validate: FinetuneValidateConfig = field(default_factory=FinetuneValidateConfig)
    """When the run validates; always at its end."""
    failing: FailingConfig = field(default_factory=FailingConfig)
    """What ends a run in which something goes wrong, and when."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", self.seed, "of 0 to 2^63 - 1")
        for key in ("nb_classes", "examples_per_class", "steps", "micro_batch"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, value, "1 or more, or null")
        check(self.global_batch >= 1, "global_batch", self.global_batch, "1 or more")
        check(self.bootstrap >= 0, "bootstrap", self.bootstrap, "0 or more")
        check(
            self.micro_batch is None or self.global_batch % self.micro_batch == 0,
            "micro_batch",
            self.micro_batch,
            f"a divisor of global_batch ({self.global_batch}), or null",
        )
        memory = self.memory_gb
        check(memory is None or 0 < memory < float("inf"), "memory_gb", memory, "above 0, or null")
        check(self.mixup is None or 0 <= self.mixup < float("inf"), "mixup", self.mixup, "0 (none) or more, or null")
        check(0 <= self.cutmix < float("inf"), "cutmix", self.cutmix, "0 (none) or more")
        check(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "at least 0 and below 1")
        ema = self.ema_decay
        check(ema is None or 0 < ema < 1, "ema_decay", ema, "above 0 and below 1, or null")
        targets = {
            "train_dir": self.train_dir,
            "data.images": self.data.images,
            "data.shards": self.data.shards,
            "data.source": self.data.source,
        }
        given = [key for key, value in targets.items() if value is not None]
        check(len(given) <= 1, " and ".join(given), "both given", "given alone: a run has one target")
        check(self.val_dir is None or self.train_dir is not None, "val_dir", self.val_dir, "given with train_dir")
        shot = self.examples_per_class
        check(
            shot is None or self.selection is None, "selection", self.selection, "null where examples_per_class is set"
        )
        check(
            not (self.oversampling and self.sampling == "permutation"),
            "sampling",
            self.sampling,
            "auto or replacement with oversampling",
        )
        check(
            not (self.model.from_scratch and self.model.head == "keep"),
            "model.head",
            self.model.head,
            "auto or new with model.from_scratch",
        )
