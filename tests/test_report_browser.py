"""The page in a real browser: no error, nothing from elsewhere, filters that change charts, values as in the table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import Browser, browser, needs_chromium
from helpers_report import write_run
from PIL import Image

from scaletransfer.report import main

pytestmark = needs_chromium
ATTACK = "<script>document.title='pwned'</script>"
MARKS = "[...document.querySelectorAll('#{chart} .mark')].map(m => [Number(m.dataset.mean), m.dataset.says])"
# of every text in the charts, the space that it takes, and that of the chart
BOXES = """[...document.querySelectorAll('.chart svg')].flatMap(svg => [...svg.querySelectorAll('text')].map(t => {
  const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect();
  return [svg.parentElement.id, t.textContent, a.left, a.right, a.top, a.bottom, b.left, b.right]; }))"""
CONTRAST = """(() => {
  const probe = document.createElement('span'); document.body.append(probe);
  const light = name => {
    probe.style.color = `var(--${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const found = [['ink', 'back'], ['soft', 'back'], ['soft', 'surface'], ['accent', 'back'],
    ...Array.from({length: 10}, (_, n) => [`c${n}`, 'back'])].map(([a, b]) => [a, ratio(a, b)]);
  probe.remove();
  return found; })()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(tmp_path_factory.mktemp("paper"), "paper")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, three models (one of them called like an attack), curves, and one seed alone with all images."""
    base = tmp_path_factory.mktemp("sweep")
    for dataset in ("digits", "tuberculosis_full"):
        for place, model in enumerate(("scratch", "chexpert_bit50x1", ATTACK + "long" * 30)):
            for shot in (1, 5, None):
                for seed in range(3 if shot else 1):
                    score = 0.4 + 0.1 * place + 0.01 * seed
                    folder = base / "runs" / f"{dataset}-{place}-{shot}-{seed}"
                    known = {"accuracy": score, "intervals": {"accuracy": [score - 0.03, score + 0.04]}}
                    changes = {"dataset": dataset, "pretrained_model": model, "shot": shot, "seed": seed}
                    write_run(folder, score, curve={100: score - 0.1, 200: score}, metrics=known, **changes)
    return report(base / "out", str(base / "runs"), "--compare", "paper")


def report(out: Path, *arguments: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaletransfer.report_figure.write_figures", lambda *_: [])
        assert main([*arguments, "--out", str(out)]) == 0
    return out


def load(tab: Browser, folder: Path, **window: object) -> None:
    tab.errors.clear()
    tab.requests.clear()
    tab.open(folder / "index.html", **window)  # type: ignore[arg-type]
    assert tab.requests == [(folder / "index.html").as_uri()] and tab.errors == []


def summary_of(folder: Path, **wanted: str) -> list[dict[str, str]]:
    with (folder / "summary.csv").open() as file:
        return [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]


def choose_target(tab: Browser, title: str) -> None:
    value = tab.js(f"[...document.querySelectorAll('#target option')].find(o => o.textContent === {title!r}).value")
    tab.choose("#target", value)


def values(tab: Browser) -> list[float]:
    return tab.js("[...document.querySelectorAll('#values td[data-mean]')].map(c => Number(c.dataset.mean))")


def test_charts_and_table_have_the_values_of_the_csv(tab: Browser, paper: Path) -> None:
    load(tab, paper)
    for title, dataset, metric in (
        ("Tuberculosis", "tuberculosis_full", "test_acc"),
        ("PadChest", "padchest", "test_mean_auc"),
        ("Pets", "pets", "test_acc"),
    ):
        choose_target(tab, title)
        rows = summary_of(paper, dataset=dataset, metric=metric)
        expected = sorted(round(float(row["mean"]), 4) for row in rows)
        assert len(expected) > 10
        for chart in ("bars", "few"):
            assert sorted(mean for mean, _ in tab.js(MARKS.format(chart=chart))) == pytest.approx(expected, abs=1e-3)
        assert sorted(values(tab)) == pytest.approx(expected, abs=1e-3)
    choose_target(tab, "Tuberculosis")
    says = [text for mean, text in tab.js(MARKS.format(chart="few")) if mean == 90.9091]
    assert says == [
        "R152x4, CheXpert + MIMIC + NIH + PadChest; all training images; accuracy (%): 90.91; 89.88 to 91.94 (95 % "
        "t-interval over seeds); seeds: 0 1 2 3 4; steps: 500; ★ best: clear of all other intervals"
    ]
    size = tab.js(MARKS.format(chart="size"))
    full = summary_of(paper, dataset="tuberculosis_full", metric="test_acc", shot="full_shot")
    assert sorted(mean for mean, _ in size) == pytest.approx(sorted(float(row["mean"]) for row in full), abs=1e-3)
    assert tab.errors == []


def test_filters_change_charts_and_table(tab: Browser, paper: Path) -> None:
    load(tab, paper)
    choose_target(tab, "Tuberculosis")
    before = len(values(tab))
    bars = "[...document.querySelectorAll('#bars rect')].map(r => r.getAttribute('height')).join()"
    drawn = tab.js(bars)
    tab.click("#networks input")  # R50x1
    after = values(tab)
    expected = summary_of(paper, dataset="tuberculosis_full", metric="test_acc", model="bit152x4")
    assert before == 75 and len(after) == len(expected) == 45 and tab.js(bars) != drawn
    assert sorted(after) == pytest.approx(sorted(float(row["mean"]) for row in expected), abs=1e-3)
    tab.click("#pretrainings input")  # CheXpert
    assert len(values(tab)) == 40 == len(tab.js(MARKS.format(chart="few")))
    assert "R152x4, CheXpert;" not in " ".join(says for _, says in tab.js(MARKS.format(chart="bars")))
    tab.click("#networks input")
    tab.click("#pretrainings input")
    assert len(values(tab)) == 75
    metric = tab.js(
        "[...document.querySelectorAll('#metric option')].find(o => o.textContent === 'mean AUROC (%)').value"
    )
    tab.choose("#metric", metric)
    expected = summary_of(paper, dataset="tuberculosis_full", metric="test_mean_auc")
    assert sorted(values(tab)) == pytest.approx(sorted(float(row["mean"]) for row in expected), abs=1e-3)
    tab.choose("#shot", 5)
    assert "5 training images per class" in tab.js(MARKS.format(chart="size"))[0][1]
    for _ in range(2):
        tab.js("document.querySelectorAll('#networks input').forEach(box => box.click())")
        assert tab.errors == []
    assert len(values(tab)) == 75


def test_values_are_told_to_pointer_and_keyboard(tab: Browser, paper: Path) -> None:
    load(tab, paper)
    x, y = tab.js(
        "(() => { const m = document.querySelector('#few .mark'); m.scrollIntoView({block: 'center'}); "
        "const r = m.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    tab.move(x, y)
    assert tab.js("document.getElementById('tip').hidden") is False
    first = tab.js("document.querySelector('#few .mark').dataset.says")
    assert tab.js("document.getElementById('tip').textContent").replace("\n", "; ") == first
    tab.move(2, 2)
    assert tab.js("document.getElementById('tip').hidden") is True
    tab.js("document.querySelector('#few svg').focus()")
    for key in ("ArrowRight", "ArrowRight", "End", "Home"):
        tab.key(key)
    assert tab.js("document.getElementById('tip').textContent").replace("\n", "; ") == first
    assert tab.js("document.querySelector('#few [aria-live]').textContent").replace(", ", "; ") == first.replace(
        ", ", "; "
    )
    tab.key("Escape")
    assert tab.js("document.getElementById('tip').hidden") is True
    unnamed = tab.js(
        "[...document.querySelectorAll('select, input, svg[tabindex], .scroll')].filter(e => !(e.labels && "
        "e.labels.length) && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(tab: Browser, sweep: Path, width: int, scheme: str, tmp_path: Path) -> None:
    load(tab, sweep, width=width, height=844, scheme=scheme)
    choose_target(tab, "Tuberculosis")
    assert tab.js("document.documentElement.scrollWidth") == width  # nothing sticks out, so nobody scrolls sideways
    for chart, text, left, right, _, _, low, high in tab.js(BOXES):
        assert left >= low - 1 and right <= high + 1, (chart, text)
    labels = [(c, a, b, t, u) for c, text, a, b, t, u, _, _ in tab.js(BOXES) if text and not text.startswith("★")]
    overlaps = [
        (one, other)
        for n, one in enumerate(labels)
        for other in labels[n + 1 :]
        if one[0] == other[0]
        and min(one[2], other[2]) - max(one[1], other[1]) > 1
        and min(one[4], other[4]) - max(one[3], other[3]) > 3
    ]
    assert not overlaps
    for name, ratio in tab.js(CONTRAST):
        assert ratio >= (4.5 if name in ("ink", "soft", "accent") else 3.0), (name, ratio)
    tab.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        brightness = np.asarray(picture.convert("L")).mean()
    assert (brightness > 150) == (scheme == "light")


def test_the_switch_overrules_the_system(tab: Browser, paper: Path) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    load(tab, paper, scheme="light")
    light = tab.js(back)
    tab.choose("#theme", "dark")
    dark = tab.js(back)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    tab.media(scheme="dark")
    tab.choose("#theme", "light")
    assert tab.js(back) == light
    tab.choose("#theme", "")
    assert tab.js(back) == dark
    tab.media("print", "dark")  # on paper it is light, whatever was chosen
    assert tab.js(back) == light
    tab.js("dispatchEvent(new Event('beforeprint'))")
    assert tab.js("document.querySelector('#few svg').viewBox.baseVal.width") == 660
    assert tab.js("getComputedStyle(document.querySelector('.theme')).display") == "none"
    assert tab.js("document.querySelectorAll('#values td[data-mean]').length") > 10


def test_names_do_not_run_and_one_seed_says_what_its_interval_is(tab: Browser, sweep: Path) -> None:
    load(tab, sweep)
    assert tab.js("document.title").startswith("Transfer results") and not tab.errors
    assert ATTACK + "longlong" in tab.js("document.querySelector('#pretrainings').textContent")
    says = [text for _, text in tab.js(MARKS.format(chart="few")) if "all training images" in text]
    assert len(says) == 3 and all("95 % bootstrap of one seed's validation set" in text for text in says)
    tab.choose("#shot", 5)
    curves = tab.js(MARKS.format(chart="curves"))
    assert sorted({round(mean, 3) for mean, _ in curves}) == [31, 41, 41 + 10, 61]  # 100 steps: 10 points below 200
    choose_target(tab, "Tuberculosis")
    assert tab.js("document.querySelectorAll('#sources input').length") == 2
    count = len(values(tab))
    tab.js("document.querySelectorAll('#sources input')[1].click()")
    assert (count, len(values(tab))) == (75 + 9, 9)
    assert tab.errors == []
