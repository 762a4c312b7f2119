"""A trainer rank dies in any phase: trainers start again from the last checkpoint, nobody else does, and the result is
that of a run in which nobody died."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from chaos_runs import SAMPLES, STEPS, WHOLE, Chaos, nothing_torn, same_result, surviving
from faults import fault

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

ENGINE = "rlsys.engines.train.engine:ShardedEngine"


class Phase(NamedTuple):
    """Where a rank dies in step 2. target, call: see faults.py; at: the step whose weights the run had last."""

    target: str
    call: int
    at: int


PHASES = {
    "forward and backward": Phase(f"after {ENGINE}._accumulate", 2, 1),
    "optimiser step": Phase("after rlsys.engines.train.fsdp:FsdpTrained.step", 2, 1),
    "weight export": Phase("after rlsys.workers.weights:WeightSender.send", 2, 2),
    "weights handed out": Phase("rlsys.workers.trainer:TrainerWorker.release_weights", 3, 2),
    "checkpoint write": Phase("after rlsys.engines.train.state:write_shards", 3, 2),  # two files a checkpoint
}


@pytest.mark.parametrize("name", PHASES)
def test_a_rank_that_dies_changes_neither_the_result_nor_anybody_else(
    name: str, chaos: Chaos, undisturbed: Path, tmp_path: Path
) -> None:
    phase = PHASES[name]
    run = chaos(*WHOLE, FAULT=fault(phase.target, phase.call, tmp_path / "died"))
    run.until(lambda: any(run.root.glob("runs/*/processes.json")), "the actors run")
    before = run.roster()
    assert run.ends() == 0
    assert (tmp_path / "died").exists()
    (lost,) = run.events("trainer lost")
    assert lost["step"] == phase.at
    (again,) = run.events("trainer restarted")
    assert again["step"] == 1
    # A new lineage where the run had gone past the checkpoint.
    assert again["lineage"] == phase.at - 1
    after = run.roster()
    assert {role for role in before if before[role] != after[role]} == {"trainer_0", "trainer_1"}
    nothing_torn(run.folder, STEPS)
    same_result(run.folder, undisturbed)
    assert run.left() == []


def test_a_critic_rank_that_dies_is_replaced_with_the_trainers(chaos: Chaos) -> None:
    run = chaos("steps=8", "algorithm.advantage=gae")
    run.until_step(2)
    before = run.roster()
    run.kill("critic_0")
    assert run.ends() == 0
    assert len(run.events("trainer restarted")) == 1
    assert "critic 0" in run.events("trainer lost")[0]["text"]
    after = run.roster()
    assert {role for role in before if before[role] != after[role]} == {"trainer_0", "critic_0"}
    assert len(surviving(run.folder).trained_ids) == 8 * SAMPLES


def test_trainers_that_die_again_and_again_end_the_run_with_its_last_checkpoint(chaos: Chaos) -> None:
    run = chaos("steps=100000", "health.restarts=0", "checkpoint.every=2")
    run.until_step(3)
    run.kill("trainer_0")
    assert run.ends() == 1
    assert run.events("trainer restarted") == []
    assert "trainer worker 0 died" in run.events("end")[0]["text"]
    assert "resume=auto" in run.said.read_text()
    assert run.left() == []
