"""What a run does about a loss: trainers are replaced while all others go on; a job that lost a host starts again with
the hosts that remain. Both from the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsys.cluster.processes import actor_table
from rlsys.controller.profile import Profile

if TYPE_CHECKING:
    from rlsys.controller.job import Groups

RESTARTS = 2
"""How often a run starts again for lost hosts without having finished a step in between: whatever ends it then is no
accident."""
_NOTICE_S = 5.0  # within which Ray knows of a process that died on a live host
_POLL_S = 0.1


@dataclass(frozen=True)
class Ending:
    """How a job ended. status: exit code; reason: in words; lost: hosts that left the cluster meanwhile; trainers:
    trainer and critic ranks that were lost; step: the last whole one."""

    status: int
    reason: str = ""
    lost: Sequence[str] = ()
    step: int = 0
    profile: Profile | None = None
    trainers: Sequence[str] = ()


class Restarts:
    """Counts restarts of one run. first: the step that it begins at; most: how many without a step in between."""

    def __init__(self, first: int, most: int = RESTARTS):
        self._step, self._most, self._left = first, most, most

    @property
    def used(self) -> int:
        """Since the last step that was new."""
        return self._most - max(self._left, 0)

    def allow(self, step: int) -> bool:
        """Whether to start again after a loss, with this the last whole step."""
        if step > self._step:
            self._step, self._left = step, self._most
        self._left -= 1
        return self._left >= 0


def lost_trainers(groups: Groups) -> list[str]:
    """Ranks of trainer and critic that are gone, as soon as Ray knows of one; empty: it knows of none."""
    handles = dict(groups.trainer.handles()) | (groups.critic.handles() if groups.critic is not None else {})
    deadline = time.monotonic() + _NOTICE_S
    while True:
        gone = _dead(actor_table(handles))
        if gone or time.monotonic() >= deadline:
            return gone
        time.sleep(_POLL_S)


def _dead(table: Mapping[str, Mapping[str, object]]) -> list[str]:
    return sorted(name.replace("_", " ") for name, entry in table.items() if entry["State"] == "DEAD")
