"""Waits end: with the answers, or with an error that says who was waited for, in which phase, and for what."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray

from rlsys.config.errors import UserError
from rlsys.workers.waits import ActorFailed, Call, DeadlineExceeded, StopFlag, StopRequested, as_completed, gather

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0, max_concurrency=4)
class Worker:
    def echo(self, value: Any) -> Any:
        return value

    def refuse(self) -> None:
        raise UserError("the row is bad", where="file.jsonl:3", fix="mend it")

    def fail(self) -> None:
        raise ZeroDivisionError("in the actor")

    def die(self) -> None:
        os._exit(1)

    def hang(self) -> None:
        import threading

        threading.Event().wait()


@pytest.fixture
def worker(ray_cluster: None) -> Any:
    actor = Worker.remote()
    yield actor
    ray.kill(actor)


def call(ref: Any, what: str = "an answer") -> Call:
    return Call(ref, "rollout worker 3", what)


def test_answers_come_in_the_order_of_the_calls(worker: Any) -> None:
    assert gather([call(worker.echo.remote(i)) for i in range(5)], phase="rollout", seconds=60) == list(range(5))


def test_each_answer_is_yielded_once_with_its_call(worker: Any) -> None:
    calls = [Call(worker.echo.remote(i), "a", "b", payload=i) for i in range(5)]
    assert sorted((c.payload, a) for c, a in as_completed(calls, phase="p", seconds=60)) == [(i, i) for i in range(5)]


def test_a_passed_deadline_names_actor_phase_and_what_was_awaited(worker: Any) -> None:
    pending = call(worker.hang.remote(), "64 responses")
    with pytest.raises(DeadlineExceeded, match=r"rollout worker 3 \(64 responses\)") as caught:
        gather([call(worker.echo.remote(1)), pending], phase="rollout", seconds=1.0)
    assert "deadlines.rollout" in str(caught.value)


def test_what_an_actor_refuses_is_bad_input_here_too(worker: Any) -> None:
    with pytest.raises(UserError) as caught:
        gather([call(worker.refuse.remote())], phase="reward", seconds=60)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("the row is bad", "file.jsonl:3", "mend it")


@pytest.mark.parametrize(("method", "says"), [("fail", "in the actor"), ("die", "died")])
def test_a_failed_or_dead_actor_is_named(worker: Any, method: str, says: str) -> None:
    with pytest.raises(ActorFailed, match=says) as caught:
        gather([call(getattr(worker, method).remote())], phase="train", seconds=60)
    assert "rollout worker 3" in str(caught.value)
    assert "train" in str(caught.value)


def test_a_request_to_stop_ends_a_wait_long_before_its_deadline(worker: Any) -> None:
    stop = StopFlag()
    stop.request()
    with pytest.raises(StopRequested):
        gather([call(worker.hang.remote())], phase="rollout", seconds=3600, stop=stop)


def test_within_the_grace_period_a_wait_goes_on(worker: Any) -> None:
    stop = StopFlag(grace_s=3600)
    stop.request()
    assert gather([call(worker.echo.remote("done"))], phase="train", seconds=60, stop=stop) == ["done"]
