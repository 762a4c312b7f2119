"""How far a run is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Progress:
    """Counts this session's steps by the clock, so that evaluations and checkpoints between steps are in the estimate.

    Args:
        steps: of the whole run.
        first_step: done before this session.
    """

    def __init__(self, steps: int, first_step: int = 0):
        self.steps, self.step = steps, first_step
        self._start = time.monotonic()
        self._first_at: float | None = None
        self._first_step = first_step

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes note of one line of metrics. The clock starts at the first: what comes before it is start-up."""
        self.step = int(metrics["step"])
        if self._first_at is None:
            self._first_at, self._first_step = time.monotonic(), self.step

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def left_s(self) -> float | None:
        """Seconds to the last step at the pace so far; None: no step was timed yet."""
        timed = self.step - self._first_step
        if self._first_at is None or timed <= 0:
            return None
        return (time.monotonic() - self._first_at) / timed * (self.steps - self.step)
