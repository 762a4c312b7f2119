"""Where a step's time went, as metrics."""

from __future__ import annotations

import pytest

from rlsys.tracking.meter import Reading, Span
from rlsys.tracking.throughput import ActorReading, actor_metrics, step_metrics, trained_flops


def actor(role: str, index: int, *spans: Span, flops: float = 0.0, peaks: dict[str, int] | None = None) -> ActorReading:
    return ActorReading(role, index, Reading(1, "here", list(spans), {"flops": flops}, peaks or {}))


def test_rates_are_over_the_phase_that_made_the_tokens():
    step = {"time/step_s": 10.0, "rollout/tokens": 800.0, "train/tokens": 1000.0}
    seconds = {"rollout": 4.0, "update": 5.0, "checkpoint": 3.0}
    found = step_metrics(step, seconds, ranks_peak=1000.0, flops=2000.0)
    assert found == pytest.approx(
        {
            "throughput/sampled_tokens_per_s": 200.0,
            "throughput/trained_tokens_per_s": 200.0,
            "throughput/model_flops_per_s": 400.0,
            "throughput/mfu": 0.4,
            "share/rollout": 0.4,
            "share/update": 0.5,
            "share/other": 0.1,
        }
    )


def test_a_step_without_an_update_has_no_rates_of_one():
    found = step_metrics({"time/step_s": 2.0, "rollout/tokens": 8.0}, {"rollout": 1.0}, ranks_peak=None, flops=0.0)
    assert found.keys() == {"throughput/sampled_tokens_per_s", "share/rollout", "share/other"}


def test_idle_is_by_actor_and_memory_by_role():
    readings = [
        actor("trainer", 0, Span("optim_step", 0.0, 1.0), peaks={"optim_step": 5}),
        actor("trainer", 1, Span("optim_step", 0.0, 3.0), peaks={"optim_step": 9}),
        actor("reward", 0),
    ]
    found = actor_metrics(readings, 0.0, 4.0)
    assert found == pytest.approx(
        {"idle/trainer_0": 0.75, "idle/trainer_1": 0.25, "idle/reward_0": 1.0, "memory/trainer_optim_step_bytes": 9.0}
    )


def test_flops_are_those_of_policy_and_critic():
    readings = [actor("trainer", 0, flops=3.0), actor("critic", 0, flops=2.0), actor("reference", 0, flops=7.0)]
    assert trained_flops(readings) == 5.0
