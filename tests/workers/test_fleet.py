"""A fleet over real actors: who is lost or silent is replaced, and nobody else is touched."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlsys.batch.versions import WeightVersion
from rlsys.cluster.placement import ActorSpec
from rlsys.config.errors import UserError
from rlsys.config.modes import HealthConfig
from rlsys.config.schema import DeadlineConfig
from rlsys.workers.actors import Actor, Group
from rlsys.workers.dispatch import Dispatch, answers
from rlsys.workers.fleet import Fleet, Fleets
from rlsys.workers.waits import ActorFailed, ActorLost, Call, DeadlineExceeded, StopFlag, gather

pytestmark = pytest.mark.ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # who runs the actors cannot import the tests

V1, V2 = WeightVersion(0, 1), WeightVersion(0, 2)


class Worker:
    """A worker without a model. Its start fails while a file says so."""

    def start(self, failing: str) -> None:
        if Path(failing).exists() and not Path(failing).read_text():
            os._exit(1)  # as one that is killed for want of memory
        if Path(failing).exists():
            raise UserError(Path(failing).read_text(), where="model.path", fix="mend it")

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answered from a thread of its own."""

    def pid(self) -> int:
        return os.getpid()

    def echo(self, value: Any) -> Any:
        return value

    def busy(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """There is nothing else to end."""


class Samplers(Group):
    role, worker, concurrency_groups = "rollout", Worker, {"control": 1}

    def starting(self, failing: Path) -> list[Call]:
        return self._starts(lambda actor: actor.call("start", str(failing), what="its start"))

    def asked(self, index: int, method: str, *arguments: Any) -> Call:
        return self.at(index).call(method, *arguments, what=method)

    def pids(self) -> dict[int, int]:
        calls = [actor.call("pid", what="its number") for actor in self.reached()]
        return {call.index: pid for call, pid in self._answers(calls, "sync")}


class Rewards(Samplers):
    role = "reward"


@dataclass
class Bench:
    group: Samplers
    fleet: Fleet
    said: list[tuple[str, str, dict[str, Any]]]
    failing: Path
    given: list[list[int]] = field(default_factory=list)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.fleet.poll()
            time.sleep(0.05)

    def loses_for_good(self, index: int, error: Exception) -> None:
        self.fleet.lost(index, error)
        self.until(lambda: False)

    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.said]


Make = Callable[..., Bench]


@pytest.fixture
def make(ray_cluster: None, tmp_path: Path) -> Iterator[Make]:
    made: list[Group] = []

    def bench(count: int = 2, *, cls: type[Samplers] = Samplers, **health: Any) -> Bench:
        specs = [ActorSpec(cls.role, index) for index in range(count)]
        placement: Any = SimpleNamespace(plan=SimpleNamespace(of=lambda _: specs), options=lambda _: {"num_cpus": 0})
        group = cls(placement, DeadlineConfig(), StopFlag())
        made.append(group)
        failing, said = tmp_path / "failing", list[tuple[str, str, dict[str, Any]]]()
        gather(group.starting(failing), phase="start", seconds=120)
        fleet = Fleet(
            group,
            HealthConfig(**health),
            lambda kind, text, **fields: said.append((kind, text, fields)),
            start_s=120,
        )
        return Bench(group, fleet, said, failing)

    yield bench
    for group in made:
        group.close()


def test_a_killed_sampler_comes_back_stale_and_nobody_else_is_touched(make: Make) -> None:
    bench = make(3)
    before = bench.group.pids()
    bench.fleet.current([0, 1, 2], V1)
    assert bench.fleet.ready() == [0, 1, 2]
    call = bench.group.asked(1, "busy", 60)
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(ActorLost) as caught:
        gather([call], phase="rollout", seconds=60)
    bench.fleet.lost(1, caught.value, life=call.life, phase="rollout")
    bench.fleet.lost(1, caught.value, life=call.life)  # as every call of that process says
    assert bench.fleet.ready() == [0, 2]
    bench.until(lambda: bench.fleet.stale() == [1])
    after = bench.group.pids()
    assert (before[0], before[2]) == (after[0], after[2])
    assert before[1] != after[1]
    bench.fleet.lost(1, caught.value, life=call.life)  # said of the process before: the present one stays
    bench.fleet.current([0, 2], V2)
    assert bench.fleet.stale() == [1], "it missed that one too"
    bench.fleet.current([1])
    assert bench.fleet.ready() == [0, 1, 2]
    assert bench.kinds() == ["lost", "restarted"]
    assert bench.said[0][2] == {"actor": "rollout worker 1", "phase": "rollout"}
    assert bench.said[1][2]["seconds"] > 0
    assert bench.fleet.metrics() == {"restarts": 1.0, "reissued": 0.0, "healthy": 3.0, "actors": 3.0}
    assert bench.fleet.metrics()["restarts"] == 0, "since the last time"


def test_a_stopped_process_is_found_by_its_silence_and_ended_and_a_busy_one_is_not(make: Make) -> None:
    bench = make(2, liveness_s=3.0)
    stopped, busy = (bench.group.pids()[index] for index in (0, 1))
    call = bench.group.asked(1, "busy", 8)
    os.kill(stopped, signal.SIGSTOP)
    bench.until(lambda: bench.fleet.reachable() == [1])
    assert "no sign of life for 3 s" in bench.said[0][1]
    bench.until(lambda: bench.fleet.reachable() == [0, 1])
    gather([call], phase="rollout", seconds=60)
    assert bench.group.pids()[1] == busy
    while Path(f"/proc/{stopped}/stat").exists() and " Z " not in Path(f"/proc/{stopped}/stat").read_text():
        time.sleep(0.1)
    assert bench.fleet.metrics()["restarts"] == 1


def test_who_was_away_himself_accuses_nobody(make: Make) -> None:
    bench = make(1, liveness_s=4.0)
    bench.until(lambda: bool(bench.fleet._pings))
    bench.fleet._polled -= 3600
    bench.fleet._pings = {i: type(asked)(asked.call, asked.since - 3600) for i, asked in bench.fleet._pings.items()}
    bench.fleet.poll()
    assert bench.fleet.reachable() == [0]
    assert bench.said == []


def test_restarts_are_bounded_between_two_steps_and_the_error_says_who_how_often_and_why(make: Make) -> None:
    bench = make(1, restarts=1)
    for _ in range(2):
        bench.fleet.lost(0, ActorLost("the first\nof several lines"))
        bench.until(lambda: bench.fleet.reachable() == [0])
        bench.fleet.step_done()
    bench.fleet.lost(0, ActorLost("no answer"))
    bench.until(lambda: bench.fleet.reachable() == [0])
    with pytest.raises(ActorLost, match="rollout worker 0 was lost 2 times") as caught:
        bench.loses_for_good(0, ActorLost("it died of hunger"))
    assert "health.restarts allows 1; the last time: it died of hunger" in str(caught.value)


def test_an_actor_that_refuses_to_start_again_ends_the_run_with_what_it_said(make: Make) -> None:
    bench = make(1)
    bench.failing.write_text("the model is gone")
    bench.fleet.lost(0, ActorLost("it died"))
    with pytest.raises(UserError, match="the model is gone"):
        bench.until(lambda: False)


def test_work_of_a_lost_actor_is_done_by_another_or_by_the_one_that_comes_back(make: Make) -> None:
    bench, rewards = make(2), make(1, cls=Rewards)
    fleets = Fleets(bench.fleet, rewards.fleet, catch_up=lambda stale: (bench.fleet.current(stale), None)[1])
    bench.fleet.current([0, 1], V1)
    os.kill(bench.group.pids()[0], signal.SIGKILL)
    os.kill(rewards.group.pids()[0], signal.SIGKILL)
    sampling = Dispatch[int]("rollout", 60, bench.fleet, lambda i, n: bench.group.asked(i, "echo", n), limit=1)
    scoring = Dispatch[int]("reward", 60, rewards.fleet, lambda i, n: rewards.group.asked(i, "echo", n), limit=2)
    for number in range(8):
        sampling.put(number)
    found: dict[str, list[int]] = {"rollout": [], "reward": []}
    for stage, work, _, answer in answers([sampling, scoring], fleets, None, samplers=sampling):
        assert work == answer
        found[stage.phase].append(answer)
        if stage is sampling:
            scoring.put(answer)
    assert {phase: sorted(numbers) for phase, numbers in found.items()} == {phase: list(range(8)) for phase in found}
    assert bench.fleet.metrics()["reissued"] >= 1
    assert rewards.fleet.metrics()["reissued"] == 2, "as many as it had"


def test_no_more_calls_wait_at_an_actor_than_may(make: Make) -> None:
    bench = make(1, cls=Rewards)
    under_way: list[int] = []
    waiting = 0

    def issue(index: int, number: int) -> Call:
        nonlocal waiting
        waiting += 1
        under_way.append(waiting)
        return bench.group.asked(index, "echo", number)

    stage = Dispatch[int]("reward", 60, bench.fleet, issue, limit=3)
    for number in range(20):
        stage.put(number)
    for _ in answers([stage], None, None, samplers=stage):
        waiting -= 1
    assert len(under_way) == 20
    assert max(under_way) == 3


def test_who_is_late_by_the_deadline_counts_as_lost(make: Make) -> None:
    bench = make(1, cls=Rewards, restarts=1)
    pid = bench.group.pids()[0]
    seconds = iter([60.0, 0.0])
    stage = Dispatch[int]("reward", 5.0, bench.fleet, lambda i, _: bench.group.asked(i, "busy", next(seconds)), limit=1)
    stage.put(0)
    fleets = Fleets(make(1).fleet, bench.fleet)
    assert len(list(answers([stage], fleets, None, samplers=stage))) == 1
    assert "no answer within 5 s in phase 'reward'" in bench.said[0][1]
    assert bench.group.pids()[0] != pid


def test_without_a_fleet_a_late_actor_ends_the_wait(make: Make) -> None:
    from rlsys.workers.dispatch import Unwatched

    group = make(1).group
    stage = Dispatch[int]("reward", 1.0, Unwatched(1), lambda i, _: group.asked(i, "busy", 60))
    stage.put(0)
    with pytest.raises(DeadlineExceeded, match="rollout worker 0"):
        list(answers([stage], None, None, samplers=stage))


def test_what_a_worker_raises_is_no_loss(make: Make) -> None:
    bench = make(1)
    stage = Dispatch[int]("rollout", 60, bench.fleet, lambda i, _: bench.group.asked(i, "busy", "not a number"))
    stage.put(0)
    with pytest.raises(ActorFailed, match="TypeError") as caught:
        list(answers([stage], None, None, samplers=stage))
    assert not isinstance(caught.value, ActorLost)
    assert bench.said == []


def test_samplers_join_and_leave_while_others_work(make: Make) -> None:
    bench = make(2)
    bench.fleet.current([0, 1], V1)
    bench.fleet.join(ActorSpec("rollout", 2))
    assert bench.fleet.ready() == [0, 1]
    bench.until(lambda: bench.fleet.stale() == [2])
    bench.fleet.current([2])
    assert bench.fleet.ready() == [0, 1, 2]
    stage = Dispatch[int]("rollout", 60, bench.fleet, lambda i, n: bench.group.asked(i, "echo", n))
    for number in range(3):
        stage.put(number)
    fleets = Fleets(bench.fleet, make(1, cls=Rewards).fleet)
    for _, work, *_ in answers([stage], fleets, None, samplers=stage):
        if work == 0:
            bench.fleet.leave(0)  # at its leisure
            bench.fleet.leave(1, finish=False)  # at once: what it had is done by others
            stage.put(3)
    assert bench.fleet.ready() == [2]
    assert list(bench.group.pids()) == [2]
    assert bench.kinds().count("left") == 2
    with pytest.raises(ValueError, match="there is a rollout worker 2 already, or was"):
        bench.group.enrol(ActorSpec("rollout", 2))


def test_one_that_joins_and_never_starts_leaves_and_is_told_of(make: Make) -> None:
    bench = make(1, restarts=1)
    bench.failing.touch()
    bench.fleet.join(ActorSpec("rollout", bench.fleet.next_index()))
    bench.until(lambda: "left" in bench.kinds())
    assert bench.kinds() == ["joined", "not started", "not started", "left"]
    assert "rollout worker 1 has left: it did not start" in bench.said[-1][1]
    assert bench.fleet.ready() == [0]
    assert bench.fleet.next_index() == 2, "its index is not given out again"


def test_who_leaves_ends_what_each_of_those_who_use_it_gave_it_first(make: Make) -> None:
    """A stream and an evaluation ask the same samplers."""
    bench = make(2)
    stages = [Dispatch[int]("rollout", 60, bench.fleet, lambda i, n: bench.group.asked(i, "echo", n)) for _ in range(2)]
    calls = []
    for stage in stages:
        stage.put(1)
        stage.put(2)
        calls.append({call.index: call for call in stage.calls()})
    bench.fleet.leave(0)
    stages[0].done(calls[0][0])
    assert bench.fleet.leaving() == [0]
    assert 0 in bench.group.specs()
    stages[1].done(calls[1][0])
    assert bench.fleet.leaving() == []
    assert list(bench.group.specs()) == [1]


def test_who_leaves_waits_for_no_work_that_was_given_up(make: Make) -> None:
    bench = make(2)
    stage = Dispatch[str]("rollout", 60, bench.fleet, lambda i, what: bench.group.asked(i, "busy", what))
    for _ in range(2):
        stage.put("not a number")
    with pytest.raises(ActorFailed):
        list(answers([stage], Fleets(bench.fleet, make(1, cls=Rewards).fleet), None, samplers=stage))
    bench.fleet.leave(0)
    assert bench.fleet.leaving() == []


def test_answers_to_all_leave_out_who_is_lost_meanwhile(make: Make) -> None:
    bench = make(3)
    os.kill(bench.group.pids()[1], signal.SIGKILL)
    assert list(bench.group.pids()) == [0, 2]
    assert bench.said[0][2]["phase"] == "sync"
    assert isinstance(bench.group.at(1), Actor)
    assert bench.group.at(1).life == 1
