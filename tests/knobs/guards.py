"""guards.*: alerts, and what ends a run."""

from __future__ import annotations

import numpy as np
import pytest
from composing import with_leaves
from experiences import make_experience
from training_batches import process_group

from knobs.channels import BATCH, described, load
from knobs.table import Bench, entry, updating_trainer
from rlsys.algorithms.requirements import objective
from rlsys.config.errors import UserError
from rlsys.controller.job import GuardStop, Job
from rlsys.tracking.collapse import CollapseMonitor

TRUNCATED = make_experience([[50, 50]] * 2, rewards=[0.0, 1.0] * 2)  # every response ran into the limit


def end_step(job: Job, step: int, **metrics: float) -> None:
    """The end of training step ``step``, which came out with these metrics."""
    job.begin_step()
    job._metrics |= {"mismatch/logprob_abs_mean": 0.0, **metrics}
    job._unwritten = (TRUNCATED, np.zeros(len(TRUNCATED)))
    job.state = type(job.state)(step=step, lineage=0)
    job.end_step()


def end_steps(job: Job, count: int, **metrics: float) -> None:
    for step in range(1, count + 1):
        end_step(job, step, **metrics)


def alerts(job: Job) -> int:
    events = job.observers.folder.path / "events.jsonl"
    return events.read_text(encoding="utf-8").count('"alert"') if events.exists() else 0


@entry("guards.every", "guards.limits")
def monitors(bench: Bench) -> None:
    def raised(*overrides: str) -> int:
        with bench.job(*overrides) as job:
            end_steps(job, 4)
            return alerts(job)

    assert raised() == 4
    assert raised("guards.every=2") == 2
    assert raised("guards.limits={truncated: null}") == 0


@entry("guards.on_collapse")
def on_collapse(bench: Bench) -> None:
    with bench.job() as job:
        end_step(job, 1)
        job.config = with_leaves(job.config, {"guards.on_collapse": "stop"})
        with pytest.raises(GuardStop, match="collapsed at step 2: 100% of the responses"):
            end_step(job, 2)


@entry("guards.dead_steps")
def dead_steps(bench: Bench) -> None:
    def ends_at(limit: int) -> int:
        job.config = with_leaves(job.config, {"guards.dead_steps": limit})
        job._dead_steps.clear()
        with pytest.raises(UserError, match="no pair was found"):
            end_steps(job, 10, **{"preference/live_fraction": 0.0})
        return job.state.step

    with bench.job() as job:
        job.collapse = CollapseMonitor({"truncated": None})
        assert [ends_at(3), ends_at(5)] == [3, 5]


def update(job: Job, times: int = 1) -> None:
    for _ in range(times):
        job.begin_step()
        job._rows = [[np.arange(len(TRUNCATED))]]
        job.update(TRUNCATED, np.zeros(len(TRUNCATED)))


@entry("guards.max_skipped")
def max_skipped(bench: Bench) -> None:
    def skipped(limit: int) -> int:
        """Updates that are skipped before the run ends."""
        trainer = updating_trainer(**{"train/skipped": 1.0})
        job.groups.trainer, job.state = trainer, start  # type: ignore[assignment]
        job.config = with_leaves(job.config, {"guards.max_skipped": limit})
        with pytest.raises(GuardStop, match=f"guards.max_skipped allows {limit}"):
            update(job, times=10)
        return len(trainer.given("save_batch"))

    with bench.job() as job:
        start = job.state
        assert [skipped(0), skipped(2)] == [1, 3]


@entry("guards.channel_gradients")
def channel_gradients(bench: Bench) -> None:
    trainer = updating_trainer()
    with bench.job(trainer=trainer) as job:
        for flag in (False, True):
            job.config = with_leaves(job.config, {"guards.channel_gradients": flag})
            update(job)
    flags = [options["channel_gradients"] for _, options in trainer.given("forward_backward")]
    assert flags == [False, True]
    config = described({})
    with process_group():
        engine = load(bench, config)
        names = [set(engine.forward_backward(BATCH, objective(config), channel_gradients=flag)) for flag in flags]
    assert names[1] - names[0] == {f"{channel}/grad_norm" for channel in ("policy", "distillation", "preference")}
