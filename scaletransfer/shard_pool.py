"""Work on shards in this process or in several; workers end when the command that started them is gone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol

import cv2

from scaletransfer.shard_pixels import one_thread


class Counted(Protocol):
    """Work of a worker process that is counted in samples."""

    @property
    def samples(self) -> Sized: ...


def run_all(
    work: Callable[..., dict[str, Any]], tasks: Sequence[Counted], workers: int, progress: Callable[[int], object]
) -> Generator[dict[str, Any], None, None]:
    """`work(task, progress)` of every task, by `workers` processes as in `write_all`; the results as they come.

    work: a function of a module, which pickle can name; `progress` is left out in another process.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            with one_thread():
                result = work(task, progress)
            yield result
        return
    # spawn: the parent may hold threads (tqdm, libraries), and a forked copy of a locked lock never opens
    context = multiprocessing.get_context("spawn")
    remaining = iter(tasks)
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start_worker) as pool:
        running: dict[Future[dict[str, Any]], Counted] = {}
        try:
            while True:
                # two shards a worker in flight: a plan of a million images isn't pickled all at once
                while len(running) < 2 * workers and (following := next(remaining, None)) is not None:
                    running[pool.submit(work, following)] = following
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    content = future.result()
                    progress(len(task.samples))
                    yield content
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process was killed (out of memory?); run the same command again, with fewer "
                "--workers, to continue after the last finished shard"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    cv2.setNumThreads(0)  # the other workers have the other cores
    die_with_parent()


def die_with_parent() -> None:
    """Let a worker end when its parent is killed: it would wait for work for ever, or still write shards."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
