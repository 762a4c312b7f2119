"""What kind of failure an error is, and how long to wait before trying again."""

from __future__ import annotations

from typing import Literal

from ray.exceptions import RayError, RayTaskError

from rlsys.config.errors import UserError
from rlsys.engines.sync.verify import SyncError
from rlsys.rewards.budget import RewardBudgetExceeded
from rlsys.workers.waits import ActorLost, DeadlineExceeded

Kind = Literal["infrastructure", "data", "bug"]

_INFRASTRUCTURE = (ActorLost, DeadlineExceeded, RayError)
_LONGEST_S = 30.0


def kind_of(error: BaseException) -> Kind:
    """Who is to blame, which decides what follows.

    - ``infrastructure``: a process, host, object or answer is gone or late. Doing it again, elsewhere or later, may
      work: it is retried, a bounded number of times.
    - ``data``: a row, a reward or a setting. It would fail again: recorded, and bounded by a budget.
    - ``bug``: whatever else was raised. It would fail again, and nobody knows what it left behind: the run stops.
    """
    if isinstance(error, UserError | RewardBudgetExceeded):
        return "data"
    if isinstance(error, SyncError):
        return "bug"
    if isinstance(error, RayTaskError):
        return kind_of(error.cause) if isinstance(error.cause, Exception) else "bug"
    return "infrastructure" if isinstance(error, _INFRASTRUCTURE) else "bug"


def backoff_s(attempt: int) -> float:
    """Seconds to wait before attempt 1, 2, …: none before the first, then twice as long each time."""
    return 0.0 if attempt <= 1 else min(2.0 ** (attempt - 2), _LONGEST_S)
