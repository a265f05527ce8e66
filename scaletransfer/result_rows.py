"""Scores of runs as rows: of run folders, of the published tables, of our own; each run counts once.

A row is one metric of one run (``Score``), or, where only that was published, the mean of some seeds (``Entry``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from scaletransfer.result_names import lower_is_better, network_name, split_model
from scaletransfer.results import Estimate, Result, shot_words

CLOSE = 0.006
"""Percent by which the same value may differ between two files that were rounded differently (two decimals)."""
# what a mean over classes is called begins with this; mean_classes says over how many
_MEANS, _NO_SCORE = "mean_", "mean_classes"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one run, in percent where the metric is a share.

    where: file and line, or folder, for messages. bootstrap: the run's own interval, None where it is not known.
    main: whether the metric is the one to look at for this data set; None: not said. source: "" or "paper".
    """

    dataset: str
    metric: str
    pretraining: str
    network: str
    shot: int | None
    seed: int
    value: float
    last_step: int
    path: str
    where: str
    bootstrap: tuple[float, float] | None = None
    main: bool | None = None
    source: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What a value is of: rows with the same key are of one run."""
        return (self.source, self.dataset, self.metric, self.pretraining, self.network, self.shot, self.seed)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The mean of a model's seeds in one metric, data set and number of images; ``values`` is empty where only the
    mean is known."""

    dataset: str
    metric: str
    pretraining: str
    network: str
    shot: int | None
    estimate: Estimate
    last_steps: tuple[int, ...]
    where: str
    main: bool | None = None
    source: str = ""
    values: dict[int, float] = field(default_factory=dict)
    paths: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """What the mean is of: there may be one with this key."""
        return (self.source, self.dataset, self.metric, self.pretraining, self.network, self.shot)


def scores_of(result: Result) -> list[Score]:
    """All shares in a run's result.json that are means or accuracies, with their bootstrap intervals."""
    pretraining, network = split_model(result.pretrained_model)
    network = network_name(result.network) or network
    bounds = result.metrics.get("intervals") or {}
    found = []
    for name, value in result.metrics.items():
        wanted = name.startswith(("accuracy", _MEANS)) and name != _NO_SCORE
        if not wanted or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        factor = 1.0 if lower_is_better(name) else 100.0
        between = bounds.get(name)
        found.append(
            Score(
                dataset=result.dataset,
                metric=name,
                pretraining=pretraining,
                network=network,
                shot=result.shot,
                seed=result.seed,
                value=factor * float(value),
                last_step=result.last_step,
                path=str(result.folder),
                where=str(result.folder),
                bootstrap=(factor * between[0], factor * between[1]) if between else None,
                main=name == result.metric,
            )
        )
    return found


def once(scores: Iterable[Score]) -> tuple[list[Score], list[str]]:
    """Every run's value once, in the order of the first row that has it; and notes on rows that said something else.

    Rows that a run wrote again after it had been interrupted have the same path: the one with the most steps counts,
    the last of these (as the paper's own notebook does).

    Raises:
        ValueError: two runs in different places for one data set, number of images, model and seed that differ.
    """
    kept: dict[tuple[object, ...], Score] = {}
    changed: list[Score] = []
    for score in scores:
        old = kept.get(score.key)
        if old is None:
            kept[score.key] = score
            continue
        same = math.isclose(old.value, score.value, rel_tol=0, abs_tol=CLOSE)
        if not same and old.path != score.path:
            raise ValueError(
                f"{old.where} and {score.where} both are {score.pretraining} {score.network} on {score.dataset} with "
                f"{shot_words(score.shot)} and seed {score.seed}, with {old.value:.6g} and {score.value:.6g} in "
                f"{score.metric}: leave one of them out"
            )
        if not same:
            changed.append(score)
        if same and score.bootstrap is None and old.bootstrap is not None:
            continue  # a run's folder knows more than the table that it is listed in
        if score.last_step >= old.last_step:
            kept[score.key] = score
    notes = []
    if changed:
        first = changed[0]
        notes.append(
            f"{len(changed)} row{'s' * (len(changed) > 1)} had another value for a run that is there already "
            f"({first.where} is the first): of each run the row with the most steps counts, the last of these"
        )
    return list(kept.values()), notes


def entries_of(scores: Sequence[Score]) -> list[Entry]:
    """The scores of each model averaged over its seeds; a single seed has its bootstrap interval, if there is one."""
    groups: dict[tuple[object, ...], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.key[:-1]].append(score)
    entries = []
    for members in groups.values():
        members.sort(key=lambda score: score.seed)
        one = members[0]
        values = {score.seed: score.value for score in members}
        entries.append(
            Entry(
                dataset=one.dataset,
                metric=one.metric,
                pretraining=one.pretraining,
                network=one.network,
                shot=one.shot,
                estimate=Estimate.of(values, one.bootstrap if len(members) == 1 else None),
                last_steps=tuple(sorted({score.last_step for score in members})),
                where=one.where,
                main=next((score.main for score in members if score.main is not None), None),
                source=one.source,
                values=values,
                paths=tuple(score.path for score in members),
            )
        )
    return entries


def with_main(entries: Sequence[Entry]) -> list[Entry]:
    """Every entry says whether its metric is the main one of its data set.

    What a file says counts first; else it is accuracy, but the mean AUROC for PadChest, as published, and where there
    is no accuracy.
    """
    metrics: dict[str, list[str]] = defaultdict(list)
    said: dict[str, str] = {}
    for entry in entries:
        if entry.metric not in metrics[entry.dataset]:
            metrics[entry.dataset].append(entry.metric)
        if entry.main:
            said.setdefault(entry.dataset, entry.metric)
    for dataset, names in metrics.items():
        first = "mean_auroc" if dataset == "padchest" or dataset.startswith("padchest_") else "accuracy"
        wanted = [name for name in (first, "accuracy", "mean_auroc") if name in names]
        said.setdefault(dataset, (wanted or names)[0])
    return [replace(entry, main=entry.metric == said[entry.dataset]) for entry in entries]
