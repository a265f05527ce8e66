"""The page without a browser: it holds all that it needs, names are text, and its weight is bounded."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
from helpers_report import write_run, write_table

from scaletransfer.report import main
from scaletransfer.report_inputs import read_inputs
from scaletransfer.report_page import LIMIT, render, write_page
from scaletransfer.report_tables import tables_of, to_latex, to_markdown
from scaletransfer.summary import summarise

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}</SCRIPT ><!--'


class Parsed(html.parser.HTMLParser):
    """Elements and attributes of a page, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def evil_table(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [(0.5 + 0.01 * s, "test/acc", s, "5_shot", model, "data") for s in range(2) for model in ("evil", "good")]
    path = write_table(folder / "t.csv", rows)
    quoted = '"' + EVIL.replace('"', '""') + '"'
    path.write_text(path.read_text().replace(",evil,", f",{quoted},").replace(",data,", f",{quoted},"))
    return path


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    summary = summarise(read_inputs([evil_table(tmp_path)]).entries, None)
    tables = tables_of(summary)
    page = render(summary, (), tables, [EVIL]).decode()
    parsed = Parsed(page)
    assert [attrs.get("type") for tag, attrs in parsed.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert not [attrs for _, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    data = json.loads(parsed.scripts[0])
    assert data["targets"][0]["title"] == EVIL and EVIL in data["pretrainings"]
    assert "<" not in parsed.scripts[0] and "&" not in parsed.scripts[0]
    assert "<script>" not in to_markdown(tables[0]) and "onerror" in to_markdown(tables[0])
    assert r"\textless{}script\textgreater{}" in to_latex(tables[0]) and r"\{\{data\}\}" in to_latex(tables[0])


def test_files_of_odd_names_stay_in_their_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
    names = ("../../up", "a/b", "a b", "A_B", "..")
    rows = [(0.5, "test/acc", 0, "5_shot", "m", name) for name in names]
    assert main([str(write_table(tmp_path / "t.csv", rows)), "--out", str(tmp_path / "out")]) == 0
    files = sorted(path.name for path in (tmp_path / "out" / "tables").glob("*.csv"))
    assert files == ["A_B.csv", "a_b_2.csv", "a_b_3.csv", "table.csv", "up.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.csv"]


def test_nothing_is_loaded_and_only_its_own_script_runs(tmp_path: Path) -> None:
    summary = summarise(read_inputs(["paper"]).entries, None)
    page = render(summary, (), tables_of(summary), ["paper"])
    assert len(page) < 200_000
    parsed = Parsed(page.decode())
    for tag, attrs in parsed.tags:
        assert not attrs.get("src") and (attrs.get("href") or "data:,") == "data:,", (tag, attrs)
        assert tag not in ("iframe", "object", "embed", "base")
    style = (Path(__file__).parents[1] / "scaletransfer" / "page" / "style.css").read_text()
    assert "url(" not in style and "@import" not in style
    policy = next(
        attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    addresses = set(re.findall(rb"https?://[^\s\"'<]+", page))
    assert addresses == {b"http://www.w3.org/2000/svg"}  # a name space, which nothing asks for


def test_what_would_make_the_page_too_heavy_is_left_out_and_said(tmp_path: Path, monkeypatch) -> None:
    assert LIMIT < 2_000_000
    lines = ["dataset,metric,primary,model,pretraining,shot,n_seeds,mean,std_ddof1"]
    for metric in ("acc", *(f"f1_{n}" for n in range(6))):
        for shot in ("1_shot", "5_shot", "10_shot", "full_shot"):
            lines += [f"d,test/{metric},,bit50x1,pretraining_{n:03},{shot},5,{50 + n / 100},1" for n in range(60)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    summary = summarise(read_inputs([path]).entries, None)
    page = tmp_path / "index.html"
    monkeypatch.setattr("scaletransfer.report_page.LIMIT", 140_000)
    notes = write_page(summary, (), tables_of(summary), page, ["t.csv"])
    assert "MB" in notes[0] and "nor any but the main metric" in notes[1]
    assert 60_000 < page.stat().st_size < 140_000
    data = json.loads(Parsed(page.read_text()).scripts[0])
    assert len(data["rows"]) == 4 * 60 and [m["title"] for m in data["metrics"]] == ["accuracy (%)"]
    monkeypatch.setattr("scaletransfer.report_page.LIMIT", 40_000)
    with pytest.raises(ValueError, match="more than 2: report fewer results at once"):
        write_page(summary, (), tables_of(summary), page, ["t.csv"])


def test_curves_and_kinds_of_intervals_reach_the_page(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
    known = {"accuracy": 0.5, "intervals": {"accuracy": [0.4, 0.6]}}
    write_run(tmp_path / "runs" / "one", 0.5, curve={100: 0.3, 200: 0.5}, metrics=known)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    data = json.loads(Parsed((tmp_path / "out" / "index.html").read_text()).scripts[0])
    (row,) = data["rows"]
    assert row == [0, 0, 5, 0, 0, 0, 50.0, 40.0, 60.0, "bootstrap", "0", 0, "500"]
    curve = data["curves"][0]
    assert (curve["metric"], curve["steps"], curve["mean"]) == ("accuracy", [100, 200], [30.0, 50.0])


@pytest.mark.parametrize("shot", [1, 5, None])
def test_a_table_without_full_shot_results_has_no_full_shot_table(tmp_path: Path, shot: int | None) -> None:
    write_run(tmp_path / "one", 0.5, shot=shot)
    tables = tables_of(summarise(read_inputs([tmp_path]).entries))
    assert (tables[0].name == "full_shot") == (shot is None)
