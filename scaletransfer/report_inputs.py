"""What a report is of: tables, run folders and sweeps, read, joined and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scaletransfer.result_names import PAPER, network_name
from scaletransfer.result_rows import CLOSE, Entry, Score, entries_of, once, scores_of, with_main
from scaletransfer.result_table import PACKAGED, read_table
from scaletransfer.results import RESULT, check_comparable, collect, read_run

TABLE = "results.csv"
"""The table that a sweep writes into its folder."""


@dataclass(frozen=True)
class Inputs:
    """Means over seeds of everything that was given, the single runs where they are known, and remarks."""

    entries: list[Entry]
    scores: list[Score]
    notes: list[str]
    unfinished: list[str]
    tables: list[Path]


def read_inputs(paths: Iterable[str | Path], compare: str | None = None) -> Inputs:
    """Read tables, run folders, folders of runs and sweeps.

    compare: "paper" or a table, of which the targets that these have as well are shown beside them.

    Raises:
        ValueError: what cannot be read, compared, or contradicts itself; one sentence with file, line and column.
    """
    scores, entries, notes, unfinished = [], [], [], []
    folders: list[Path] = []
    listed: set[Path] = set()
    read: list[Path] = []
    for given in dict.fromkeys(map(str, paths)):
        path = _packaged(given)
        if path.is_dir():
            tables = [path / TABLE] if (path / TABLE).is_file() else []
            folders += [path] if _has_runs(path) or not tables else []
            unfinished += _unfinished(path)
        elif path.is_file():
            tables = [path] if path.name != RESULT else []
            folders += [] if tables else [path]
        else:
            raise ValueError(f"{path} does not exist: give a table of results (.csv), run folders, or a sweep's folder")
        read += tables
        for table in tables:
            found, means, remarks = read_table(table)
            scores += _with_folders(found, table, listed)
            entries += means
            notes += remarks
    results = collect(folders) if folders else []
    check_comparable(results)
    # a run that a table lists has the name that it has there
    runs = [score for r in results if r.folder.resolve() not in listed for score in scores_of(r)]
    scores, remarks = once([*runs, *scores])
    entries += entries_of(scores)
    if not entries:
        raise ValueError(
            f"{', '.join(map(str, paths))} holds no result: give tables or folders of runs that have ended"
        )
    if compare is not None:
        others = read_inputs([compare]).entries
        source = PAPER if _packaged(compare) == PACKAGED else Path(compare).stem
        targets = {entry.dataset for entry in entries}
        shared = [replace(entry, source=source, main=None) for entry in others if entry.dataset in targets]
        if not shared:
            theirs = ", ".join(sorted({entry.dataset for entry in others}))
            notes.append(f"no target here is in {source} as well, whose targets are called {theirs}")
        entries += shared
    return Inputs(with_main(entries), scores, notes + remarks, sorted(set(unfinished)), read)


def _packaged(given: str) -> Path:
    path = Path(given)
    return PACKAGED if given == PAPER and not path.exists() else path


def _has_runs(folder: Path) -> bool:
    return any(RESULT in names for _, _, names in os.walk(folder))


def _with_folders(scores: Sequence[Score], table: Path, listed: set[Path]) -> list[Score]:
    """The rows of a table with what their run folders know besides, where these are at hand; these go to ``listed``."""
    known: dict[str, dict[str, Score]] = {}
    found = []
    for score in scores:
        if score.path not in known:
            folder = _folder_of(score.path, table)
            known[score.path] = {s.metric: s for s in scores_of(read_run(folder))} if folder else {}
            listed |= {folder.resolve()} if folder else set()
        run = known[score.path].get(score.metric)
        if run is None:
            any_run = next(iter(known[score.path].values()), None)
            found.append(score if any_run is None else replace(score, network=any_run.network or score.network))
            continue
        for field in ("dataset", "shot", "seed"):
            if getattr(run, field) != getattr(score, field):
                raise ValueError(
                    f"{score.where}, column {field}: the run in {run.path} has another {field}; correct one of them"
                )
        if abs(run.value - score.value) > CLOSE:
            raise ValueError(
                f"{score.where}, column metric_value: {score.value:.6g} % in {score.metric}, but {run.path}/{RESULT} "
                f"says {run.value:.6g} %; remove the row, or that folder"
            )
        named = score.pretraining.removesuffix(f"_{run.network}") if run.network else score.pretraining
        found.append(replace(run, pretraining=named, network=run.network or network_name(score.network)))
    return found


def _folder_of(path: str, table: Path) -> Path | None:
    """The run folder that a table names: from the table's folder or from here; a sweep's folder may have moved."""
    parts = Path(path).parts
    if not path or "\0" in path:
        return None
    whole, *tails = (table.parent.joinpath(*parts[start:]) for start in range(len(parts)))
    try:
        return next((f for f in (whole, Path(path), *tails) if (f / RESULT).is_file()), None)
    except OSError:  # no name that a file system takes
        return None


def _unfinished(path: Path) -> list[str]:
    """Folders of fine-tuning runs that have chosen their images, or failed in a sweep, and have no result."""
    begun = {"selection.json", "failure.json"}
    return [folder for folder, _, names in os.walk(path) if RESULT not in names and begun & set(names)]
