"""A group of Ray actors of one role, any of which can be ended and started again by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import ray

from rlsys.batch.versions import WeightVersion
from rlsys.cluster.placement import ActorSpec
from rlsys.cluster.session import Placement
from rlsys.config.schema import DeadlineConfig
from rlsys.workers.waits import ActorFailed, ActorLost, Call, DeadlineExceeded, StopFlag, as_completed, gather

_CLOSE_S = 5.0


@dataclass(frozen=True)
class Actor:
    """life: which of the processes of this place it is, from 0."""

    spec: ActorSpec
    handle: Any
    life: int = 0

    def call(self, method: str, *args: Any, what: str, payload: Any = None, **kwargs: Any) -> Call:
        return self.called(getattr(self.handle, method).remote(*args, **kwargs), what, payload)

    def called(self, ref: ray.ObjectRef, what: str, payload: Any = None) -> Call:
        """A call that was made without :meth:`call`."""
        return Call(ref, self.spec.name, what, payload, self.spec.index, self.life)


class Watcher(Protocol):
    """Who keeps the actors of a group alive."""

    def reachable(self) -> list[int]:
        """Those that are not known to be gone or on their way back."""
        ...

    def poll(self) -> None:
        """Looks after them; called twice a second while they are waited for."""
        ...

    def lost(self, index: int, error: Exception, *, life: int | None = None, phase: str = "") -> None:
        """An answer said that it is gone. Raises ActorFailed where that must not happen again."""
        ...

    def busy(self, index: int) -> None:
        """It has been asked something that it must end before it leaves, if it is to."""
        ...

    def done(self, index: int) -> None:
        """That has ended, however."""
        ...

    def given(self, calls: Sequence[Call], version: WeightVersion) -> None:
        """These updates have been done: who was asked holds the version, and nobody else does."""
        ...


class Group:
    """Actors of one role. They keep their index (``spec.index``) when others leave.

    Args:
        placement: what each is placed into, also when it is started again.
        extra_options: Ray's, of every actor.
    """

    role: str
    worker: type
    concurrency_groups: ClassVar[dict[str, int]] = {}
    _watcher: Watcher | None = None
    _start: Callable[[Actor], Call] | None = None

    def __init__(self, placement: Placement, deadlines: DeadlineConfig, stop: StopFlag, **extra_options: Any):
        self._placement, self._deadlines, self._stop, self._extra = placement, deadlines, stop, extra_options
        # Ray takes concurrency groups here only; options() has no say in them.
        made = ray.remote(concurrency_groups=self.concurrency_groups) if self.concurrency_groups else ray.remote
        self._remote = made(self.worker)
        specs = placement.plan.of(self.role)
        self._count = len(specs)
        self._actors = [self._made(spec) for spec in specs]
        self.next_index = 1 + max((spec.index for spec in specs), default=-1)
        """Greater than that of any actor that the group ever had."""

    def __len__(self) -> int:
        return len(self._actors)

    def handles(self) -> dict[str, Any]:
        """Ray's handle of each actor, by ``ROLE_INDEX``."""
        return {f"{actor.spec.role}_{actor.spec.index}": actor.handle for actor in self._actors}

    def specs(self) -> dict[int, ActorSpec]:
        """Of those that there are, by index."""
        return {actor.spec.index: actor.spec for actor in self._actors}

    def asks(self, method: str, *, actors: Sequence[int] | None = None, **arguments: Any) -> list[Call]:
        """One call an actor (these of them; None: all) of what every worker answers (``take_reading``, ``clock``);
        payload: ``ROLE_INDEX``. Who is on its way back is left out."""
        return [
            a.call(method, what=method.replace("_", " "), payload=f"{a.spec.role}_{a.spec.index}", **arguments)
            for a in self.reached()
            if actors is None or a.spec.index in actors
        ]

    # --- one by one ---

    def watched_by(self, watcher: Watcher) -> None:
        """From here on a lost actor is told to ``watcher``, and calls to all are calls to those that it can reach."""
        self._watcher = watcher

    def reached(self) -> list[Actor]:
        if self._watcher is None:
            return list(self._actors)
        reachable = set(self._watcher.reachable())
        return [actor for actor in self._actors if actor.spec.index in reachable]

    def at(self, index: int) -> Actor:
        """The actor of this index.

        Raises:
            ActorLost: it has left.
        """
        for actor in self._actors:
            if actor.spec.index == index:
                return actor
        raise ActorLost(f"{self.role} worker {index} has left")

    def ping(self, index: int) -> Call:
        """Answered at once, whatever the actor is at."""
        return self.at(index).call("ping", what="a sign of life")

    def kill(self, index: int) -> None:
        """Ends its process, also one that is stopped: Ray's own agent on its host sees to it, and frees what it had."""
        ray.kill(self.at(index).handle)

    def restart(self, index: int) -> Call:
        """Another process in the place of one that was killed: the same spec, options and start. Others are not
        touched. The call ends when it has started."""
        before = self.at(index)
        return self._begun(self._made(before.spec, before.life + 1))

    def enrol(self, spec: ActorSpec) -> Call:
        """One more actor, while the others work. The call ends when it has started.

        Args:
            spec: its index is that of no other, also of none that has left (``next_index``).
        """
        if spec.index < self.next_index:
            raise ValueError(f"there is a {spec.name} already, or was")
        self.next_index = spec.index + 1
        return self._begun(self._made(spec, life=1))

    def leave(self, index: int) -> None:
        """Ends this actor for good. What it was asked ends as ActorLost."""
        actor = self.at(index)
        self._actors = [other for other in self._actors if other is not actor]
        ray.kill(actor.handle)

    def moved(self, index: int, **changes: Any) -> None:
        """The next start of this actor is elsewhere (``node``, ``bundle``)."""
        actor = self.at(index)
        self._replace(replace(actor, spec=replace(actor.spec, **changes)))

    # --- for the roles ---

    def _arguments(self, spec: ActorSpec, count: int) -> tuple[Any, ...]:
        return ()

    def _starts(self, start: Callable[[Actor], Call]) -> list[Call]:
        """Starts every actor by this call, and by the same one whoever takes its place."""
        self._start = start
        return [start(actor) for actor in self._actors]

    def _gather(self, calls: list[Call], phase: str, *, stop: bool = True) -> list[Any]:
        return gather(calls, phase=phase, seconds=getattr(self._deadlines, phase), stop=self._stop if stop else None)

    def _answers(
        self, calls: Sequence[Call], phase: str, *, stop: bool = True, longer_s: float = 0.0
    ) -> list[tuple[Call, Any]]:
        """Calls and answers, in the order of the calls, without those of actors that were lost meanwhile; these are
        told to the watcher, and raised where there is none. longer_s: beyond the phase's deadline."""
        waited = as_completed(
            calls,
            phase=phase,
            seconds=getattr(self._deadlines, phase) + longer_s,
            stop=self._stop if stop else None,
            recover=_WithoutTheLost(self._watcher, phase) if self._watcher is not None else None,
        )
        answers = {call.ref: answer for call, answer in waited}
        return [(call, answers[call.ref]) for call in calls if call.ref in answers]

    @contextmanager
    def _staying(self, calls: Sequence[Call]) -> Iterator[None]:
        """Who is asked does not leave meanwhile."""
        if self._watcher is not None:
            for call in calls:
                self._watcher.busy(call.index)
        try:
            yield
        finally:
            if self._watcher is not None:
                for call in calls:
                    self._watcher.done(call.index)

    def close(self) -> None:
        """Asks every actor to end its own processes, then ends the actor; one that does not answer is killed."""
        calls = [actor.call("close", what="closing") for actor in self._actors]
        try:
            gather(calls, phase="close", seconds=_CLOSE_S)
        except (ActorFailed, DeadlineExceeded):
            pass  # ended below all the same; the run's own error, if any, is the one to report
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)

    def _made(self, spec: ActorSpec, life: int = 0) -> Actor:
        options = self._remote.options(**self._placement.options(spec), **self._extra)
        return Actor(spec, options.remote(*self._arguments(spec, self._count)), life)

    def _begun(self, actor: Actor) -> Call:
        assert self._start is not None, "the group itself has not been started"
        self._replace(actor)
        return self._start(actor)

    def _replace(self, actor: Actor) -> None:
        others = [other for other in self._actors if other.spec.index != actor.spec.index]
        self._actors = sorted([*others, actor], key=lambda actor: actor.spec.index)


@dataclass(frozen=True)
class _WithoutTheLost:
    """A wait goes on without an actor that was lost."""

    watcher: Watcher
    phase: str
    owes: bool = False

    def calls(self) -> list[Call]:
        self.watcher.poll()
        return []

    def lost(self, call: Call, error: Exception) -> None:
        self.watcher.lost(call.index, error, life=call.life, phase=self.phase)
