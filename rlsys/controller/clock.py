"""What of a run goes by the clock on the wall: checkpoints at an interval, and the end before a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlsys.workers.waits import StopRequested

ENDING_S = 10.0
"""Kept free before the limit beside the time of a checkpoint: actors and Ray end, summary and picture are written."""
_CARE = 1.5  # times the longest checkpoint so far: the last one may have to wait for an update to end


class TimeIsUp(StopRequested):
    """The time limit leaves no room for another step."""


class RunClock:
    """Measures steps and checkpoints, and says what there is time for.

    Args:
        limit_s: the run is to have ended so long after ``began``; None: it may take as long as it takes.
        every_s: at least one checkpoint in so many seconds, at the next end of a step; None: by steps alone.
        began: Unix time from which the limit counts.
        now: Unix seconds.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        every_s: float | None = None,
        *,
        began: float | None = None,
        now: Callable[[], float] = time.time,
    ):
        self._limit_s, self._every_s, self._now = limit_s, every_s, now
        self._began = now() if began is None else began
        self._step_began: float | None = None
        self._saved = now()
        self._longest_step = self._longest_checkpoint = 0.0
        self.up = False
        """Whether the limit has ended the run."""

    def step_begins(self) -> None:
        """Raises TimeIsUp where a step as long as the longest so far, and a checkpoint, would not end in time."""
        now = self._now()
        if self._step_began is not None:  # with its evaluation and checkpoint
            self._longest_step = max(self._longest_step, now - self._step_began)
        self._step_began = now
        if self._left() < self._longest_step:
            self.up = True
            raise TimeIsUp

    def job_begins(self) -> None:
        """What lies between a job that broke off and the next one is no step."""
        self._step_began = None

    def over(self) -> bool:
        """Whether a step under way has to be given up, so that the last checkpoint is still written in time."""
        self.up = self.up or self._left() < 0
        return self.up

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        began = self._now()
        yield
        self._saved = self._now()
        self._longest_checkpoint = max(self._longest_checkpoint, self._saved - began)

    def checkpoint_due(self) -> bool:
        return self._every_s is not None and self._now() - self._saved >= self._every_s

    def _left(self) -> float:
        """Seconds until the run has to begin to end."""
        if self._limit_s is None:
            return float("inf")
        return self._began + self._limit_s - self._now() - _CARE * self._longest_checkpoint - ENDING_S
