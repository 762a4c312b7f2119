"""A job that lost a host starts again from its last checkpoint, with the hosts that remain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsys.controller.profile import Profile

RESTARTS = 2
"""How often a run starts again without having finished a step in between: whatever ends it then is no accident."""


@dataclass(frozen=True)
class Ending:
    """How a job ended. status: exit code; reason: in words; lost: hosts that left the cluster meanwhile; step: the last
    whole one."""

    status: int
    reason: str = ""
    lost: Sequence[str] = ()
    step: int = 0
    profile: Profile | None = None


class Restarts:
    """Counts restarts of one run. first: the step that it begins at."""

    def __init__(self, first: int):
        self._step, self._left = first, RESTARTS

    def allow(self, ending: Ending) -> bool:
        """Whether to start again. Only a lost host is worth it: what else ends a job would end the next one."""
        if not ending.lost:
            return False
        if ending.step > self._step:
            self._step, self._left = ending.step, RESTARTS
        self._left -= 1
        return self._left >= 0
