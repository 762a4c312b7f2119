"""When a silence is reported, and who is written down."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlsys.cluster import processes
from rlsys.config.modes import HealthConfig
from rlsys.controller import watchdog
from rlsys.controller.watchdog import Alarm, Watchdog
from rlsys.workers.under_way import Wait, under_way, waits
from rlsys.workers.waits import StopFlag

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # who runs the actors cannot import the tests


class Worker:
    def pid(self) -> int:
        return os.getpid()


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


@pytest.mark.ray
def test_an_actor_in_the_place_of_another_is_written_down_as_soon_as_it_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_ROSTER_S", 3600.0)
    actor = ray.remote(num_cpus=0)(Worker)
    actors = {"rollout_0": actor.remote()}
    ray.get(actors["rollout_0"].pid.remote())
    dog = Watchdog(tmp_path, HealthConfig(), lambda *_, **__: None, StopFlag(), lambda: actors, local=False)
    dog.start()
    try:
        assert written(tmp_path) == ray.get(actors["rollout_0"].pid.remote())
        ray.kill(actors["rollout_0"])
        actors["rollout_0"] = actor.remote()
        pid = ray.get(actors["rollout_0"].pid.remote())
        while written(tmp_path) != pid:
            time.sleep(0.1)
    finally:
        dog.close()


def written(folder: Path) -> int:
    (pid,) = (found.pid for found in processes.read(folder) if found.role == "rollout_0" and not found.below)
    return pid
