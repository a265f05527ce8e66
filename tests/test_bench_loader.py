"""tools/bench: programs are measured in turn, what fails or is not there is said, and our own lines run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from bench import tables
from bench.bench_data import Drawn, prepare
from bench.conductor import Program, run
from bench.line_up import line_up
from bench.loader import main
from bench.peer_environments import missing
from bench.resume import A_SHARD, many_samples

from scaletransfer.index import load_index

REPOSITORY = Path(__file__).parents[1]
COUNTING = """
import json, os, sys, time
from bench.peers.protocol import serve

def opened(settings):
    def batches():
        while True:
            with open(settings["log"], "a") as log:
                log.write(settings["name"])
            time.sleep(0.01)
            print("noise on the standard output")
            if settings.get("fails") and os.path.getsize(settings["log"]) > 20:
                raise ValueError("no more images")
            yield 4
    return batches(), lambda: "four"

serve(opened)
"""


def program(folder: Path, name: str, **settings: object) -> Program:
    script = folder / "counting.py"
    script.write_text(COUNTING)
    told = {"name": name, "log": str(folder / "log"), "batch": 4, "workers": 2, "warm": 1, **settings}
    return Program(name=name, command=[sys.executable, str(script)], settings=told)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    drawn = Drawn(name="small", images=70, height=272, width=256, channels=1, kilobytes=21, quality=95)
    return prepare(drawn, tmp_path_factory.mktemp("data"), lambda text: None)


def test_programs_run_in_turn_and_never_together(tmp_path):
    pair = [program(tmp_path, "a"), program(tmp_path, "b")]
    run(pair, rounds=3, seconds=0.2, folder=tmp_path)
    assert [len(p.rates) for p in pair] == [3, 3] and all(0 < r < 400 for p in pair for r in p.rates)
    assert all(p.batches == "four" and p.rss > 1 and p.pss > 1 and not p.failure for p in pair)
    log = (tmp_path / "log").read_text()
    changes = sum(one != other for one, other in pairwise(log))
    # the one that is stopped may have written one batch before the signal came
    assert 5 <= changes <= 16, log
    assert all(p._process is None for p in pair)


def test_a_program_that_fails_is_named_and_the_others_go_on(tmp_path):
    pair = [program(tmp_path, "a", fails=True), program(tmp_path, "b")]
    run(pair, rounds=2, seconds=0.3, folder=tmp_path)
    assert "no more images" in pair[0].failure and len(pair[1].rates) == 2


def test_drawn_images_have_the_wanted_size_and_are_kept(small):
    index = load_index(small.shards)
    sizes = index.table("train")["size"]
    assert len(sizes) == 70 and abs(sizes.mean() / 21_000 - 1) < 0.05 and index.image.channels == 1
    before = small.tars[0].stat().st_mtime_ns
    again = prepare(small.drawn, small.files.parents[1], pytest.fail)
    assert again.tars[0].stat().st_mtime_ns == before and "70 drawn grey JPEGs of 256x272, 21 KB" in small.describe()


def test_peers_that_are_not_there_are_listed_with_the_command(small, tmp_path):
    lines = line_up("xray256", small, tmp_path / "none", quick=True)
    absent = [line for line in lines if line.install]
    assert [line.name for line in absent] == ["mosaicml MDS", "DALI on CPU"]
    assert all(line.program(0) is None for line in absent)
    assert missing("DALI", tmp_path / "none") == f"python tools/bench/loader.py --make-peers {tmp_path / 'none'}"
    shown = tables.table(lines, [0])
    assert f"| DALI on CPU | not installed: `python tools/bench/loader.py --make-peers {tmp_path / 'none'}` |" in shown


def test_ratios_of_medians(small, tmp_path):
    lines = {line.name: line for line in line_up("xray256", small, tmp_path, quick=True)}
    for name, rates in {"decode alone": [100, 300, 200], "ours": [150, 160, 140], "webdataset default": [25]}.items():
        made = lines[name].program(2)
        made.rates, made.cpu = rates, [0.001] * len(rates)
    shown = tables.table(list(lines.values()), [2])
    assert "| ours | 150 (140-160) | 0.75 |  | 1.00 |" in shown
    assert "| webdataset default | 25.0 (25.0-25.0) | 0.12 | 6.00 | 1.00 |" in shown
    found = {"xray256": list(lines.values())}
    assert "ours / webdataset default | 5 | 6.00 |" in tables.promises(found)
    assert tables.as_json(found)["xray256"]["ours"]["2"]["rates"] == [150, 160, 140]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "xrays"], "--only xrays: there are xray, xray256, colour, colour256"),
        (["--workers", "two"], "--workers two: give numbers with commas between them"),
        (["--images", "colour256=9"], "give NAME=N with one of the names xray, xray256, colour"),
        (["--images", "xray=9"], "give at least 32 images of xray"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_options_without_a_meaning(words, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        main(words)


@pytest.mark.engine
def test_our_lines_and_the_decoder_run(small, tmp_path):
    wanted = {"decode alone", "ours", "ours, affine", "ours, centre square resized", "ours, reading alone"}
    lines = [line for line in line_up("xray256", small, tmp_path, quick=False) if line.name in wanted]
    for line in lines:
        line.batch = 16
    programs = [made for line in lines if (made := line.program(2)) is not None]
    run(programs, rounds=1, seconds=0.1, folder=tmp_path)
    assert [p.failure for p in programs] == [""] * 5 and all(p.rate > 0 for p in programs)
    assert {p.batches for p in programs} == {"uint8, 272x256x1", "uint8 16x1x224x224", "uint8 16"}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("samples", "step"), [(20_000, 200), pytest.param(10_000_000, 100_000, marks=pytest.mark.slow)]
)
def test_a_fresh_process_resumes_without_decoding_what_was_seen(small, tmp_path, samples, step):
    """Index and table opened from files; ten million samples in under five seconds, imports included."""
    folder, seen = many_samples(small, samples, tmp_path / "many"), 64 * step
    index = load_index(folder)
    assert index.splits["train"].samples == samples and len(index.splits["train"].shards) == -(-samples // A_SHARD)
    settings = {"shards": str(folder), "kind": "xray", "augment": "crop", "size": 224, "seen": seen, "batch": 64}
    text = json.dumps({**settings, "workers": 2, "started": time.time()})
    command = [sys.executable, str(REPOSITORY / "tools" / "bench" / "resume_ours.py"), text]
    environment = {"PYTHONPATH": f"{REPOSITORY / 'tools'}:{REPOSITORY}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first_position"] == seen and found["decoded_seen"] == 0
    assert samples < 10_000_000 or found["ready"] < 5
    assert 64 <= found["decoded"] <= 64 * 9
