"""What the actors of a run have measured since they were last asked."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.tracking.throughput import ActorReading
from rlsys.workers.actors import Group
from rlsys.workers.groups import TrainerGroup
from rlsys.workers.waits import gather

_SECONDS = 10.0  # between two steps nobody should be waited for longer
_AT_ONCE = 64


def read_meters(groups: Sequence[Group], step: int, *, everybody: bool) -> list[ActorReading]:
    """Asks those whose turn it is.

    Args:
        everybody: not some of a large fleet in turn.

    Raises:
        ActorFailed, DeadlineExceeded: one of them did not answer.
    """
    asked = [(group, None if everybody else _in_turn(group, step)) for group in groups]
    calls = [call for group, actors in asked for call in group.asks("take_reading", actors=actors)]
    readings = gather(calls, phase="readings", seconds=_SECONDS)
    return [ActorReading(*_role_and_index(call.payload), found) for call, found in zip(calls, readings, strict=True)]


def _in_turn(group: Group, step: int) -> list[int] | None:
    """Indices; None: all. Of a large fleet some, or reading would cost more than sampling does; of trainers all, whose
    FLOPs add up."""
    if len(group) <= _AT_ONCE or isinstance(group, TrainerGroup):
        return None
    indices = list(group.specs())  # some may have left
    return [indices[(step * _AT_ONCE + i) % len(indices)] for i in range(_AT_ONCE)]


def _role_and_index(name: str) -> tuple[str, int]:
    role, _, index = name.rpartition("_")
    return role, int(index)
