"""A bench on which wrong input is refused: small shards, a finished run, a pickle that tells when it is executed.

A test module imports the fixtures that it uses.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_data import SALT, make_chexpert, make_image_folder

from scaletransfer.cli import run_command
from scaletransfer.pretrain import main as pretrain
from scaletransfer.shards import build, plan_shards
from scaletransfer.sources import open_source

REPOSITORY = Path(__file__).parents[1]
CONFIG = """\
seed: 3
epochs: 1
max_steps: 1
global_batch: 16
micro_batch: 8
precision: fp32
model: {name: BiT-tiny}
data: {image_size: 32, workers: 0}
schedule: {kind: cosine, warmup_epochs: 0}
checkpoint: {every_minutes: null}
log: {tensorboard: false}
validate: {every_epochs: null}
"""


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def listing(folder: Path) -> dict[str, str]:
    """Every path below `folder` with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


class Bench:
    """A folder of one test in which commands are run and must be refused."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capfd = folder, capfd
        self.mark = folder / "executed"
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG)

    def payload(self) -> bytes:
        return pickle.dumps(Payload(self.mark))

    def train(self, shards: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.config), f"data.train={shards}", f"run_dir={self.folder / 'runs'}", *overrides]

    def refused(self, main: Callable[..., int | None], argv: list[str], *words: str, unchanged: bool = True) -> str:
        """The sentence with which `main(argv)` is refused; it must hold all `words`."""
        before = listing(self.folder)
        self._capfd.readouterr()
        status = run_command(main, argv)
        text = self._capfd.readouterr().err
        sentence = one_sentence(text)
        assert status == 2
        for word in words:
            assert word in sentence, f"{word!r} is not in: {sentence}"
        assert not self.mark.exists(), "the planted pickle was executed"
        if unchanged:
            assert listing(self.folder) == before
        return sentence


def one_sentence(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    assert len(lines[0]) > 30 and not lines[0].startswith("error: ["), lines[0]
    return lines[0]


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, capfd)


def chexpert_shards(base: Path, seed: int, **options: int) -> Path:
    root = make_chexpert(base / "CheXpert-v1.0", rows=32, valid=8, seed=seed, laterals=False)
    build(plan_shards(open_source("chexpert", root), SALT, shard_size=16), base / "shards")
    return base / "shards"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Shards of two CheXpert-like sets and of two class lists, and a finished one-step run on the first."""
    base = tmp_path_factory.mktemp("bad-input")
    folders = {"first": chexpert_shards(base / "1", 0), "second": chexpert_shards(base / "2", 9)}
    for name, classes in (("pets", ("cat", "dog", "emu")), ("birds", ("emu", "owl", "tit"))):
        source = open_source(
            "image_folder", make_image_folder(base / name, classes=classes, per_class=8, suffix=".jpg")
        )
        build(plan_shards(source, SALT, shard_size=12), base / f"{name}-shards")
        folders[name] = base / f"{name}-shards"
    config = base / "tiny.yaml"
    config.write_text(CONFIG)
    argv = ["--config", str(config), f"data.train={folders['first']}", f"run_dir={base / 'runs'}", "name=done"]
    assert pretrain(argv) == 0
    folders["run"] = base / "runs" / "done"
    yield folders


@pytest.fixture
def shards(made: dict[str, Path], bench: Bench) -> Path:
    return Path(shutil.copytree(made["first"], bench.folder / "shards"))


@pytest.fixture
def resumable(made: dict[str, Path], bench: Bench) -> Path:
    """The finished run, to be continued under the name `done`; returns its newest checkpoint."""
    run = shutil.copytree(made["run"], bench.folder / "runs" / "done")
    return Path(run) / "checkpoints" / "step-00000001"


def launched(bench: Bench, launch_file: str, argv: list[str], *words: str) -> None:
    """`accelerate launch` on two processes must be refused with one sentence, whatever the launcher adds."""
    before = listing(bench.folder)
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch_file]
    done = subprocess.run(
        [*line, "-m", "scaletransfer.pretrain", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # On a machine that is busy enough, another rank repeats the sentence before the launcher ends it.
    sentences = {re.sub(r"^error: \[rank \d+\] ", "error: ", line) for line in lines}
    assert done.returncode != 0 and len(sentences) == 1, done.stderr
    (sentence,) = sentences
    for word in words:
        assert word in sentence, sentence
    assert listing(bench.folder) == before and not bench.mark.exists()
