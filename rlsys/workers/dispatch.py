"""Hands pieces of work to the actors that are ready, and what a lost one had to another."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rlsys.workers.fleet import Fleets
from rlsys.workers.waits import Call, StopFlag, Waiting, is_loss

Work = TypeVar("Work")


class Pool(Protocol):
    """Who may be given work, as :class:`rlsys.workers.fleet.Fleet` says it."""

    def ready(self) -> list[int]: ...

    def lost(self, index: int, error: Exception, *, life: int | None = None, phase: str = "") -> None: ...

    def reissued(self, count: int = 1) -> None: ...

    def busy(self, index: int) -> None: ...

    def done(self, index: int) -> None: ...


@dataclass(frozen=True)
class Unwatched:
    """A pool of actors that nobody keeps alive: who loses one, loses everything."""

    size: int

    def ready(self) -> list[int]:
        return list(range(self.size))

    def lost(self, index: int, error: Exception, *, life: int | None = None, phase: str = "") -> None:
        raise error

    def reissued(self, count: int = 1) -> None:
        """Nothing ever is."""

    def busy(self, index: int) -> None:
        """Nobody leaves."""

    def done(self, index: int) -> None:
        """Nobody leaves."""


class Dispatch(Generic[Work]):
    """One stage: pieces of work, and calls about them.

    Args:
        phase, seconds: of every call; a call that takes longer is lost.
        pool: of the actors.
        issue: calls the actor of this index about a piece of work.
        limit: pieces that are under way at one actor; more wait here, where they can still be given to another.
    """

    def __init__(
        self,
        phase: str,
        seconds: float,
        pool: Pool,
        issue: Callable[[int, Work], Call],
        *,
        limit: int | None = None,
    ):
        self.phase, self.seconds = phase, seconds
        self._pool, self._issue, self._limit = pool, issue, limit
        self._waiting: deque[Work] = deque()
        self._given: dict[Any, Work] = {}  # by reference of the call
        self._load: Counter[int] = Counter()

    @property
    def owes(self) -> bool:
        """Whether there is work that has not been done."""
        return bool(self._waiting or self._given)

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._given)

    def put(self, work: Work) -> None:
        self._waiting.append(work)

    def calls(self) -> list[Call]:
        """Gives waiting work to those that are ready, the least busy first. Returns the calls."""
        if not self._waiting:
            return []
        made = []
        free = [(self._load[index], index) for index in self._pool.ready()]
        heapq.heapify(free)
        while self._waiting and free:
            load, index = free[0]
            if self._limit is not None and load >= self._limit:
                break
            heapq.heapreplace(free, (load + 1, index))
            work = self._waiting.popleft()
            call = self._issue(index, work)
            self._given[call.ref] = work
            self._load[index] += 1
            self._pool.busy(index)
            made.append(call)
        return made

    def done(self, call: Call) -> Work:
        """This call has been answered. Returns what it was about."""
        self._load[call.index] -= 1
        self._pool.done(call.index)
        return self._given.pop(call.ref)

    def close(self) -> None:
        """Nobody waits for what is under way any more."""
        for index, load in self._load.items():
            for _ in range(load):
                self._pool.done(index)
        self._load.clear()
        self._given.clear()

    def lost(self, call: Call, error: Exception) -> None:
        """This call will not be answered: what it was about waits for somebody else, before all others.

        Raises:
            ActorLost: this must not happen again, as ``Fleet.lost`` says.
        """
        self._waiting.appendleft(self.done(call))
        self._pool.reissued()
        self._pool.lost(call.index, error, life=call.life, phase=self.phase)


def answers(
    stages: Sequence[Dispatch[Any]], fleets: Fleets | None, stop: StopFlag | None, *, samplers: Dispatch[Any]
) -> Iterator[tuple[Dispatch[Any], Any, Call, Any]]:
    """Yields (stage, work, call, answer) until no stage has work left; whoever is told may put more into any of them.

    Args:
        fleets: looked after meanwhile; None: nobody does.
        samplers: which of the stages is theirs.

    Raises:
        ActorLost, DeadlineExceeded: an actor was lost or late, and nobody takes its place (any more).
        ActorFailed, UserError, StopRequested: as ``as_completed`` raises them.
    """
    stage_of = {stage.phase: stage for stage in stages}
    phase_of: dict[Any, str] = {}
    with Waiting(stop) as waiting, ExitStack() as ends:
        for stage in stages:
            ends.callback(stage.close)
        while any(stage.owes for stage in stages):
            if fleets is not None:
                fleets.poll(busy=samplers.busy)
            for stage in stages:
                for call in stage.calls():
                    phase_of[call.ref] = stage.phase
                    waiting.add(call, phase=stage.phase, seconds=stage.seconds)
            ended = waiting.next()
            if ended is None:
                continue
            stage = stage_of[phase_of.pop(ended.call.ref)]
            if ended.error is None:
                yield stage, stage.done(ended.call), ended.call, ended.answer
            elif is_loss(ended.error):
                stage.lost(ended.call, ended.error)
            else:
                raise ended.error
