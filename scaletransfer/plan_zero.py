"""DeepSpeed's settings that cost memory or traffic, and what follows from them for ZeRO-3: arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from scaletransfer.shares import PERSISTENT, Shape


@dataclass(frozen=True, kw_only=True)
class ZeroRules:
    """In numbers (not bytes). The defaults are DeepSpeed's (runtime/zero/config.py of 0.19)."""

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = PERSISTENT
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    overlap_comm: bool | None = None

    @classmethod
    def of(cls, settings: dict[str, object]) -> ZeroRules:
        """From the section ``zero_optimization`` of a DeepSpeed configuration; what it leaves open is the default."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in settings.items() if k in known and v != "auto"})  # type: ignore[arg-type]

    def large(self, shapes: Sequence[Shape]) -> list[int]:
        """Sizes of the parameters that are not always whole."""
        return [size for size in map(math.prod, shapes) if size > self.stage3_param_persistence_threshold]

    def kept_for_backward(self, shapes: Sequence[Shape]) -> int:
        """Numbers of parameters that ZeRO-3 does not gather a second time for their backward.

        DeepSpeed keeps a parameter after its forward when its backward comes within ``stage3_max_reuse_distance``
        numbers of others, which is so for the last ones of a network; the small ones that always stay are not counted.
        """
        kept = behind = 0
        for size in reversed(self.large(shapes)):
            kept += size if 2 * behind < self.stage3_max_reuse_distance else 0
            behind += size
        return kept

    def gathered(self, shapes: Sequence[Shape]) -> int:
        """Numbers of parameters that are whole at once, beside the small ones that always are.

        What is kept for backward, and what is fetched ahead: ``stage3_prefetch_bucket_size``, and the parameter over
        it. What is fetched together comes in one flat tensor, which lives beside the parameters that are copied out of
        it until the last of them is used. A single one needs no copy.
        """
        sizes = self.large(shapes)
        ahead = min(sum(sizes), self.stage3_prefetch_bucket_size + max(sizes, default=0))
        together = ahead if self.stage3_prefetch_bucket_size else 0
        return together + min(sum(sizes), self.kept_for_backward(shapes) + ahead)
