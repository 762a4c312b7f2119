"""When a run starts again by itself."""

from __future__ import annotations

from rlsys.controller.recovery import RESTARTS, Ending, Restarts

LOST = ("10.0.0.2: no answer to health checks",)


def test_a_job_that_lost_no_host_is_not_started_again() -> None:
    assert not Restarts(0).allow(Ending(1, "a reward raised"))
    assert not Restarts(0).allow(Ending(0))


def test_a_run_that_gets_no_further_is_started_again_a_few_times_only() -> None:
    restarts = Restarts(5)
    allowed = [restarts.allow(Ending(1, "lost", LOST, step=5)) for _ in range(RESTARTS + 2)]
    assert allowed == [True] * RESTARTS + [False] * 2


def test_steps_that_are_only_done_again_are_no_progress() -> None:
    restarts = Restarts(0)
    steps = [7, 5, 7, 6]
    assert [restarts.allow(Ending(1, "lost", LOST, step)) for step in steps] == [True, True, False, False]


def test_a_run_that_goes_on_may_lose_host_after_host() -> None:
    restarts = Restarts(0)
    assert all(restarts.allow(Ending(1, "lost", LOST, step)) for step in range(1, 10))
