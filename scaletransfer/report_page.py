"""The report as one page: charts with filters, tables, everything inside the file, nothing from elsewhere.

Names in the results may hold anything. In the page they are text: escaped in the tables, JSON with escaped "<" and "&"
for the charts, which put it in as text alone; a content security policy lets only the page's own script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaletransfer.report_curves import LOSS, Curve
from scaletransfer.report_tables import Table, Value, text_of
from scaletransfer.result_names import (
    lower_is_better,
    metric_title,
    network_order,
    network_title,
    title,
)
from scaletransfer.summary import Cell, Row, Summary

PAGE = Path(__file__).with_name("page")
LIMIT = 1_950_000
"""Bytes that the page may weigh: what mail and wikis take, below 2 MB."""
LONG = 40
MARK = '<meta name="generator" content="scaletransfer report">'


def write_page(
    summary: Summary,
    curves: Sequence[Curve],
    tables: Sequence[Table],
    path: Path,
    named: Sequence[str],
    unfinished: int = 0,
) -> list[str]:
    """Write the page; what had to be left out of it, in sentences.

    named: what the report was asked for. unfinished: how many runs have no result, which the page's head says.

    Raises:
        ValueError: it would be too large even with the main metrics alone.
    """
    notes: list[str] = []
    page = render(summary, curves, tables, named, unfinished)
    main = Summary(tuple(cell for cell in summary.cells if cell.main), summary.models, summary.baseline)
    if len(page) > LIMIT:
        notes.append(f"the page would weigh {len(page) / 1e6:.1f} MB: it has no learning curves (figures/ has them)")
        page = render(summary, (), tables, named, unfinished)
    if len(page) > LIMIT:
        notes.append("nor any but the main metric of each target (summary.csv and tables/ have all)")
        kept = {cell.dataset for cell in main.cells} | {"full_shot", "comparison"}
        page = render(main, (), [table for table in tables if table.name in kept], named, unfinished)
    if len(page) > LIMIT:
        raise ValueError(f"the page would weigh {len(page) / 1e6:.1f} MB, more than 2: report fewer results at once")
    path.write_bytes(page)
    return notes


def render(
    summary: Summary, curves: Sequence[Curve], tables: Sequence[Table], named: Sequence[str], unfinished: int = 0
) -> bytes:
    """The page, in UTF-8."""
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    named = [Path(name).name or name for name in named]  # a page is passed on: no folders of the machine it is from
    own = [row for cell in summary.cells if cell.main for row in cell.rows if not row.entry.source]
    runs, models = sum(len(row.score.seeds) for row in own), len({row.model for row in own})
    counts = {"run": runs, "model": models, "target": len({row.entry.dataset for row in own})}
    head = f"{', '.join(named)}: " + ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items())
    head += f"; {unfinished} more have no result (yet)" if unfinished else ""
    parts = {
        "mark": MARK,
        "title": html.escape(f"Transfer results: {', '.join(named)}"),
        "from": html.escape(head),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": to_json(content(summary, curves)),
        "tables": "\n".join(map(_table, tables)),
    }
    template = (PAGE / "index.html").read_text(encoding="utf-8")
    # in one pass, so that a name in the results is never taken for a place in the template
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode("utf-8", "replace")


def content(summary: Summary, curves: Sequence[Curve]) -> dict[str, Any]:
    """What the charts draw: names once, and rows that point to them."""
    targets = list(dict.fromkeys(cell.dataset for cell in summary.cells))
    metrics = list(dict.fromkeys(cell.metric for cell in sorted(summary.cells, key=lambda cell: not cell.main)))
    networks = sorted({model[1] for model in summary.models}, key=network_order)
    pretrainings = list(dict.fromkeys(sorted((m[0] for m in summary.models), key=lambda p: (p != summary.baseline, p))))
    sources = sorted({model[2] for model in summary.models} | {""})
    mains = {cell.dataset: metrics.index(cell.metric) for cell in summary.cells if cell.main}
    places = [
        {name: n for n, name in enumerate(names)} for names in (targets, metrics, pretrainings, networks, sources)
    ]
    return {
        "targets": [{"title": title(name), "main": mains[name]} for name in targets],
        "metrics": [{"title": metric_title(name), "lower": lower_is_better(name)} for name in metrics],
        "networks": [network_title(name) for name in networks],
        "pretrainings": [title(name) for name in pretrainings],
        "sources": sources,
        "rows": [_row(cell, row, places) for cell in summary.cells for row in cell.rows],
        "curves": [
            {
                "target": targets.index(curve.dataset),
                "metric": curve.metric,
                "shot": curve.shot or 0,
                "p": pretrainings.index(curve.pretraining),
                "n": networks.index(curve.network),
                "seeds": curve.seeds,
                "steps": curve.steps,
                **{name: [_short(value) for value in getattr(curve, name)] for name in ("mean", "low", "high")},
            }
            for curve in curves
        ],
        "curveMetrics": {
            name: {"title": metric_title(name), "lower": lower_is_better(name)}
            for name in dict.fromkeys([*(curve.metric for curve in curves), LOSS])
        },
    }


def _row(cell: Cell, row: Row, places: Sequence[dict[str, int]]) -> list[Any]:
    targets, metrics, pretrainings, networks, sources = places
    pretraining, network, source = row.model
    low, high = row.score.interval or (None, None)
    return [
        targets[cell.dataset],
        metrics[cell.metric],
        cell.shot or 0,
        pretrainings[pretraining],
        networks[network],
        sources[source],
        _short(row.score.mean),
        None if low is None else _short(low),
        None if high is None else _short(high),
        row.score.kind,
        " ".join(map(str, row.score.seeds)),
        int(row.best),
        " ".join(map(str, row.entry.last_steps)),
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def to_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character of it ends one, or begins markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _table(table: Table) -> str:
    """A table as HTML; the long ones and those of single targets, which the charts show as well, are folded."""
    numbers = [any(isinstance(row[i], Value) for row in table.rows) for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{"" if number else " class=text"}>{html.escape(name)}</th>'
        for name, number in zip(table.header, numbers, strict=True)
    )
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
    shown = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
        f'<p class="note">{html.escape(" ".join(table.notes))}</p>'
    )
    title_ = html.escape(table.title)
    if table.name in ("full_shot", "comparison") and len(table.rows) <= LONG:
        return f"<h3>{title_}</h3>{shown}"
    return f"<details><summary>{title_}</summary>{shown}</details>"


def _cell(value: str | Value | None) -> str:
    if isinstance(value, Value):
        return f"<td{' class=best' if value.best else ''}>{html.escape(text_of(value))}{' ★' * value.best}</td>"
    return f"<td class=text>{html.escape(value or '')}</td>"
