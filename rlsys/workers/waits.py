"""Every wait on something remote has a deadline and an owner. A wait that passes its deadline says who was waited for,
in which phase, and for what."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from rlsys.config.errors import UserError
from rlsys.workers.under_way import under_way

_POLL_S = 0.5  # how soon a request to stop is noticed while nothing arrives


class DeadlineExceeded(RuntimeError):
    """An actor did not answer in time."""


class ActorFailed(RuntimeError):
    """An actor died, or a call on it raised something that is not bad input."""


class ActorLost(ActorFailed):
    """An actor is gone, or an answer of its, or a peer that it was connected to: what a host that left also looks
    like."""


class StopRequested(Exception):
    """The user asked the run to stop (Ctrl-C, SIGTERM)."""


@dataclass
class StopFlag:
    """Set by a signal handler, looked at by every wait.

    grace_s: how long after the request the waits still go on; an update that has begun gets a few seconds to
        finish, so that weights and optimiser are those of a whole step.
    """

    requested_at: float | None = None
    grace_s: float = 0.0

    def request(self) -> None:
        self.requested_at = self.requested_at or time.monotonic()

    def check(self) -> None:
        """Raises StopRequested once the request is older than the grace period."""
        if self.requested_at is not None and time.monotonic() - self.requested_at >= self.grace_s:
            raise StopRequested


@dataclass(frozen=True)
class Call:
    """One call under way.

    ref: of its answer (the part that the driver wants to see).
    actor: who was asked ("rollout worker 0"); what: for what ("64 responses").
    payload: whatever the caller wants back together with the answer.
    """

    ref: ray.ObjectRef
    actor: str
    what: str
    payload: Any = field(default=None)


def as_completed(
    calls: Sequence[Call], *, phase: str, seconds: float, stop: StopFlag | None = None
) -> Iterator[tuple[Call, Any]]:
    """Yields (call, answer) as answers arrive.

    Args:
        seconds: deadline for all of them together, from now.

    Raises:
        DeadlineExceeded: naming every actor that has not answered.
        ActorFailed: an actor raised; ActorLost: it died, or its connection to another one broke off.
        UserError: an actor refused its input.
        StopRequested: ``stop`` was requested.
    """
    pending = {call.ref: call for call in calls}
    deadline = time.monotonic() + seconds
    # Ray tells when an answer is there. Asking it for the next one of n would look at all n, each time.
    ended: SimpleQueue[tuple[Call, Future]] = SimpleQueue()
    for call in pending.values():
        call.ref.future().add_done_callback(partial(_note, ended, call))
    with under_way(phase, pending) as wait:
        while pending:
            if stop is not None:
                stop.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(_late(list(pending.values()), phase, seconds))
            try:
                call, future = ended.get(timeout=min(left, _POLL_S))
            except Empty:
                continue
            del pending[call.ref]
            wait.answered()
            yield call, future.result() if future.exception() is None else fetch(call, phase, seconds, deadline)


def _note(ended: SimpleQueue[tuple[Call, Future]], call: Call, future: Future) -> None:
    ended.put((call, future))


def gather(calls: Sequence[Call], *, phase: str, seconds: float, stop: StopFlag | None = None) -> list[Any]:
    """The answers in the order of the calls; errors as in :func:`as_completed`."""
    answers = {call.ref: answer for call, answer in as_completed(calls, phase=phase, seconds=seconds, stop=stop)}
    return [answers[call.ref] for call in calls]


def fetch(call: Call, phase: str, seconds: float, deadline: float) -> Any:
    """The answer of a call that has ended, with actor and phase named in what it raises.

    Args:
        seconds: the phase's limit; deadline: when it is over, by the monotonic clock.
    """
    try:
        return ray.get(call.ref, timeout=max(deadline - time.monotonic(), _POLL_S))
    except GetTimeoutError:
        raise DeadlineExceeded(_late([call], phase, seconds)) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        failed = ActorLost if _lost_a_peer(cause) else ActorFailed
        raise failed(f"{call.actor} failed in phase '{phase}' ({call.what}):\n{error}") from None
    except RayActorError as error:
        raise ActorLost(f"{call.actor} died in phase '{phase}' ({call.what}): {_first_line(error)}") from error
    except RayError as error:
        raise ActorLost(f"{call.actor} was lost in phase '{phase}' ({call.what}): {_first_line(error)}") from error


_BROKEN_OFF = ("DistBackendError", "DistNetworkError", "DistStoreError")


def _lost_a_peer(cause: BaseException) -> bool:
    """Whether a collective broke off, or what an actor was to fetch is gone with who had it. torch's errors of NCCL and
    of its store have classes of their own; gloo's names the file that found it out."""
    if isinstance(cause, RayActorError | ObjectLostError) or type(cause).__name__ in _BROKEN_OFF:
        return True
    return "gloo/transport" in str(cause)


def _late(calls: list[Call], phase: str, seconds: float) -> str:
    who = "; ".join(f"{call.actor} ({call.what})" for call in calls[:8])
    return f"no answer within {seconds:g} s in phase '{phase}' from {who}; the limit is deadlines.{phase}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
