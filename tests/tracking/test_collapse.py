"""Collapse monitors: silent on runs that go well, loud on those that do not, the same after a resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms.collapse import repetition, spread
from rlsys.config.errors import UserError
from rlsys.tracking import alerts
from rlsys.tracking.collapse import GRACE, MONITORS, CollapseMonitor

Metrics = dict[str, float]


def healthy(step: int, steps: int = 120) -> Metrics:
    """A policy with a critic that learns a task with one right answer: rewards of 0 and 1 from 30 % to 99.5 %, entropy
    from .2 nats to .005, the critic's head from zero."""
    done = min(step / (0.6 * steps), 1.0)
    accuracy = 0.3 + 0.695 * done + (0.01 * math.sin(step) if done < 1 else 0.004 * math.sin(step))
    targets = accuracy * (1 - accuracy)
    chance = max(0.0, 3 * done - 2)  # in the last third, what is left of the failures cannot be told beforehand
    explained = 0.8 * (1 - math.exp(-(step - 1) / 5)) * (1 - 0.9 * chance)
    return {
        "reward/mean": accuracy,
        "reward/std": math.sqrt(targets),
        "policy/entropy": 0.2 * (0.005 / 0.2) ** done,
        "policy/approx_kl": 0.002,
        "policy/kl_ref": 0.3 * done,
        "rollout/length_mean": 40 + 80 * done,
        "rollout/truncated": 0.1 * (1 - done),
        "rollout/repetition": 0.2,
        "critic/target_variance": targets,
        "critic/target_distance": 2 * targets,
        "critic/prediction_variance": explained * targets,
        "critic/prediction_distance": explained * targets * 2,
        "train/skipped": 0.0,
    }


def names_raised(monitor: CollapseMonitor, curve: Callable[[int], Mapping[str, float]], steps: int) -> list[list[str]]:
    return [[alert.name for alert in monitor.check(curve(step), step)] for step in range(1, steps + 1)]


def broken_at(change: Metrics, after: int) -> Callable[[int], Metrics]:
    """Healthy, and ``change`` from a step on, where the task is not yet solved."""
    return lambda step: healthy(min(step, 20)) | (change if step > after else {})


def test_a_run_that_goes_well_raises_nothing():
    assert not any(itertools.chain.from_iterable(names_raised(CollapseMonitor({}), healthy, 120)))


def test_a_solved_task_with_equal_rewards_raises_nothing():
    solved = {"reward/mean": 1.0, "reward/std": 0.0, "policy/entropy": 1e-4}
    for name in ("critic/target_variance", "critic/target_distance"):
        solved |= {name: 0.0, name.replace("target", "prediction"): 0.0}
    raised = names_raised(CollapseMonitor({}), lambda step: healthy(step) if step < 80 else solved, 150)
    assert not any(itertools.chain.from_iterable(raised))


def test_a_constant_predictor_is_an_alert_once_it_had_time_to_learn():
    generator = torch.Generator().manual_seed(0)

    def constant(step: int) -> Metrics:
        metrics = {}
        for name, values in (("prediction", torch.full((64,), 0.3)), ("target", torch.rand(64, generator=generator))):
            found = spread(values)
            metrics |= {f"critic/{name}_variance": found.variance, f"critic/{name}_distance": found.pairwise_distance}
        return metrics

    raised = names_raised(CollapseMonitor({}), constant, GRACE + 3)
    assert raised == [[]] * GRACE + [["variance", "distance"]] * 3


def test_a_critic_that_loses_its_spread_is_held_against_its_targets_and_its_start():
    def fading(step: int) -> Metrics:
        size = 1.0 if step < 30 else 0.1
        figures = {"critic/prediction_variance": 0.2 * size, "critic/prediction_distance": 0.4 * size}
        return figures | {"critic/target_variance": 0.25, "critic/target_distance": 0.5}

    raised = names_raised(CollapseMonitor({}), fading, 30)
    assert raised == [[]] * 29 + [["variance", "distance", "variance_start", "distance_start"]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"policy/kl": 10.5}, "kl"),
        ({"policy/kl_ref": 11.0}, "kl"),
        ({"policy/approx_kl": 12.0}, "kl"),
        ({"policy/entropy": 0.001, "reward/mean": 0.3}, "entropy"),
        ({"rollout/length_mean": 400.0}, "length"),
        ({"rollout/length_mean": 4.0}, "length"),
        ({"rollout/truncated": 0.95}, "truncated"),
        ({"rollout/repetition": 0.6}, "repetition"),
    ],
)
def test_what_passes_its_limit_is_an_alert_from_that_step_on(change: Metrics, name: str):
    raised = names_raised(CollapseMonitor({}), broken_at(change, 25), 28)
    assert raised == [[]] * 25 + [[name]] * 3


def test_repeating_text_is_an_alert():
    loop = torch.tensor([5, 6, 7] * 20)
    share = float(repetition(loop, torch.tensor([len(loop)])).mean())
    (alert,) = CollapseMonitor({}).check({"rollout/repetition": share}, 1)
    assert alert.name == "repetition"
    assert f"{share:.0%}" in alert.text


def test_equal_rewards_below_the_best_are_an_alert_after_some_looks():
    failed = {"reward/mean": 0.0, "reward/std": 0.0}
    raised = names_raised(CollapseMonitor({"reward_std": 3.0}), broken_at(failed, 25), 30)
    assert raised == [[]] * 27 + [["reward_std"]] * 3


def test_rewards_that_never_differed_are_an_alert_and_one_that_differs_ends_it():
    monitor = CollapseMonitor({"reward_std": 3.0})
    equal, different = {"reward/mean": 0.1, "reward/std": 1e-17}, {"reward/mean": 0.1, "reward/std": 0.2}
    assert names_raised(monitor, lambda step: equal, 4) == [[], [], ["reward_std"], ["reward_std"]]
    assert monitor.check(different, 5) == []
    assert monitor.check({"reward/mean": 0.05, "reward/std": 0.0}, 6) == []


@pytest.mark.parametrize("name", list(MONITORS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_an_alert_of_its_monitors(name: str, bad: float):
    for read in MONITORS[name].reads:
        (alert, *rest) = [a for a in CollapseMonitor({}).check(healthy(1) | {read: bad}, 1) if a.name == name]
        assert not rest
        assert f"{read} is {bad:g}" in alert.text


def test_a_skipped_update_is_not_held_against_the_policy_but_rewards_are_still_read():
    metrics = healthy(1) | {"policy/entropy": math.nan, "policy/approx_kl": math.inf, "train/skipped": 1.0}
    assert CollapseMonitor({}).check(metrics, 1) == []
    found = CollapseMonitor({}).check(metrics | {"reward/mean": math.nan}, 1)
    assert [alert.name for alert in found] == ["entropy", "reward_std"]


def test_a_value_that_is_not_finite_is_no_start_to_compare_with():
    monitor = CollapseMonitor({})
    monitor.check({"rollout/length_mean": math.nan}, 1)
    assert monitor.check({"rollout/length_mean": 10.0}, 2) == []
    assert [alert.name for alert in monitor.check({"rollout/length_mean": 41.0}, 3)] == ["length"]


@given(st.sets(st.sampled_from(sorted(healthy(1)))))
def test_a_missing_metric_silences_its_monitors_and_no_other(missing: set[str]):
    bad = {
        name: math.nan
        for name in {read for monitor in MONITORS.values() for read in monitor.reads}
        if name not in missing
    }
    raised = {alert.name for alert in CollapseMonitor({}).check(bad, 1)}
    for name, monitor in MONITORS.items():
        there = [read in bad for read in monitor.reads]
        assert (name in raised) == (any(there) if monitor.any_of else all(there))


def test_looks_follow_the_schedule_and_the_start_is_the_first_batch():
    monitor = CollapseMonitor({}, every=4)
    raised = names_raised(monitor, lambda step: {"rollout/length_mean": 10.0 if step == 1 else 50.0}, 9)
    assert [step for step, names in enumerate(raised, 1) if names] == [4, 8]
    with pytest.raises(ValueError, match="one step apart"):
        CollapseMonitor({}, every=0)


@pytest.mark.parametrize("name", list(MONITORS))
def test_limits_turn_a_monitor_off(name: str):
    bad = {read: math.nan for monitor in MONITORS.values() for read in monitor.reads}
    assert [alert.name for alert in CollapseMonitor({name: None}).check(bad, 1)] == [m for m in MONITORS if m != name]


# by monitor: a step whose figure, against the first one's, is at this multiple of it
@pytest.mark.parametrize(
    ("name", "begin", "found", "passed", "held"),
    [
        ("variance", {"critic/target_variance": 1.0}, {"critic/prediction_variance": 0.3}, 0.31, 0.3),
        ("distance", {"critic/target_distance": 1.0}, {"critic/prediction_distance": 0.3}, 0.31, 0.3),
        ("variance_start", {"critic/prediction_variance": 1.0}, {"critic/prediction_variance": 0.3}, 0.31, 0.3),
        ("distance_start", {"critic/prediction_distance": 1.0}, {"critic/prediction_distance": 0.3}, 0.31, 0.3),
        ("kl", {}, {"policy/kl": 0.3}, 0.29, 0.3),
        (
            "entropy",
            {"policy/entropy": 1.0, "reward/mean": 0.0, "reward/std": 1.0},
            {"policy/entropy": 0.3},
            0.31,
            0.3,
        ),
        ("reward_std", {"reward/mean": 0.0, "reward/std": 0.0}, {}, GRACE + 1, GRACE + 2),
        ("length", {"rollout/length_mean": 1.0}, {"rollout/length_mean": 6.0}, 5.9, 6.0),
        ("truncated", {}, {"rollout/truncated": 0.3}, 0.29, 0.3),
        ("repetition", {}, {"rollout/repetition": 0.3}, 0.29, 0.3),
    ],
)
def test_a_limit_is_where_the_alarm_begins(name: str, begin: Metrics, found: Metrics, passed: float, held: float):
    for limit, raised in ((passed, True), (held, False)):
        monitor = CollapseMonitor({name: limit})
        for step in range(1, GRACE + 1):
            monitor.check(begin, step)
        assert (name in [alert.name for alert in monitor.check(begin | found, GRACE + 1)]) == raised


def test_an_unknown_monitor_names_the_known_ones():
    with pytest.raises(UserError) as caught:
        CollapseMonitor({"entropie": 0.1})
    assert caught.value.where == "guards.limits.entropie"
    assert all(name in str(caught.value) for name in MONITORS)


@pytest.mark.parametrize(("name", "limit"), [("kl", -1.0), ("kl", math.nan), ("entropy", 0.0), ("length", 1.0)])
def test_a_limit_out_of_range_is_refused(name: str, limit: float):
    with pytest.raises(UserError) as caught:
        CollapseMonitor({name: limit})
    assert caught.value.where == f"guards.limits.{name}"


VALUES = st.one_of(st.sampled_from([0.0, 0.01, 0.3, 1.0, 50.0, math.nan, math.inf]), st.floats(0, 20))
STEPS = st.dictionaries(st.sampled_from(sorted(healthy(1))), VALUES)


@settings(max_examples=60)
@given(st.lists(STEPS, min_size=1, max_size=30), st.data(), st.integers(1, 3))
def test_a_resumed_monitor_raises_what_the_whole_one_does(curve: list[Metrics], data: st.DataObject, every: int):
    cut = data.draw(st.integers(0, len(curve)))
    limits = {"reward_std": 2.0}
    whole, first = CollapseMonitor(limits, every), CollapseMonitor(limits, every)
    expected = [whole.check(metrics, step) for step, metrics in enumerate(curve, 1)]
    found = [first.check(metrics, step) for step, metrics in enumerate(curve[:cut], 1)]
    resumed = CollapseMonitor(limits, every)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [resumed.check(metrics, step) for step, metrics in enumerate(curve[cut:], cut + 1)]
    assert found == expected
    assert resumed.state_dict() == whole.state_dict()


def test_the_state_does_not_follow_the_monitor_it_was_taken_from():
    monitor = CollapseMonitor({})
    monitor.check(healthy(1), 1)
    state = monitor.state_dict()
    before = json.dumps(state)
    monitor.check({"reward/mean": 5.0, "rollout/length_mean": 3.0}, 2)
    assert json.dumps(state) == before


@pytest.mark.parametrize(("key", "who"), [("train/skipped", "policy"), ("critic/skipped", "critic")])
def test_a_skipped_update_is_an_alert(key: str, who: str):
    assert alerts.check({key: 0.0}, mismatch_alarm=0.05) == []
    (alert,) = alerts.check({key: 0.25}, mismatch_alarm=0.05)
    assert alert.name == "skipped"
    assert f"25% of the step's updates of the {who}" in alert.text
