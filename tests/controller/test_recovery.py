"""When a run starts again by itself."""

from __future__ import annotations

from rlsys.controller.recovery import RESTARTS, Restarts


def test_a_run_that_gets_no_further_is_started_again_a_few_times_only() -> None:
    restarts = Restarts(5)
    assert [restarts.allow(5) for _ in range(RESTARTS + 2)] == [True] * RESTARTS + [False] * 2


def test_how_often_is_a_choice() -> None:
    assert not Restarts(5, 0).allow(5)
    restarts = Restarts(5, 4)
    assert [restarts.allow(5) for _ in range(5)] == [True] * 4 + [False]


def test_restarts_since_the_last_new_step_are_counted() -> None:
    restarts = Restarts(5, 3)
    used = []
    for step in (5, 5, 6, 6):
        restarts.allow(step)
        used.append(restarts.used)
    assert used == [1, 2, 1, 2]


def test_steps_that_are_only_done_again_are_no_progress() -> None:
    restarts = Restarts(0)
    assert [restarts.allow(step) for step in (7, 5, 7, 6)] == [True, True, False, False]


def test_a_run_that_goes_on_may_lose_host_after_host() -> None:
    restarts = Restarts(0)
    assert all(restarts.allow(step) for step in range(1, 10))
