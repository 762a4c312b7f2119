"""Whether an actor may be given work: a pure state machine. Events come in as methods, time as an argument.

    HEALTHY ──silent──▶ SUSPECT ──silent longer──▶ DEAD ──▶ RESTARTING ──▶ STALE ──current weights──▶ HEALTHY
       ▲                   │                        ▲            │           │
       └─────answered──────┘                        └── failed ──┘           └──silent──▶ SUSPECT

DEAD → HEALTHY does not exist: what comes back is a new process. One that holds weights comes back STALE, and is STALE
again when it missed an update. Answers of an earlier life of the actor say nothing about the present one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from rlsys.batch.versions import WeightVersion


class State(Enum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"


@dataclass(frozen=True)
class Health:
    """Of one actor. Every event returns the health after it; one that says nothing new returns the same.

    holds_weights: whether there are weights that it needs before it may work (samplers).
    life: counts its processes, from 0.
    wanted: version of the weights that are current; held: of those that this life was given; None: none yet.
    restarts: since the last whole step.
    """

    state: State
    holds_weights: bool
    life: int = 0
    wanted: WeightVersion | None = None
    held: WeightVersion | None = None
    restarts: int = 0

    @classmethod
    def started(cls, *, holds_weights: bool) -> Health:
        """Of an actor that has come up with everybody else, before the first update: it has missed none."""
        return cls(State.HEALTHY, holds_weights)

    @classmethod
    def joining(cls, *, holds_weights: bool, wanted: WeightVersion | None) -> Health:
        """Of an actor that starts while the others are at work."""
        return cls(State.RESTARTING, holds_weights, wanted=wanted, life=1)

    @property
    def alive(self) -> bool:
        return self.state in (State.HEALTHY, State.SUSPECT, State.STALE)

    def answered(self, life: int) -> Health:
        return replace(self, state=self._rested()) if self._is(life) else self

    def silent(self, seconds: float, *, suspect_s: float, dead_s: float) -> Health:
        """It has owed an answer for so long. suspect_s, dead_s: how long that may be."""
        if not self.alive or seconds < suspect_s:
            return self
        return self.ended(self.life) if seconds >= dead_s else replace(self, state=State.SUSPECT)

    def ended(self, life: int) -> Health:
        """Its process is gone, or must go."""
        return replace(self, state=State.DEAD, held=None) if self._is(life) else self

    def restart_begun(self) -> Health:
        """Raises ValueError: it is not dead."""
        if self.state is not State.DEAD:
            raise ValueError(f"only a dead actor is restarted, and this one is {self.state.value}")
        return replace(self, state=State.RESTARTING, life=self.life + 1, restarts=self.restarts + 1)

    def restart_done(self, life: int) -> Health:
        if self.state is not State.RESTARTING or life != self.life:
            return self
        return replace(self, state=State.STALE if self.holds_weights else State.HEALTHY)

    def restart_failed(self, life: int) -> Health:
        if self.state is not State.RESTARTING or life != self.life:
            return self
        return replace(self, state=State.DEAD)

    def weights_wanted(self, version: WeightVersion) -> Health:
        """There are new weights: who is not given them too has missed an update."""
        if not self.holds_weights or version == self.wanted:
            return self
        moved = replace(self, wanted=version)
        return replace(moved, state=State.STALE) if self.state is State.HEALTHY else moved

    def weights_given(self, version: WeightVersion, life: int) -> Health:
        """It has said that it holds them."""
        if not self.holds_weights or not self._is(life):
            return self
        given = replace(self, held=version)
        return given if self.state is State.SUSPECT else replace(given, state=given._rested())

    def step_done(self) -> Health:
        """Restarts of one that is back at work are counted anew."""
        return replace(self, restarts=0) if self.alive else self

    def _is(self, life: int) -> bool:
        """Whether what is said of this life is said of the present one."""
        return self.alive and life == self.life

    def _rested(self) -> State:
        """The state of one that is alive and answers."""
        given = self.held is not None or self.life == 0
        current = not self.holds_weights or (given and self.held == self.wanted)
        return State.HEALTHY if current else State.STALE
