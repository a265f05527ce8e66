"""Checkpoints of every engine: gone on under every other, and saves that are killed in their middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_run import launch_to_end

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ENGINES: dict[str, tuple[str | None, int]] = {
    "single": (None, 1),
    "ddp": ("ddp", 2),
    "fsdp2": ("fsdp2", 2),
    "zero1": ("zero1", 2),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "zero3-of-3": ("zero3", 3),
    "fsdp2-of-4": ("fsdp2", 4),
    "hsdp": ("hsdp", 4),
    "zero3_offload": ("zero3_offload", 2),
}
"""Name: (launch file, ranks). What is added here is moved to and from, and killed."""
LIMIT = 1500  # seconds a launch may take; 30 kills take a minute alone


def work(name: str, folder: Path, module: str, *arguments: str) -> list[dict[str, Any]]:
    """Launch a worker; what each rank found."""
    engine, world = ENGINES[name]
    out = folder / f"out-{name}"
    out.mkdir(exist_ok=True)
    arguments = tuple(str(out) if argument == "OUT" else argument for argument in arguments)
    launch_to_end(engine, arguments, folder, module=f"workers_resume.{module}", world=world, limit=LIMIT)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
def test_half_under_one_engine_and_half_under_another(tmp_path):
    """5 steps, then 5 more under any other engine and number of ranks: the losses of the 10 in one go."""
    whole = {name: work(name, tmp_path, "moving", name, str(tmp_path), "OUT")[0][name] for name in ENGINES}
    for losses in whole.values():
        assert losses == pytest.approx(whole["single"], rel=1e-5)
    for name in ENGINES:
        found = work(name, tmp_path, "moving", name, str(tmp_path), "OUT", *ENGINES)
        for other in ENGINES:
            assert found[0][other] == pytest.approx(whole[other][5:], rel=1e-5), f"{other}, then {name}"
        forgetful = found[0]["without momentum"]
        assert max(abs(one - two) for one, two in zip(forgetful, whole["single"][5:], strict=True)) > 1e-3


def killed(name: str, folder: Path, kills: int) -> list[tuple[int, int, str]]:
    """Of each kill: the step that was being saved, that of the newest checkpoint afterwards, and what became of rank
    0's part."""
    ranks = work(name, folder, "killed_saves", str(kills), f"{name}/{kills}", str(folder / "checkpoints"), "OUT")
    for rank in ranks:
        assert max(rank["differences"]) == 0, rank["differences"]  # the same bits on the same engine
        assert len(rank["differences"]) == kills + 2
        assert all(name.startswith(("step-", ".step-", "latest", ".latest", ".saving")) for name in rank["left"])
    dead = [sum(rank["kills"][number]["outcome"] == "killed" for rank in ranks) for number in range(kills)]
    assert sum(count > 0 for count in dead) >= kills // 2
    print(name, [[kill["outcome"][0], kill["step"], kill["newest"]] for kill in ranks[0]["kills"]])
    found = [(kill["step"], kill["newest"], kill["outcome"]) for kill in ranks[0]["kills"]]
    assert any(newest < step for step, newest, _ in found)  # incomplete ones are passed over
    return found


def test_saves_killed_under_fsdp2(tmp_path):
    killed("fsdp2", tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_saves_killed_at_30_moments(tmp_path, name):
    found = killed(name, tmp_path, 30)
    assert any(newest == step and outcome == "killed" for step, newest, outcome in found)  # after it was complete
