"""Which decoded images a fine-tuning run shares with others: the bridge from its configuration to ``decoded``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from scaletransfer.config import FinetuneDataConfig
from scaletransfer.decoded import StoredDataset
from scaletransfer.loader import ShardDataset
from scaletransfer.transforms import LONGEST, bit_resize


def keep_decoded(data: ShardDataset, cfg: FinetuneDataConfig, precrop: int, crop: int, *, square: bool) -> ShardDataset:
    """The dataset, with a store of resized images where ``data.cache`` names a folder for it.

    Raises:
        ValueError: the folder cannot be written.
    """
    if not isinstance(data, StoredDataset):
        return data
    assert cfg.cache is not None
    train = data.order is not None
    longest = LONGEST if train and not square else 1
    side = precrop if train else crop
    facts = {"resize": "bit", "side": side, "square": square or not train}
    resize: Callable[[Tensor], Tensor | None] = partial(
        bit_resize, train=train, precrop=precrop, crop=crop, square=square
    )
    return data.keep_in(Path(cfg.cache), int(cfg.cache_gb * 1e9), resize, facts, side * side * longest)


@contextmanager
def filling(datasets: Sequence[ShardDataset]) -> Iterator[list[Callable[[int], bool]]]:
    """What fills their stores, for ``check_images``, while no other run fills them; nothing without stores."""
    stored = [data for data in datasets if isinstance(data, StoredDataset)]
    with ExitStack() as stack:
        for data in sorted(stored, key=lambda data: data.store.path):  # all runs in one order
            stack.enter_context(data.store.filling())
        yield [data.fill for data in stored]
