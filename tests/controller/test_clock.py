"""The end before a time limit, and checkpoints at an interval, on a clock that the test moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.controller.clock import ENDING_S, RunClock, TimeIsUp


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(60, 10_000),
    st.lists(st.tuples(st.floats(0.01, 500), st.floats(0, 50)), min_size=1, max_size=30),
)
def test_steps_no_longer_than_those_before_end_in_time(limit: float, steps: list[tuple[float, float]]) -> None:
    steps = sorted(steps, reverse=True)  # the first is the longest
    longest_save = max(save for _, save in steps)
    time = Time()
    clock = RunClock(limit, now=time)
    with clock.saving():
        time.now += longest_save
    begun = 0
    for step, save in steps * 1000:
        try:
            clock.step_begins()
        except TimeIsUp:
            break
        begun += 1
        time.now += step
        with clock.saving():
            time.now += min(save, longest_save)
    first = longest_save + sum(steps[0])  # of which nobody could know how long it takes
    if begun > 1:
        assert time.now - 1000 + longest_save + ENDING_S <= max(limit, first + longest_save + ENDING_S) + 1e-6
    if begun < 1000 * len(steps):
        assert clock.up


def test_without_a_limit_there_is_always_time() -> None:
    time = Time()
    clock = RunClock(now=time)
    for _ in range(3):
        clock.step_begins()
        time.now += 1e9
    assert not clock.over()
    assert not clock.checkpoint_due()


def test_a_step_that_takes_too_long_is_given_up_in_time_for_a_checkpoint() -> None:
    time = Time()
    clock = RunClock(100, now=time)
    with clock.saving():
        time.now += 20
    clock.step_begins()
    time.now = 1000 + 100 - ENDING_S - 30 - 1
    assert not clock.over()
    time.now += 2
    assert clock.over()
    assert clock.up


def test_what_began_before_the_clock_counts() -> None:
    time = Time()
    with pytest.raises(TimeIsUp):
        RunClock(100, began=time.now - 95, now=time).step_begins()


def test_a_checkpoint_is_due_so_long_after_the_last_one() -> None:
    time = Time()
    clock = RunClock(every_s=60, now=time)
    assert not clock.checkpoint_due()
    time.now += 61
    assert clock.checkpoint_due()
    with clock.saving():
        time.now += 5
    assert not clock.checkpoint_due()
    time.now += 60
    assert clock.checkpoint_due()


def test_the_time_between_two_jobs_is_no_step() -> None:
    time = Time()
    clock = RunClock(1000, now=time)
    clock.step_begins()
    time.now += 600
    clock.job_begins()
    clock.step_begins()
    assert not clock.up
