"""The whole way in some minutes on a CPU: draw X-rays, make shards, pre-train on two processes under ZeRO-2 (killed
and resumed on the way) and under FSDP2, export, load the export and print the validation AUC of each finding. Then
what that is worth: few-shot fine-tuning on two other targets, against drawn values (tools/demo_transfer.py).

Everything lands in runs/demo, which is made anew. `make demo` runs this.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import demo_transfer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "demo"
CONFIG = "configs/demo.yaml"
ROWS = 2400
SHOT = 25  # examples a class at which the gain must be beyond doubt
RATES = (0.03, 0.1, 0.3)  # learning rates that each start may choose from
KILL_AT = 80  # steps; the last checkpoint before it is kept
# The launcher starts two processes: one thread each leaves them a core each.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def say(text: str) -> None:
    """A heading with the time since the start."""
    print(f"\n[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def run(*command: str) -> None:
    """Run a command of the README; stop if it fails."""
    print("$ " + " ".join(command), flush=True)
    words = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    status = subprocess.run(words, check=False, cwd=ROOT, env=ENVIRONMENT).returncode
    if status:
        sys.exit(f"error: this step of the demo ended with status {status}; what it said stands above")


def pretrain(engine: str) -> list[str]:
    """The command line that pre-trains under an engine."""
    words = ["accelerate", "launch", "--config_file", f"launch/{engine}.yaml", "-m", "scaletransfer.pretrain"]
    return [*words, "--config", CONFIG, f"name={engine}"]


def steps(engine: str) -> list[dict[str, float]]:
    """The rows of the run's metrics.jsonl that are training steps."""
    path = DEMO / engine / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "loss" in row and "event" not in row]


def kill_one_rank(engine: str) -> None:
    """Start the run, send SIGKILL to rank 1 in the middle, and wait until the launcher has ended."""
    command = pretrain(engine)
    print("$ " + " ".join(command), flush=True)
    words = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    log = (DEMO / "killed.log").open("w")
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    while process.poll() is None and len(steps(engine)) < KILL_AT:
        time.sleep(0.5)
    found = re.search(r"rank 1 is process (\d+)", (DEMO / "killed.log").read_text())
    if process.poll() is not None or found is None:
        sys.exit(f"the run ended before it could be killed; see {DEMO / 'killed.log'}")
    os.kill(int(found[1]), signal.SIGKILL)
    killed = time.monotonic()
    status = process.wait()
    print(
        f"rank 1 (process {found[1]}) killed after step {len(steps(engine))}; the launcher ended "
        f"{time.monotonic() - killed:.0f} s later with status {status}"
    )
    if status == 0:
        sys.exit("the launcher reported success although a rank was killed")


def auc_of_export(folder: Path) -> dict[str, float | None]:
    """Validation AUC of each finding, computed from nothing but the exported folder and the shards."""
    import torch

    from scaletransfer.index import load_index
    from scaletransfer.labels import LabelPolicy
    from scaletransfer.loader import EvalSampler, ShardDataset, Source
    from scaletransfer.metrics import multilabel_report
    from scaletransfer.models import create_model
    from scaletransfer.models.weights import load_into, load_pretrained
    from scaletransfer.streams import make_loader
    from scaletransfer.transforms import Normalizer, build_transform

    state, card = load_pretrained(folder)
    model = create_model(card["model"], card["num_classes"]).eval()
    load_into(model, state)
    names = tuple(card["label_names"])
    source = Source(index=load_index(DEMO / "shards"), split="valid", policy=LabelPolicy(**card["policy"]), names=names)
    transform = build_transform(card["transform"]["kind"], False, card["transform"]["size"])
    data = ShardDataset([source], None, transform, channels=1, seed=0)
    normalize = Normalizer(**card["normalisation"])
    logits, targets, positions = [], [], []
    with torch.inference_mode():
        for batch in make_loader(data, EvalSampler(len(data), 0, 1, 32), workers=0):
            logits.append(model(normalize(batch["image"])))
            targets.append(batch["target"])
            positions.append(batch["position"])
    keep = torch.cat(positions).unique(return_inverse=True)[1].tolist()
    first = [keep.index(number) for number in range(len(data))]
    report = multilabel_report(torch.cat(logits)[first].numpy(), torch.cat(targets)[first].numpy(), names)
    return {name: report["classes"][name]["auroc"] for name in names} | {"mean": report["mean_auroc"]}


def main() -> int:
    """Run everything; the exit status is 0 only when the networks have learned."""
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir(parents=True)
    data = "runs/demo/CheXpert-v1.0"
    say("chest X-rays in CheXpert's official layout, drawn for rows of the real table where it is installed")
    run("scaletransfer", "synthetic", "chexpert", "--rows", str(ROWS), "--out", data, "--seed", "0")
    say("shards")
    words = ["python", "tools/make_shards.py", "chexpert", "--root", data, "--out", "runs/demo/shards"]
    run(*words, "--size", "96", "--workers", "2", "--salt-file", "runs/demo/salt")
    say(f"pre-training on two processes under ZeRO-2; rank 1 is killed after step {KILL_AT}")
    kill_one_rank("zero2")
    say("the same command again goes on from the last complete checkpoint")
    run(*pretrain("zero2"))
    say("the same run under FSDP2, not interrupted")
    run(*pretrain("fsdp2"))
    pairs = list(zip(steps("zero2"), steps("fsdp2"), strict=True))
    same = all(a["keys_sha256"] == b["keys_sha256"] for a, b in pairs)
    early = max(abs(a["loss"] - b["loss"]) for a, b in pairs[:20])
    print(f"{len(pairs)} steps each; the same samples in every step: {same}; losses of the first 20 within {early:.1e}")
    say("export")
    for engine in ("zero2", "fsdp2"):
        run("scaletransfer", "export", f"runs/demo/{engine}", "--to", f"runs/demo/exported/{engine}")
    say("validation AUC of each finding, from the exported files alone")
    results = {engine: auc_of_export(DEMO / "exported" / engine) for engine in ("zero2", "fsdp2")}
    print(f"{'':28}{'zero2':>8}{'fsdp2':>8}")
    for name in results["zero2"]:
        cells = [results[engine][name] for engine in results]
        print(f"{name:28}" + "".join(f"{'-':>8}" if cell is None else f"{cell:8.3f}" for cell in cells))
    learned = all((results[engine]["mean"] or 0) > 0.65 for engine in results)
    if not (learned and same):
        print("error: the networks should reach a mean AUC above 0.65 and see the same samples", file=sys.stderr)
        return 1
    wrong = second_half(Path(data))
    say("done; look at runs/demo/report/index.html, and at curves with: .venv/bin/tensorboard --logdir runs/demo")
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def second_half(data: Path) -> list[str]:
    """Few-shot transfer from what was pre-trained; what is not as it should be, in sentences."""
    say("a control: the same pictures, the labels shuffled over the images, pre-trained in the same way")
    demo_transfer.shuffle_labels(ROOT / data, DEMO / "CheXpert-shuffled")
    words = ["python", "tools/make_shards.py", "chexpert", "--root", "runs/demo/CheXpert-shuffled", "--workers", "2"]
    run(*words, "--out", "runs/demo/shards-shuffled", "--size", "96", "--salt-file", "runs/demo/salt")
    run(*pretrain("ddp"), "name=shuffled", "data.train=runs/demo/shards-shuffled", "validate.every_epochs=null")
    run("scaletransfer", "export", "runs/demo/shuffled", "--to", "runs/demo/exported/shuffled")
    say("a second X-ray task: other findings in other places, other patients; and handwritten digits")
    words = ["scaletransfer", "synthetic", "xray_folder", "--out", f"runs/demo/{demo_transfer.XRAY}", "--seed", "0"]
    run(*words, "--images-per-class", "40", "--valid-per-class", "40", "--size", "96")
    demo_transfer.write_digits(DEMO / demo_transfer.DIGITS)
    say("few-shot fine-tuning on both, from the pre-trained network and from scratch, five seeds each")
    os.chdir(ROOT)
    here = Path("runs/demo")
    good, bad = "runs/demo/exported/pretrained", "runs/demo/exported/shuffled"
    shutil.copytree("runs/demo/exported/zero2", good)  # under the name that table and figure show
    tasks = [
        demo_transfer.Task(here / demo_transfer.XRAY, {good: (5, SHOT), "": (5, SHOT), bad: (SHOT,)}, RATES),
        demo_transfer.Task(here / demo_transfer.DIGITS, {good: (5,), "": (5,)}, RATES[:2]),
    ]
    demo_transfer.transfer(here, tasks, good)
    say("tables, figures and a page")
    run("scaletransfer", "report", "runs/demo/transfer", "--out", "runs/demo/report")
    return demo_transfer.verdict(here, Path(good).name, SHOT)


STARTED = time.monotonic()
if __name__ == "__main__":
    sys.exit(main())
