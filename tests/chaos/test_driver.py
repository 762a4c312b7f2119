"""The driver dies, runs out of time, or waits for somebody who does not answer any more."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from chaos_runs import SAMPLES, STEPS, WHOLE, Chaos, nothing_torn, same_result
from faults import fault
from running import read_jsonl, run_folders

from rlsys.checkpoint.store import CheckpointStore
from rlsys.cluster.orphans import is_alive
from rlsys.cluster.processes import read

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

JOB = "rlsys.controller.job:Job"
PHASES = {  # where it dies, and at which call
    "rollout": ("after rlsys.tracking.ledger:Ledger.issued", 3),
    "update": (f"after {JOB}._update", 2),
    "weight sync": (f"after {JOB}.sync_weights", 3),
    "checkpoint write": ("rlsys.checkpoint.manifest:seal", 2),
    "checkpoint sealed": ("after rlsys.checkpoint.manifest:seal", 2),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_killed_driver_goes_on_with_resume_auto_and_leaves_nobody(
    name: str, chaos: Chaos, undisturbed: Path, tmp_path: Path
) -> None:
    run = chaos(*WHOLE, FAULT=fault(*PHASES[name], tmp_path / "died"))
    assert run.ends() == -signal.SIGKILL
    first = set(run.roster().values())
    run.tear()
    run.start("resume=auto")
    assert run.ends() == 0
    assert not first & set(run.roster().values())
    nothing_torn(run.folder, STEPS)
    same_result(run.folder, undisturbed)
    assert run.left() == []


def test_a_time_limit_ends_the_run_before_it_is_reached_with_a_checkpoint(chaos: Chaos) -> None:
    limit_s = 150.0
    began = time.monotonic()
    run = chaos("steps=1000000", "checkpoint.every=1000000", f"time_limit_minutes={limit_s / 60}")
    assert run.ends() == 130
    assert time.monotonic() - began < limit_s
    assert "time_limit_minutes" in run.events("end")[0]["text"]
    assert "resume=auto" in run.said.read_text()
    newest = CheckpointStore(run.folder / "checkpoints", 1, False).latest()
    assert newest is not None
    assert newest.step == max(run.steps()) >= 1
    assert run.left() == []


def test_sigterm_in_the_midst_of_a_step_writes_a_checkpoint(chaos: Chaos) -> None:
    run = chaos("steps=1000000", "checkpoint.every=1000000")
    run.until_step(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 130
    newest = CheckpointStore(run.folder / "checkpoints", 1, False).latest()
    assert newest is not None
    assert newest.step == max(run.steps())
    assert run.left() == []


def test_a_reward_that_never_returns_leaves_the_stack_that_names_it_and_ends_the_run_if_told_to(
    chaos: Chaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    run = chaos(
        "steps=9",
        "checkpoint.every=1000",
        "reward.timeout_s=3000",
        "reward.parts.correct.use=rewards_for_runs.gated_digits",
        f"+reward.parts.correct.args={{gate: '{gate}', after: {2 * SAMPLES}}}",
        "health.stall_s=4",
        "health.on_stall=stop",
    )
    assert run.ends() == 1
    (stall,) = run.events("stall")
    assert stall["phase"] == "reward"
    assert [entry["actor"] for entry in stall["actors"]] == ["reward worker 0"]
    stacks = {path.stem: path.read_text() for path in Path(stall["stacks"]).iterdir()}
    assert set(stacks) == {"driver", "trainer_0", "rollout_0", "reward_0"}
    assert "gated_digits (rewards_for_runs.py" in stacks["reward_0"]
    assert "workers/waits.py" in stacks["driver"]
    newest = CheckpointStore(run.folder / "checkpoints", 1, False).latest()
    assert newest is not None
    assert newest.step == 2
    assert "nothing has been answered" in run.events("end")[0]["text"]
    assert run.left() == []


def test_a_stopped_trainer_is_warned_of_and_the_run_goes_on_when_it_does(chaos: Chaos) -> None:
    run = chaos("steps=60", "health.stall_s=3")
    run.until_step(2)
    pid = run.kill("trainer_0", signal.SIGSTOP)
    run.until(lambda: len(run.events("stall")) >= 2, "two warnings")
    first, second = run.events("stall")[:2]
    assert first["actors"][0]["actor"].startswith("trainer")
    assert second["seconds"] >= 2 * 3
    assert ", stopped:" in (Path(first["stacks"]) / "trainer_0.txt").read_text()
    os.kill(pid, signal.SIGCONT)
    assert run.ends() == 0
    assert json.loads((run.folder / "summary.json").read_text())["steps"] == 60


def test_what_a_run_without_a_checkpoint_left_is_ended_by_the_one_that_begins_anew(
    chaos: Chaos, tmp_path: Path
) -> None:
    """Ray's own processes are stopped, so that they cannot do it."""
    gate = tmp_path / "gate"
    gate.touch()
    overrides = (
        "steps=2",
        "reward.timeout_s=3000",
        "reward.parts.correct.use=rewards_for_runs.gated_digits",
        f"+reward.parts.correct.args={{gate: '{gate}', after: 0}}",
    )
    run = chaos(*overrides)
    run.until(lambda: any(run.root.glob("runs/*/processes.json")), "the actors run")
    left = read(run.folder)
    for process in left:
        if process.role == "ray":
            os.kill(process.pid, signal.SIGSTOP)
    run.kill("driver")
    run.process.wait()
    gate.unlink()
    run.start("resume=auto")
    assert run.ends() == 0
    _, again = run_folders(run.root)
    (event,) = [event for event in read_jsonl(again / "events.jsonl") if event["kind"] == "orphans"]
    assert "ray" in {entry["role"] for entry in event["processes"]}
    assert not any(is_alive(process) for process in left)
    assert run.left() == []
