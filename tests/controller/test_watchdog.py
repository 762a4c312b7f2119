"""When a silence is reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rlsys.controller.watchdog import Alarm
from rlsys.workers.under_way import Wait, under_way, waits


def wait(since: float) -> Wait:
    return Wait("reward", {"call": SimpleNamespace(actor="reward worker 0", what="64 rewards")}, since)  # type: ignore[dict-item]


def reported(alarm: Alarm, silent: Wait, until: int) -> list[int]:
    return [now for now in range(until) if alarm.check([silent], float(now)) is silent]


def test_a_silence_is_reported_once_and_again_each_time_that_it_has_doubled() -> None:
    assert reported(Alarm(10), wait(0.0), 100) == [10, 20, 40, 80]


def test_an_answer_begins_a_new_silence() -> None:
    alarm, silent = Alarm(10), wait(0.0)
    assert reported(alarm, silent, 25) == [10, 20]
    silent.since = 25.0
    assert [now for now in range(25, 60) if alarm.check([silent], float(now))] == [35, 45]


def test_who_answers_now_and_then_is_never_reported() -> None:
    alarm, silent = Alarm(10), wait(0.0)
    for now in range(200):
        assert alarm.check([silent], float(now)) is None
        if now % 9 == 0:
            silent.since = float(now)


def test_another_wait_has_its_own_silence() -> None:
    alarm, first, second = Alarm(10), wait(0.0), wait(5.0)
    assert alarm.check([first, second], 10.0) is first
    assert alarm.check([second], 12.0) is None
    assert alarm.check([second], 15.0) is second


def test_waits_are_known_while_they_last_and_have_something_to_wait_for() -> None:
    before = waits()
    pending: dict[Any, Any] = {"a": SimpleNamespace(actor="reward worker 0", what="64 rewards")}
    with under_way("reward", pending) as one:
        assert [found for found in waits() if found not in before] == [one]
        assert one.asked() == [("reward worker 0", "64 rewards")]
        pending.clear()
        assert one not in waits()
    assert waits() == before
