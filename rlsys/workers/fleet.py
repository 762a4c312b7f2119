"""Keeps the actors of a run that can be replaced one by one: rollout, reward, reference.

A fleet asks each of its actors now and then for a sign of life, ends one that owes it for too long, and starts another
process in the place of one that is gone, without touching the others. Nothing here waits: ``poll`` looks at what has
happened meanwhile. What the states mean is the business of :mod:`rlsys.workers.health`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import ray
from ray.exceptions import RayActorError

from rlsys.batch.versions import WeightVersion
from rlsys.cluster.placement import ActorSpec
from rlsys.config.modes import HealthConfig
from rlsys.workers.actors import Group
from rlsys.workers.failures import backoff_s, kind_of
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup
from rlsys.workers.health import Health, State
from rlsys.workers.waits import ActorLost, Call, fetch

_POLL_S = 0.1  # poll does nothing when called more often
_ABSENT_S = 2.0  # who has not polled for so long was away, and cannot say who was silent meanwhile


class Report(Protocol):
    """Told what happened: a kind (``lost``, ``restarted``, ``not started``, ``joined``, ``left``), in words, and by
    name."""

    def __call__(self, kind: str, text: str, **fields: str | float) -> None: ...


@dataclass(frozen=True)
class _Asked:
    """A question under way. since: when it was asked; by the clock of the fleet."""

    call: Call
    since: float


@dataclass
class _Loss:
    """An actor that is gone. began: when that was found out; due: when its restart may begin."""

    error: Exception
    phase: str
    began: float
    due: float


class Fleet:
    """The actors of one group. Any thread may call any method.

    Args:
        group: its actors have been started.
        health: how long an actor may be silent, and how often it is restarted without a whole step in between.
        report: told what happened.
        start_s: how long a start may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        group: Group,
        health: HealthConfig,
        report: Report,
        *,
        start_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._group, self._config, self._report, self._start_s, self._clock = group, health, report, start_s, clock
        self._holds_weights = group.role == "rollout"
        start = Health.started(holds_weights=self._holds_weights)
        self._health = dict.fromkeys(range(len(group)), start)
        self._version: WeightVersion | None = None
        self._pings: dict[int, _Asked] = {}
        self._starts: dict[int, _Asked] = {}
        self._losses: dict[int, _Loss] = {}
        self._leaving: set[int] = set()
        self._new: set[int] = set()  # joined, and have never run yet
        self._at_work: Counter[int] = Counter()  # calls under way, as those who made them say
        self._ended: SimpleQueue[tuple[Call, Future]] = SimpleQueue()
        self._polled = self._pinged = clock()
        self._since: Counter[str] = Counter()
        self._lock = threading.RLock()
        group.watched_by(self)

    # --- who may be given what ---

    def ready(self) -> list[int]:
        """Those that may be given work: alive, answering and, of samplers, with the current weights."""
        with self._lock:
            return [i for i, h in self._health.items() if h.state is State.HEALTHY and i not in self._leaving]

    def reachable(self) -> list[int]:
        """Those that are not known to be gone or on their way back."""
        with self._lock:
            return [index for index, health in self._health.items() if health.alive]

    def stale(self) -> list[int]:
        """Samplers that answer and want the current weights. Before the first update nobody does."""
        with self._lock:
            if self._version is None:
                return []
            return [i for i, h in self._health.items() if h.state is State.STALE and i not in self._leaving]

    def current(self, indices: Iterable[int], version: WeightVersion | None = None) -> None:
        """They have been given these weights (None: the current ones). When they are new, everybody else has missed
        an update."""
        with self._lock:
            self._give([(index, self._health[index].life) for index in indices if index in self._health], version)

    def given(self, calls: Sequence[Call], version: WeightVersion) -> None:
        """:meth:`current`, of the lives that were asked."""
        with self._lock:
            self._give([(call.index, call.life) for call in calls if call.index in self._health], version)

    def _give(self, lives: list[tuple[int, int]], version: WeightVersion | None) -> None:
        self._version = version = version or self._version
        if version is None:
            return
        self._health = {index: health.weights_wanted(version) for index, health in self._health.items()}
        for index, life in lives:
            self._health[index] = self._health[index].weights_given(version, life)

    def busy(self, index: int) -> None:
        """Work has been given to this one. Whoever gave it says :meth:`done` when nobody waits for it any more."""
        with self._lock:
            self._at_work[index] += 1

    def done(self, index: int) -> None:
        """One piece of its work has ended, however."""
        with self._lock:
            self._at_work[index] -= 1
            self._let_go(index)

    # --- what happens to them ---

    def lost(self, index: int, error: Exception, *, life: int | None = None, phase: str = "") -> None:
        """An answer said that it is gone, or did not come in time: its process is ended, if there still is one, and
        another one started. That it is gone may be said many times.

        Args:
            life: which of its processes was asked; None: the present one.
            phase: in which it was asked.

        Raises:
            ActorLost: that has happened more often than ``health.restarts`` allows.
        """
        with self._lock:
            health = self._health.get(index)
            if health is None or not health.alive or life not in (None, health.life):
                return
            self._end(index, error, phase)

    def poll(self) -> None:
        """Looks at what has happened, and does what is due. Called often, by whoever waits for an actor.

        Raises:
            ActorLost: an actor was lost more often than ``health.restarts`` allows.
            UserError, ActorFailed: an actor that was started anew refused to start.
        """
        with self._lock:
            now = self._clock()
            if (gap := now - self._polled) < _POLL_S:
                return
            self._polled = now
            self._hear(now)
            if gap > max(self._config.liveness_s / 2, _ABSENT_S):  # what is owed is owed from now on
                self._pings = {index: _Asked(asked.call, now) for index, asked in self._pings.items()}
            self._judge(now)
            for index, loss in list(self._losses.items()):
                if self._health[index].state is State.DEAD and now >= loss.due:
                    self._restart(index, loss)
            if now - self._pinged >= self._config.liveness_s / 4:
                self._pinged = now
                self._ask_all(now)

    def step_done(self) -> None:
        """A whole step was done: restarts are counted anew."""
        with self._lock:
            self._health = {index: health.step_done() for index, health in self._health.items()}

    def reissued(self, count: int = 1) -> None:
        """Notes for the metrics that work of a lost actor was given to another."""
        with self._lock:
            self._since["reissued"] += count

    def metrics(self) -> dict[str, float]:
        """``restarts`` and ``reissued`` since the last time; how many are ``healthy`` now, of how many ``actors``."""
        with self._lock:
            since, self._since = self._since, Counter()
            return {
                "restarts": float(since["restarts"]),
                "reissued": float(since["reissued"]),
                "healthy": float(sum(health.state is State.HEALTHY for health in self._health.values())),
                "actors": float(len(self._health)),
            }

    # --- who comes and goes ---

    def join(self, spec: ActorSpec) -> None:
        """One more actor; it is given work when it has started and, of samplers, has the current weights."""
        with self._lock:
            self._new.add(spec.index)
            self._health[spec.index] = Health.joining(holds_weights=self._holds_weights, wanted=self._version)
            self._starting(spec.index, self._group.enrol(spec))
            self._report("joined", f"{spec.name} is starting", actor=spec.name)

    def next_index(self) -> int:
        """Of whoever joins next: of nobody who ever was here."""
        return self._group.next_index

    def leave(self, index: int, *, finish: bool = True) -> None:
        """Gives this actor no more work.

        Args:
            finish: what it is at may end first; else it is ended, and that is done by others.
        """
        with self._lock:
            if index in self._health:
                self._leaving.add(index)
                if finish:
                    self._let_go(index)
                else:
                    self._forget(index, "it was asked to")

    def leaving(self) -> list[int]:
        """Those that leave as soon as nothing is under way at them."""
        with self._lock:
            return [index for index in self._leaving if index in self._health]

    # --- inside; the lock is held ---

    def _name(self, index: int) -> str:
        return self._group.at(index).spec.name

    def _end(self, index: int, error: Exception, phase: str) -> None:
        health = self._health[index]
        now = self._clock()
        self._health[index] = health.ended(health.life)
        self._pings.pop(index, None)
        self._group.kill(index)
        self._losses[index] = loss = _Loss(error, phase, now, now + backoff_s(health.restarts + 1))
        said = str(error).strip().splitlines()[0]
        self._report("lost", f"{self._name(index)} was lost: {said}", actor=self._name(index), phase=phase)
        if index in self._leaving:
            self._forget(index, "it was lost")
        elif now >= loss.due:
            self._restart(index, loss)

    def _restart(self, index: int, loss: _Loss) -> None:
        health, name = self._health[index], self._name(index)
        if self._moved_off(index):
            return
        if health.restarts >= self._config.restarts and index in self._new:
            self._forget(index, f"it did not start, tried {health.restarts + 1} times")
            return
        if health.restarts >= self._config.restarts:
            times = "1 time" if not health.restarts else f"{health.restarts + 1} times"
            raise ActorLost(
                f"{name} was lost {times} without a whole step in between, and health.restarts "
                f"allows {self._config.restarts}; the last time: {loss.error}"
            ) from loss.error
        self._health[index] = health.restart_begun()
        self._since["restarts"] += 1
        self._starting(index, self._group.restart(index))

    def _moved_off(self, index: int) -> bool:
        """Of an actor whose host has left the cluster: a sampler is done without where there are others, a reward
        actor may start anywhere. Returns whether it is gone for good."""
        spec = self._group.at(index).spec
        if spec.node is None or any(n["NodeID"] == spec.node and n["Alive"] for n in ray.nodes()):
            return False
        staying = {other: health for other, health in self._health.items() if other not in {index, *self._leaving}}
        if self._holds_weights and any(health.alive for health in staying.values()):
            self._forget(index, "its host has left the cluster")
            return True
        if not spec.gpus:
            self._group.moved(index, node=None, bundle=None)
        return False

    def _let_go(self, index: int) -> None:
        """One that is leaving and has nothing to do any more."""
        if index in self._health and index in self._leaving and not self._at_work[index]:
            self._forget(index, "it was asked to")

    def _forget(self, index: int, why: str) -> None:
        name = self._name(index)
        self._group.leave(index)
        for known in (self._health, self._pings, self._starts, self._losses):
            known.pop(index, None)
        self._leaving.discard(index)
        self._new.discard(index)
        self._report("left", f"{name} has left: {why}", actor=name)

    def _starting(self, index: int, call: Call) -> None:
        self._starts[index] = _Asked(call, self._clock())
        self._follow(call)

    def _follow(self, call: Call) -> None:
        call.ref.future().add_done_callback(partial(self._note, call))

    def _note(self, call: Call, future: Future) -> None:
        """Called from a thread of Ray's."""
        self._ended.put((call, future))

    def _hear(self, now: float) -> None:
        """What has been answered since."""
        while True:
            try:
                call, future = self._ended.get_nowait()
            except Empty:
                return
            index = call.index
            if (asked := self._starts.get(index)) is not None and asked.call.ref == call.ref:
                del self._starts[index]
                self._started(index, call, future, now)
            elif (asked := self._pings.get(index)) is not None and asked.call.ref == call.ref:
                del self._pings[index]
                self._signed(index, call, future)

    def _signed(self, index: int, call: Call, future: Future) -> None:
        error = future.exception()
        if isinstance(error, RayActorError):
            lost = ActorLost(f"{call.actor} died: {str(error).strip().splitlines()[-1]}")
            self.lost(index, lost, life=call.life)
        else:  # whatever it said: it is alive
            self._health[index] = self._health[index].answered(call.life)

    def _started(self, index: int, call: Call, future: Future, now: float) -> None:
        try:
            if future.exception() is not None:
                fetch(call, "start", self._start_s, self._clock())
        except Exception as error:
            if kind_of(error) != "infrastructure":
                raise
            self._failed(index, error)
            return
        self._health[index] = self._health[index].restart_done(call.life)
        self._new.discard(index)
        loss = self._losses.pop(index, None)
        if loss is not None:
            seconds = now - loss.began
            text = f"{call.actor} has started again, {seconds:.1f} s after it was lost"
            self._report("restarted", text, actor=call.actor, phase=loss.phase, seconds=round(seconds, 3))

    def _failed(self, index: int, error: Exception) -> None:
        """A start came to nothing."""
        health, now = self._health[index], self._clock()
        self._health[index] = health.restart_failed(health.life)
        self._group.kill(index)
        before = self._losses.get(index)
        began = before.began if before is not None else now
        self._losses[index] = _Loss(error, "start", began, now + backoff_s(health.restarts + 1))
        said = str(error).strip().splitlines()[0]
        self._report("not started", f"{self._name(index)} did not start: {said}", actor=self._name(index))

    def _judge(self, now: float) -> None:
        """Who has been silent for too long."""
        limit = self._config.liveness_s
        for index, asked in list(self._pings.items()):
            health = self._health[index].silent(now - asked.since, suspect_s=limit / 2, dead_s=limit)
            if health.alive:
                self._health[index] = health
            else:
                name = self._name(index)
                self._end(index, ActorLost(f"{name} gave no sign of life for {limit:g} s (health.liveness_s)"), "")
        for index, asked in list(self._starts.items()):
            if now - asked.since > self._start_s:
                del self._starts[index]
                name = self._name(index)
                self._failed(index, ActorLost(f"{name} did not start within deadlines.start={self._start_s:g} s"))

    def _ask_all(self, now: float) -> None:
        for index, health in self._health.items():
            if health.alive and index not in self._pings:
                call = self._group.ping(index)
                self._pings[index] = _Asked(call, now)
                self._follow(call)


def _nobody(stale: list[int]) -> None:
    """The next update gives them their weights."""


@dataclass
class Fleets:
    """Of a job; no reference where nothing reads it.

    catch_up: gives samplers (their indices) the present weights.
    alone: that works only while nothing is under way at any sampler: samplers and trainer share their memory.
    """

    rollout: Fleet
    reward: Fleet
    reference: Fleet | None = None
    catch_up: Callable[[list[int]], None] = field(default=_nobody)
    alone: bool = False

    @classmethod
    def watch(
        cls,
        rollout: RolloutGroup,
        reward: RewardGroup,
        reference: ReferenceGroup | None,
        health: HealthConfig,
        report: Report,
        *,
        start_s: float,
    ) -> Fleets:
        """Fleets of these groups, whose actors have been started; arguments as :class:`Fleet` takes them."""
        made = [Fleet(group, health, report, start_s=start_s) for group in (rollout, reward)]
        last = Fleet(reference, health, report, start_s=start_s) if reference is not None else None
        return cls(made[0], made[1], last)

    def present(self) -> list[Fleet]:
        return [fleet for fleet in (self.rollout, self.reward, self.reference) if fleet is not None]

    def poll(self, *, busy: bool = False) -> None:
        """Looks after all of them, and gives weights to samplers that want them. busy: something is under way at a
        sampler. Errors as :meth:`Fleet.poll` raises them."""
        for fleet in self.present():
            fleet.poll()
        if (stale := self.rollout.stale()) and not (busy and self.alone):
            self.catch_up(stale)

    def step_done(self) -> None:
        for fleet in self.present():
            fleet.step_done()

    def metrics(self) -> dict[str, float]:
        """``fleet/…``, over all of them."""
        total: Counter[str] = Counter()
        for fleet in self.present():
            total.update(fleet.metrics())
        return {f"fleet/{name}": float(number) for name, number in total.items()}
