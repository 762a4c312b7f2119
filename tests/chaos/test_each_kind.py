"""One of each kind is killed, all in one run: it ends as one in which nobody was. The files beside this one have every
phase."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chaos_runs import TINY, Chaos, nothing_torn, same_result
from faults import LOSS
from one_process import one_process
from running import only_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = 9
OVERRIDES = (f"steps={STEPS}", LOSS, "algorithm.kl.coef=0.01")


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, chaos_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run whose actors share one process, so that there is nothing that could be killed."""
    root = tmp_path_factory.mktemp("undisturbed")
    with one_process() as run:
        assert run(root, *TINY, f"model.path={chaos_model}", *OVERRIDES) == 0
    return only_run(root)


def test_everybody_in_turn(chaos: Chaos, undisturbed: Path) -> None:
    """First the trainer; then sampler, reward and reference, which come back at the same time; then the driver."""
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
    run.until(lambda: len(run.events("restarted")) == 3, "they are back")
    assert sorted(event["actor"] for event in run.events("restarted")) == [
        "reference worker 0",
        "reward worker 0",
        "rollout worker 0",
    ]
    third = run.roster()
    assert (third["driver"], third["trainer_0"]) == (second["driver"], second["trainer_0"])
    run.kill("driver")
    assert run.ends() == -signal.SIGKILL
    assert max(run.steps()) < STEPS
    run.tear()
    run.start("resume=auto")
    assert run.ends() == 0
    assert not set(third.values()) & set(run.roster().values())
    nothing_torn(run.folder, STEPS)
    same_result(run.folder, undisturbed)
    assert run.left() == []
