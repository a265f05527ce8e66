"""Batches prepared ahead, in threads or in processes.

Threads fill one batch together: the decoder and the resampling release the interpreter's lock, nothing is copied from
process to process, and the reader's files and cache are shared. Processes are for pipelines that would hold the lock,
such as RandAugment; their batches come through a pipe, never through named shared memory, of which containers have
little. Neither holds any state: a resumed run needs none of theirs.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scaletransfer.loader import Batch, Pending, ShardDataset
from scaletransfer.storage_errors import StorageError

WorkerKind = Literal["auto", "threads", "processes"]
_MOST_AHEAD = 4
"""Batches ahead for each worker; beyond that, memory only delays the end of a run."""
_PIECES = 4
"""Parts of a batch for each thread, so that one that is late holds nobody up for long."""


class Loader(Protocol):
    """Batches, in the order of the sampler."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


def make_loader(
    dataset: ShardDataset,
    sampler: Sampler[list[int]],
    workers: int,
    kind: WorkerKind = "auto",
    prefetch_mb: float = 256.0,
) -> Loader:
    """Batches of ``dataset``, prepared ahead by ``workers`` threads or processes (0: when they are asked for).

    prefetch_mb: the most memory for batches that are ready or in work, in MB; one batch, and with processes one for
    each worker, is always in work. kind "auto": threads, where the dataset's transform is fused; else processes.

    Raises:
        ValueError: threads are asked for, and the transform draws from torch's generator, which they would share.
    """
    cv2.setNumThreads(0)  # the parallelism is ours: a pool for each small image costs more than it gives
    if kind == "threads" and dataset.fused is None:
        raise ValueError(
            "data.worker_kind is threads, but this run's images go through torchvision (RandAugment, validation of "
            "natural images, fine-tuning), which needs processes: set data.worker_kind to auto"
        )
    if workers and kind != "processes" and dataset.fused is not None:
        return ThreadLoader(dataset, sampler, workers, prefetch_mb)
    return ProcessLoader(dataset, sampler, workers, prefetch_mb)


def batches(loader: Loader) -> Iterator[Batch]:
    """The loader's batches; an error in a worker process comes out as the sentence that it was there.

    Raises:
        ValueError: what ``ShardDataset`` raises.
    """
    try:
        yield from loader
    except (ValueError, OSError) as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        # torch wraps the worker's whole traceback into the message; its last line is "ValueError: <sentence>"
        raise ValueError(text.strip().splitlines()[-1].split(": ", 1)[-1]) from error


@contextmanager
def dead_workers_named() -> Iterator[None]:
    """A loader process that was killed becomes one sentence.

    torch raises a RuntimeError for it from a signal handler, wherever the training process is at that moment: this
    belongs around the whole loop.

    Raises:
        ValueError: a loader process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads data has died ({str(error).splitlines()[0]}): the machine may be short of memory; "
            "lower data.workers or data.prefetch_mb and start the same command again"
        ) from error


class ThreadLoader:
    """Each batch is cut into pieces that threads fill in; batches come out in order."""

    def __init__(self, dataset: ShardDataset, sampler: Sampler[list[int]], threads: int, prefetch_mb: float) -> None:
        assert dataset.fused is not None and threads >= 1
        self.dataset, self.sampler, self.threads = dataset, sampler, threads
        self.most = prefetch_mb * 1e6

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        pinned = torch.cuda.is_available()
        ahead: deque[tuple[Pending, list[Future[None]]]] = deque()
        held, image = 0, self.dataset.image_bytes()
        stopped, failed = Event(), list[StorageError]()
        upcoming = iter(self.sampler)
        positions = next(upcoming, None)
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read-and-decode")
        try:
            while True:
                while positions is not None and len(ahead) < max(2, _MOST_AHEAD * self.threads):
                    if ahead and held + image * len(positions) > self.most:
                        break
                    pending = self.dataset.begin(positions, pinned=pinned)
                    held += image * len(positions)
                    pieces = [
                        pool.submit(self._fill, pending, piece, stopped, failed) for piece in self._cut(positions)
                    ]
                    ahead.append((pending, pieces))
                    positions = next(upcoming, None)
                if not ahead:
                    return
                pending, pieces = ahead.popleft()
                wait(pieces, return_when=FIRST_EXCEPTION)  # woken once: this thread needs a core and the lock for it
                for piece in pieces:
                    piece.result()
                held -= image * len(pending.positions)
                yield self.dataset.finish(pending)
        finally:
            # also where the consumer stops early or a sample is an error: nothing goes on in the background
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _cut(self, positions: list[int]) -> list[range]:
        size = max(1, -(-len(positions) // (_PIECES * self.threads)))
        return [range(first, min(first + size, len(positions))) for first in range(0, len(positions), size)]

    def _fill(self, pending: Pending, piece: range, stopped: Event, failed: list[StorageError]) -> None:
        for number in piece:
            if failed:  # a server that is gone: nobody else waits for it, which may take minutes
                raise failed[0]
            if stopped.is_set():
                return
            try:
                self.dataset.load(pending, number)
            except StorageError as error:
                failed.append(error)
                raise


class ProcessLoader:
    """torch's DataLoader over micro-batches; with 0 workers the training process decodes.

    Batches leave a worker as arrays: those travel through its pipe by value, where tensors would become files in
    shared memory.
    """

    def __init__(self, dataset: ShardDataset, sampler: Sampler[list[int]], workers: int, prefetch_mb: float) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.workers, self.most = workers, prefetch_mb * 1e6

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            for positions in self.sampler:
                yield self.dataset.__getitems__(positions)
            return
        pinned = torch.cuda.is_available()
        with warnings.catch_warnings():
            # their number is the configuration's: its default is for larger machines, and does no harm on small ones
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                _Arrays(self.dataset),
                batch_sampler=self.sampler,
                collate_fn=_finished,
                num_workers=self.workers,
                prefetch_factor=self._ahead(),
                multiprocessing_context="fork",
            )
            iterator = iter(loader)
        try:
            for arrays in iterator:
                batch = {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
                if pinned:
                    batch["image"] = batch["image"].pin_memory()
                yield batch
        finally:
            # left to the garbage collector, which an error's traceback may keep from it, each process costs seconds
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _ahead(self) -> int:
        """Batches ahead for each worker, from the size of the first one."""
        first = next(iter(self.sampler), None)
        if first is None:
            return 1
        one = len(first) * self.dataset.image_bytes()
        return int(min(_MOST_AHEAD, max(1, self.most // (self.workers * one))))


class _Arrays(Dataset[dict[str, Any]]):
    """A dataset's batches, with arrays in place of tensors."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        batch = self.dataset.__getitems__(positions)
        return {name: np.asarray(a) if isinstance(a, Tensor) else a for name, a in batch.items()}


def _finished(batch: Any) -> Any:
    """``__getitems__`` has already made the batch."""
    return batch
