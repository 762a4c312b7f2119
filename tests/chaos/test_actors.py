"""A rollout, reward or reference actor is killed or stopped in any phase: another one takes its place, and the run ends
as one in which nobody was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from chaos_runs import Chaos, ChaosRun, same_result, surviving
from faults import fault
from running import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

STEPS, SAMPLES = 8, 16
OVERRIDES = (
    f"steps={STEPS}",
    "rollout.workers=2",
    "algorithm.kl.coef=0.01",
    "rollout.environment=fragile_environment.SingleTurn",
)


@pytest.fixture(scope="module")
def undisturbed(chaos: Chaos) -> ChaosRun:
    """Runs beside the first of the others."""
    return chaos(*OVERRIDES)


def assert_unharmed(run: ChaosRun, undisturbed: ChaosRun, lost: list[str], *, back: bool = True) -> None:
    """Each of these actors was lost once; every sample was trained once, and nothing else differs.

    Args:
        back: each came back too; where others do its work the run may end before.
    """
    assert run.ends() == 0
    assert undisturbed.ends() == 0
    assert [event["actor"] for event in run.events("lost")] == lost
    if back:
        assert sorted(event["actor"] for event in run.events("restarted")) == sorted(lost)
    assert all(event["seconds"] > 0 for event in run.events("restarted"))
    assert len(surviving(run.folder).trained_ids) == STEPS * SAMPLES
    assert surviving(run.folder).trained_ids == surviving(undisturbed.folder).trained_ids
    for step in range(1, STEPS + 1):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert read_jsonl(run.folder / name) == read_jsonl(undisturbed.folder / name)
    same_result(run.folder, undisturbed.folder)
    assert run.left() == []


def test_one_of_each_kind_is_killed_while_it_is_waited_for(chaos: Chaos, undisturbed: ChaosRun) -> None:
    run = chaos(*OVERRIDES)
    run.until_step(1)
    before = run.roster()
    for role in ("rollout_0", "reward_0", "reference_0"):
        run.interrupt(role)
    assert_unharmed(run, undisturbed, ["rollout worker 0", "reward worker 0", "reference worker 0"])
    after = run.roster()
    for role in ("driver", "trainer_0", "rollout_1"):
        assert after[role] == before[role]


def test_a_stopped_sampler_is_found_by_its_silence(chaos: Chaos, undisturbed: ChaosRun) -> None:
    run = chaos(*OVERRIDES, "health.liveness_s=4")
    run.until_step(1)
    pid = run.kill("rollout_1", signal.SIGSTOP)
    assert_unharmed(run, undisturbed, ["rollout worker 1"], back=False)
    assert "no sign of life for 4 s" in run.events("lost")[0]["text"]
    assert not Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def undisturbed_alone(chaos: Chaos) -> ChaosRun:
    """With one sampler."""
    return chaos(*OVERRIDES, "rollout.workers=1")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("call", [1, 3])
def test_a_sampler_that_dies_while_it_takes_weights(
    call: int, workers: int, chaos: Chaos, undisturbed: ChaosRun, undisturbed_alone: ChaosRun, tmp_path: Path
) -> None:
    died = fault("rlsys.workers.weights:WeightIntake.open", call, tmp_path / "died")
    run = chaos(*OVERRIDES, f"rollout.workers={workers}", FAULT=died)
    assert run.ends() == 0
    (lost,) = run.events("lost")
    assert lost["phase"] == "sync"
    assert_unharmed(run, undisturbed if workers == 2 else undisturbed_alone, [lost["actor"]], back=workers == 1)


def test_a_sampler_that_dies_in_an_evaluation(chaos: Chaos, tmp_path: Path) -> None:
    alone = (*OVERRIDES, "rollout.workers=1", "eval.every=2", "eval.problems=8")
    undisturbed = chaos(*alone)
    # its fourth batch: an evaluation, two steps, an evaluation
    died = fault("rlsys.workers.rollout:trajectories_to_batch", 4, tmp_path / "died")
    run = chaos(*alone, FAULT=died)
    assert run.ends() == 0
    assert_unharmed(run, undisturbed, ["rollout worker 0"])


def test_the_only_sampler_is_killed_and_so_is_the_one_in_its_place(chaos: Chaos) -> None:
    steps = 60
    run = chaos(*OVERRIDES, f"steps={steps}", "rollout.workers=1")
    run.until_step(1)
    first = run.roster()["rollout_0"]
    run.interrupt("rollout_0")
    run.until(lambda: run.roster().get("rollout_0", first) != first, "the new one is written down")
    run.until_step(max(run.steps()) + 1)
    run.interrupt("rollout_0")
    assert run.ends() == 0
    assert [event["actor"] for event in run.events("restarted")] == ["rollout worker 0"] * 2
    assert len(surviving(run.folder).trained_ids) == steps * SAMPLES


def test_an_actor_that_dies_again_and_again_ends_the_run_with_its_last_checkpoint(chaos: Chaos) -> None:
    run = chaos(*OVERRIDES, "steps=100000", "health.restarts=0")
    run.until_step(2)
    run.kill("reward_0")
    assert run.ends() == 1
    said = run.events("end")[0]["text"]
    for words in ("reward worker 0 was lost 1 time ", "health.restarts allows 0", "the last time: reward worker 0"):
        assert words in said
    assert "resume=auto" in run.said.read_text()
    assert run.left() == []


@pytest.mark.vllm
def test_the_engine_of_a_killed_vllm_sampler_ends_with_it(chaos: Chaos) -> None:
    run = chaos("steps=6", "rollout=vllm", "rollout.workers=1", "rollout.kv_cache_gib=0.1")
    run.until_step(1)
    pid = run.roster()["rollout_0"]
    below = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []
    assert run.ends() == 0
    assert [event["actor"] for event in run.events("restarted")] == ["rollout worker 0"]
    assert len(surviving(run.folder).trained_ids) == 6 * SAMPLES
    assert run.left() == []
