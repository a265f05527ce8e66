"""Fine-tune a pre-trained network on another data set, by BiT-HyperRule: one command, one GPU or a CPU.

    scaletransfer finetune --images DIR --model-path MODEL
    scaletransfer finetune --pretrain-config configs/chexpert_bit50x1.yaml --finetune-config FILE --logdir DIR

The folder DIR holds train/<class>/<image> and val/<class>/<image>, or <class>/<image> alone. What is not said is
inferred and printed: classes, resolution, schedule, micro-batch. The same command continues an interrupted run; SIGTERM
or SIGUSR1 stops it after its step, with a checkpoint and exit status 75.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scaletransfer.cli import CommandParser, callable_module, run_command
from scaletransfer.config import FinetuneConfig, PretrainConfig, describe, load_config, to_yaml
from scaletransfer.engine.assemble import check_continues
from scaletransfer.engine.guard import Guard
from scaletransfer.engine.strategy import Strategy, asked
from scaletransfer.transfer import run
from scaletransfer.transfer.network import title_of
from scaletransfer.transfer.plan import make_plan
from scaletransfer.transfer.scores import read_result

# option -> the key that it sets
OPTIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "model.path": (("--model-path",), "PATH", "pre-trained model: exported folder, .safetensors, .pth.tar or .npz"),
    "data.images": (("--images",), "DIR", "the target: a folder of images, one folder a class"),
    "data.shards": (("--shards",), "DIR", "the target: a folder made by make_shards, or its URL"),
    "examples_per_class": (("--examples-per-class", "--examples_per_class"), "N", "few-shot: so many a class"),
    "seed": (("--seed",), "S", "of selection, order, augmentation and drawn values (default 0)"),
    "steps": (("--steps",), "K", "another length than BiT-HyperRule's; its schedule keeps its shape"),
    "data.train_ratio": (("--train-ratio", "--train_ratio"), "R", "train on this share of the images, by patient"),
    "data.valid_ratio": (("--valid-ratio", "--valid_ratio"), "R", "hold this share of them out for validation"),
    "data.valid_seed": (("--valid-seed", "--valid_seed"), "S", "of what --valid-ratio holds out (default 0)"),
    "model.freeze_through": (("--freeze-through",), "PART", "leave the network up to there as it is, such as block3"),
    "selection": (("--selection",), "FILE", "train on exactly the samples of an earlier run's selection.json"),
}
TEXTS = ("model.path", "data.images", "data.shards", "selection", "model.freeze_through")
"""Options whose value is taken as it is, not as YAML: a folder may be called "x #1" or "[a]"."""
FLAGS = {
    "model.from_scratch": ("--from-scratch", "start from drawn values instead of a checkpoint"),
    "allow_fewer": ("--allow-fewer", "take what there is where a class has fewer examples"),
    "model.linear_probe": ("--linear-probe", "train the classifier alone"),
    "data.multilabel_force_classification": (
        "--multilabel-force-classification",
        "of a multi-label set the images with exactly one label, as classes (PadChest-Cl)",
    ),
}


def finetune(
    logdir: str | Path,
    cfg: FinetuneConfig,
    *,
    pretrain: PretrainConfig | None = None,
    pretrain_name: str | None = None,
) -> dict[str, Any]:
    """Run (or continue) a fine-tuning run in the folder ``logdir`` and return the content of its result.json.

    pretrain: the configuration that the checkpoint was trained with, where the checkpoint itself does not say;
    pretrain_name: its name, also of its folder in pretrained_models/.

    Raises:
        ValueError: what a person can mend. Nothing is written before everything has been checked.
    """
    return run_finetune(Path(logdir), cfg, pretrain, pretrain_name, asked(cuda=torch.cuda.is_available()), None)


def run_finetune(
    folder: Path,
    cfg: FinetuneConfig,
    pretrain: PretrainConfig | None,
    pretrain_name: str | None,
    strategy: Strategy,
    guard: Guard | None,
) -> dict[str, Any]:
    """``finetune`` on one rank of a strategy, inside of ``guard``."""
    device = torch.device("cpu" if strategy.cpu else f"cuda:{strategy.local_rank}")
    going = run.start_of(folder)
    before = run.read_resolved(folder)
    run.check_folder(folder, going, cfg)
    plan = make_plan(
        cfg,
        pretrain,
        pretrain_name,
        before=before,
        device=device,
        world=strategy.world,
    )
    if strategy.rank == 0:
        print("\n".join(plan.says), flush=True)
    if going is not None and run.is_finished(folder) and going.step >= plan.rule.steps:
        check_continues(going, run.run_facts(plan))
        if strategy.rank == 0:
            print(f"{folder} is complete: its result stands in result.json")
        return read_result(folder)
    trainer = run.build(plan, strategy, folder, guard)
    try:
        if not trainer.complete():
            trainer.run()
        return run.finish(plan, trainer, folder)
    finally:
        if trainer.held is not None:
            trainer.held.close()


def default_logdir(cfg: FinetuneConfig, pretrain_name: str | None) -> Path:
    """runs/<target>_from_<model>[_<n>shot]_seed<s>: another folder for every run that is another one."""
    data = cfg.data
    target = data.dataset or data.source or Path(data.images or data.shards or cfg.train_dir or "target").resolve().name
    path = cfg.model.path
    model = "scratch" if cfg.model.from_scratch else title_of(Path(path)) if path else pretrain_name or "model"
    shot = f"_{cfg.examples_per_class}shot" if cfg.examples_per_class else ""
    return Path("runs") / f"{target}_from_{model}{shot}_seed{cfg.seed}"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="scaletransfer finetune",
        description=__doc__,
        epilog=describe(FinetuneConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pretrain-config",
        "--pretrain-config-file",
        metavar="FILE",
        help="configuration of the pre-training; its name is that of the model's folder in pretrained_models/",
    )
    parser.add_argument(
        "--finetune-config",
        "--finetune-config-file",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration of the fine-tuning; give it again to overlay another, whose values win",
    )
    parser.add_argument("--logdir", type=Path, metavar="DIR", help="folder of the run (default: below runs/)")
    for key, (flags, metavar, text) in OPTIONS.items():
        parser.add_argument(*flags, dest=key, metavar=metavar, help=text)
    for key, (flag, text) in FLAGS.items():
        parser.add_argument(flag, dest=key, action="store_true", help=text)
    parser.add_argument(
        "--print_config", "--print-config", action="store_true", help="print the configuration and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set one key, for example global_batch=64")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises ValueError for what a person can mend."""
    options = vars(_parser().parse_intermixed_args(sys.argv[1:] if argv is None else list(argv)))
    overrides = list(options["overrides"])
    for key in (key for key in OPTIONS if options[key] is not None):
        value = options[key]
        # JSON's strings are YAML's; "" and null stay what they are in a file: nothing
        overrides.append(f"{key}={json.dumps(value, ensure_ascii=False) if key in TEXTS and value else value}")
    overrides += [f"{key}=true" for key in FLAGS if options[key]]
    cfg = load_config(options["finetune_config"], overrides, FinetuneConfig)
    pretrain, pretrain_name = None, None
    if options["pretrain_config"] is not None:
        pretrain = load_config([options["pretrain_config"]], (), PretrainConfig)
        pretrain_name = Path(options["pretrain_config"]).stem
    if options["print_config"]:
        sys.stdout.write(to_yaml(cfg))
        return 0
    logdir = options["logdir"] or default_logdir(cfg, pretrain_name)
    strategy = asked(cuda=torch.cuda.is_available())
    with Guard(strategy, cfg.failing) as guard:
        run_finetune(logdir, cfg, pretrain, pretrain_name, strategy, guard)
    return 0


callable_module(__name__, finetune)

if __name__ == "__main__":
    sys.exit(run_command(main))
