"""One of each kind is killed: the run ends as one in which nobody was. The files beside this one have every
phase."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chaos_runs import Chaos, ChaosRun, nothing_torn, same_result
from faults import LOSS, fault

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = 6
OVERRIDES = (f"steps={STEPS}", LOSS, "algorithm.kl.coef=0.01")


@pytest.fixture(scope="module")
def undisturbed(chaos: Chaos) -> ChaosRun:
    """Runs beside the first of the others."""
    return chaos(*OVERRIDES)


def assert_unharmed(run: ChaosRun, undisturbed: ChaosRun) -> None:
    assert undisturbed.ends() == 0
    nothing_torn(run.folder, STEPS)
    same_result(run.folder, undisturbed.folder)
    assert run.left() == []


def test_actors(chaos: Chaos, undisturbed: ChaosRun) -> None:
    """First the trainer; then sampler, reward and reference, which come back at the same time."""
    run = chaos(*OVERRIDES)
    run.until_step(1)
    first = run.roster()
    run.interrupt("trainer_0")
    run.until(lambda: len(run.events("trainer restarted")) == 1, "trainers are back")
    second = run.roster()
    assert [role for role in first if first[role] != second[role]] == ["trainer_0"]
    run.until_step(max(run.steps()) + 1)
    for role in ("rollout_0", "reward_0", "reference_0"):
        run.interrupt(role)
    assert run.ends() == 0
    assert sorted(event["actor"] for event in run.events("restarted")) == [
        "reference worker 0",
        "reward worker 0",
        "rollout worker 0",
    ]
    third = run.roster()
    assert (third["driver"], third["trainer_0"]) == (second["driver"], second["trainer_0"])
    assert_unharmed(run, undisturbed)


def test_driver(chaos: Chaos, undisturbed: ChaosRun, tmp_path: Path) -> None:
    """Right after samplers were given weights of which there is no checkpoint."""
    died = fault("after rlsys.controller.job:Job.sync_weights", 3, tmp_path / "died")
    run = chaos(*OVERRIDES, FAULT=died)
    assert run.ends() == -signal.SIGKILL
    first = set(run.roster().values())
    run.tear()
    run.start("resume=auto")
    assert run.ends() == 0
    assert not first & set(run.roster().values())
    assert_unharmed(run, undisturbed)
