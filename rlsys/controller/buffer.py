"""Prompt groups between being handed out and being trained on: a state machine, without Ray and without a clock.

    hand_out → IN_FLIGHT → ready → READY → take → TAKEN → trained
                  ↑  reissue  |       |
                  +-----------+-------+          drop: filtered, or failed for good

The bound on staleness is kept by admission first. At most ``(max_staleness + 1) · groups_per_step`` groups are anywhere
between hand-out and training; so many fewer as the samplers' weights are steps behind the trainer's. So one that is
handed out while samplers have the weights of step v has fewer than that many before it, and in turn is trained at step
v + max_staleness at the latest. Groups that end out of turn can be late; those are found by :meth:`expired`, and what
is too old is never taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice

PATIENCE = 2
"""So often a group is handed out again because it was too late; then a step waits for it."""


class State(Enum):
    IN_FLIGHT = "in flight"
    READY = "ready"
    TAKEN = "taken"


@dataclass
class Group:
    """One prompt group. attempt: 0 at first; version: step of the weights that samplers had when this attempt was
    handed out; late: how often it was too late; turn: in which order groups were first handed out."""

    attempt: int
    version: int
    turn: int
    late: int = 0
    state: State = State.IN_FLIGHT


class GroupBuffer:
    """Who may be handed out, taken, or is too late.

    Args:
        groups_per_step: B, groups that one training step takes.
        max_staleness: most steps between the weights that are trained and those that a group was handed out under.
        ordered: groups are taken in the order in which they were handed out, ready or not; False: the oldest of those
            that are ready.
    """

    def __init__(self, groups_per_step: int, max_staleness: int, *, ordered: bool = False):
        self.version = 0  # of the samplers' weights
        self.step = 0  # of the trainer's
        self._per_step, self._bound, self._ordered = groups_per_step, max_staleness, ordered
        self._groups: dict[str, Group] = {}  # by turn: who is handed out again keeps its place
        self._counts: Counter[State] = Counter()
        self._turns = 0

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, key: str) -> Group:
        return self._groups[key]

    def within(self, *states: State) -> list[str]:
        """Groups in these states (none given: in any), first handed out first."""
        return [key for key, group in self._groups.items() if not states or group.state in states]

    def count(self, state: State) -> int:
        """How many groups are in this state, without a look at each."""
        return self._counts[state]

    @property
    def room(self) -> int:
        """How many more groups may be handed out now."""
        behind = max(0, self.step - self.version)
        return max(0, (self._bound + 1 - behind) * self._per_step - len(self._groups))

    def hand_out(self, key: str, *, attempt: int = 0) -> Group:
        """A new group, sampled by the present weights or later ones."""
        if key in self._groups:
            raise ValueError(f"group {key!r} is handed out already")
        if not self.room:
            raise ValueError("no room for another group")
        self._groups[key] = Group(attempt, self.version, self._turns)
        self._counts[State.IN_FLIGHT] += 1
        self._turns += 1
        return self._groups[key]

    def is_expected(self, key: str, attempt: int) -> bool:
        """Whether an answer to this attempt is still wanted."""
        group = self._groups.get(key)
        return group is not None and group.attempt == attempt and group.state is State.IN_FLIGHT

    def ready(self, key: str) -> None:
        """The group is sampled and scored."""
        self._move(self._in(key, State.IN_FLIGHT), State.READY)

    def drop(self, key: str) -> None:
        """The group will not be trained on."""
        self._leave(key, State.IN_FLIGHT, State.READY)

    def reissue(self, key: str) -> Group:
        """The group is sampled anew, from the present weights. It keeps its turn."""
        group = self._in(key, State.IN_FLIGHT, State.READY)
        group.attempt, group.version = group.attempt + 1, self.version
        self._move(group, State.IN_FLIGHT)
        return group

    def expired(self, step: int) -> list[str]:
        """Groups that can no longer be trained when the trainer has the weights of ``step``: to be reissued or dropped.
        Each call counts for their patience."""
        late = [k for k, g in self._groups.items() if g.state is not State.TAKEN and g.version < step - self._bound]
        for key in late:
            self._groups[key].late += 1
        return late

    def take(self, step: int, count: int | None = None) -> list[str] | None:
        """The groups of the next step; None: not yet.

        Args:
            step: of the trainer's weights. count: how many; None: those of a whole step.
        """
        count = self._per_step if count is None else count
        if not count or self._counts[State.READY] < count:
            return None
        chosen = self._first(step, count) if self._ordered else self._oldest(step, count)
        if chosen is None:
            return None
        for key in chosen:
            self._move(self._groups[key], State.TAKEN)
        return chosen

    def trained(self, key: str) -> None:
        """The group has been trained on."""
        self._leave(key, State.TAKEN)

    def _fit(self, step: int) -> Iterator[str]:
        """Groups that may be trained at ``step``, by turn."""
        for key, group in self._groups.items():
            if group.state is not State.TAKEN and group.version >= step - self._bound:
                yield key

    def _first(self, step: int, count: int) -> list[str] | None:
        chosen = list(islice(self._fit(step), count))
        ready = all(self._groups[key].state is State.READY for key in chosen)
        return chosen if ready and len(chosen) == count else None

    def _oldest(self, step: int, count: int) -> list[str] | None:
        """Those of the oldest weights; but whoever was late too often and has its last chance now is waited for."""
        fit = list(self._fit(step))
        last = [key for key in fit if self._has_last_chance(self._groups[key], step)][:count]
        if any(self._groups[key].state is not State.READY for key in last):
            return None
        others = set(fit).difference(last)
        ready = [key for key in fit if key in others and self._groups[key].state is State.READY]
        ready.sort(key=lambda key: self._groups[key].version)  # stable: by turn where that is the same
        chosen = [*last, *ready][:count]
        return sorted(chosen, key=lambda key: self._groups[key].turn) if len(chosen) == count else None

    def _has_last_chance(self, group: Group, step: int) -> bool:
        return group.late >= PATIENCE and group.version == step - self._bound

    def _move(self, group: Group, state: State) -> None:
        self._counts[group.state] -= 1
        self._counts[state] += 1
        group.state = state

    def _leave(self, key: str, *states: State) -> None:
        self._counts[self._in(key, *states).state] -= 1
        del self._groups[key]

    def _in(self, key: str, *states: State) -> Group:
        group = self._groups[key]
        if group.state not in states:
            raise ValueError(f"group {key!r} is {group.state.value}")
        return group
