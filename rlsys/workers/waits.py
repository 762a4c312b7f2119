"""Every wait on something remote has a deadline and an owner. A wait that passes its deadline says who was waited for,
in which phase, and for what."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from rlsys.config.errors import UserError
from rlsys.workers.under_way import Wait, under_way

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
    index: of the actor in its group; life: which of its processes was asked, where it may be restarted.
    """

    ref: ray.ObjectRef
    actor: str
    what: str
    payload: Any = field(default=None)
    index: int = 0
    life: int = 0


class Recover(Protocol):
    """Who takes over the calls of actors that are lost."""

    @property
    def owes(self) -> bool:
        """Whether more calls will come."""
        ...

    def calls(self) -> Sequence[Call]:
        """Those to wait for besides, from now. Asked after every answer, and twice a second."""
        ...

    def lost(self, call: Call, error: Exception) -> None:
        """Takes over a call that failed for want of infrastructure, or raises."""
        ...


@dataclass(frozen=True)
class Ended:
    """A call that is over. error: what came in the place of its answer."""

    call: Call
    answer: Any = None
    error: Exception | None = None


class Waiting:
    """Calls under way, each with a phase and a deadline of its own. A context: a watchdog sees it meanwhile.

    Args:
        stop: looked at twice a second.
    """

    def __init__(self, stop: StopFlag | None = None):
        self._stop = stop
        self._pending: dict[str, dict[ray.ObjectRef, Call]] = {}  # by phase
        self._waits: dict[str, Wait] = {}
        self._deadlines: list[tuple[float, int, ray.ObjectRef]] = []  # a heap; of calls that are over too
        self._limits: dict[ray.ObjectRef, tuple[str, float, float]] = {}  # phase, its seconds, when they are over
        self._numbers = count()
        # Ray tells when an answer is there. Asking it for the next one of n would look at all n, each time.
        self._ended: SimpleQueue[tuple[Call, Future]] = SimpleQueue()
        self._watched = ExitStack()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._watched.close()

    def __len__(self) -> int:
        return len(self._limits)

    def add(self, call: Call, *, phase: str, seconds: float, until: float | None = None) -> None:
        """Waits for this one too. seconds: the phase's limit; until: when it is over; None: so long from now."""
        if phase not in self._pending:
            self._pending[phase] = {}
            self._waits[phase] = self._watched.enter_context(under_way(phase, self._pending[phase]))
        elif not self._pending[phase]:
            self._waits[phase].answered()  # nobody was waited for until now
        until = time.monotonic() + seconds if until is None else until
        self._pending[phase][call.ref] = call
        self._limits[call.ref] = phase, seconds, until
        heapq.heappush(self._deadlines, (until, next(self._numbers), call.ref))
        call.ref.future().add_done_callback(partial(_note, self._ended, call))

    def next(self) -> Ended | None:
        """The next call that is over; None: none within half a second. One whose deadline passes is over too, and what
        it answers later is not heard.

        Raises:
            StopRequested: ``stop`` was requested.
        """
        if self._stop is not None:
            self._stop.check()
        while self._deadlines and self._deadlines[0][2] not in self._limits:
            heapq.heappop(self._deadlines)
        left = self._deadlines[0][0] - time.monotonic() if self._deadlines else _POLL_S
        if left <= 0:
            return self._too_late(self._deadlines[0][2])
        try:
            call, future = self._ended.get(timeout=min(left, _POLL_S))
        except Empty:
            return None
        if call.ref not in self._limits:
            return None
        phase, seconds, until = self._over(call)
        if future.exception() is None:
            return Ended(call, future.result())
        try:
            return Ended(call, fetch(call, phase, seconds, until))
        except (DeadlineExceeded, ActorFailed, UserError) as error:
            return Ended(call, error=error)

    def _too_late(self, ref: ray.ObjectRef) -> Ended:
        phase, seconds, _ = self._limits[ref]
        now, pending = time.monotonic(), self._pending[phase]
        late = [call for call in pending.values() if self._limits[call.ref][2] <= now]
        error = DeadlineExceeded(_late(late, phase, seconds))
        self._over(pending[ref])
        return Ended(next(call for call in late if call.ref == ref), error=error)

    def _over(self, call: Call) -> tuple[str, float, float]:
        phase, seconds, until = self._limits.pop(call.ref)
        del self._pending[phase][call.ref]
        self._waits[phase].answered()
        return phase, seconds, until


def as_completed(
    calls: Sequence[Call], *, phase: str, seconds: float, stop: StopFlag | None = None, recover: Recover | None = None
) -> Iterator[tuple[Call, Any]]:
    """Yields (call, answer) as answers arrive.

    Args:
        seconds: deadline for all of them together, from now; a call that ``recover`` makes has as long from then.
        recover: takes over what fails because an actor is lost or late; the errors below that say so are then its own.

    Raises:
        DeadlineExceeded: naming every actor that has not answered.
        ActorFailed: an actor raised; ActorLost: it died, or its connection to another one broke off.
        UserError: an actor refused its input.
        StopRequested: ``stop`` was requested.
    """
    with Waiting(stop) as waiting:
        until = time.monotonic() + seconds
        for call in calls:
            waiting.add(call, phase=phase, seconds=seconds, until=until)
        while waiting or (recover is not None and recover.owes):
            for call in recover.calls() if recover is not None else ():
                waiting.add(call, phase=phase, seconds=seconds)
            ended = waiting.next()
            if ended is None:
                continue
            if ended.error is None:
                yield ended.call, ended.answer
            elif recover is not None and is_loss(ended.error):
                recover.lost(ended.call, ended.error)
            else:
                raise ended.error


def is_loss(error: BaseException) -> bool:
    """Whether it says that an actor is gone or late, and nothing about what it was asked."""
    return isinstance(error, ActorLost | DeadlineExceeded)


def _note(ended: SimpleQueue[tuple[Call, Future]], call: Call, future: Future) -> None:
    ended.put((call, future))


def gather(
    calls: Sequence[Call], *, phase: str, seconds: float, stop: StopFlag | None = None, recover: Recover | None = None
) -> list[Any]:
    """The answers in the order of the calls; errors as in :func:`as_completed`. With ``recover``, those that came,
    without those of calls that were lost."""
    completed = as_completed(calls, phase=phase, seconds=seconds, stop=stop, recover=recover)
    answers = {call.ref: answer for call, answer in completed}
    return [answers[call.ref] for call in calls if call.ref in answers]


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
