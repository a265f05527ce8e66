"""What the training loop needs of whoever configures it: pre-training and fine-tuning have it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from scaletransfer.config import CheckpointConfig, FailingConfig, LogConfig, ValidateConfig


class LoaderSettings(Protocol):
    """How batches are made."""

    @property
    def workers(self) -> int: ...
    @property
    def prefetch_mb(self) -> float: ...


class OptimizerSettings(Protocol):
    """What the loop needs to know of the optimizer."""

    @property
    def momentum(self) -> float: ...


class RunSettings(Protocol):
    """What the loop needs of a configuration: PretrainConfig and FinetuneConfig have it."""

    @property
    def global_batch(self) -> int: ...
    @property
    def data(self) -> LoaderSettings: ...
    @property
    def optimizer(self) -> OptimizerSettings: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def log(self) -> LogConfig: ...
    @property
    def validate(self) -> ValidateConfig: ...
    @property
    def failing(self) -> FailingConfig: ...


class Mixing(Protocol):
    """Mixes the images of an update, and their targets: see transfer.mixup."""

    def images(self, step: int, images: Tensor) -> Tensor: ...
    def targets(self, step: int, target: Tensor) -> Tensor: ...
