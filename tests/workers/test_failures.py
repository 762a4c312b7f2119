"""What kind of failure an error is, as the waits report it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayTaskError

from rlsys.config.errors import UserError
from rlsys.engines.sync.verify import SyncError
from rlsys.rewards.budget import RewardBudgetExceeded
from rlsys.workers.failures import backoff_s, kind_of
from rlsys.workers.waits import ActorFailed, ActorLost, DeadlineExceeded


def raised_by_an_actor(cause: Exception) -> RayTaskError:
    return RayTaskError("score", "a traceback", cause)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ActorLost("rollout worker 0 died"), "infrastructure"),
        (DeadlineExceeded("no answer within 5 s"), "infrastructure"),
        (ActorDiedError(), "infrastructure"),
        (ObjectLostError("00", None, ""), "infrastructure"),
        (GetTimeoutError("late"), "infrastructure"),
        (raised_by_an_actor(ObjectLostError("00", None, "")), "infrastructure"),
        (UserError("the row is bad", where="rows:3", fix="mend it"), "data"),
        (RewardBudgetExceeded("2 of 4 failed", where="reward", fix="mend it"), "data"),
        (raised_by_an_actor(UserError("the row is bad", where="rows:3", fix="mend it")), "data"),
        (ActorFailed("trainer worker 0 failed in phase 'train'"), "bug"),
        (SyncError("the sampler holds other weights"), "bug"),
        (raised_by_an_actor(ZeroDivisionError()), "bug"),
        (KeyError("rewards"), "bug"),
    ],
)
def test_the_kind_decides_what_follows(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


@given(attempt=st.integers(1, 1000))
def test_the_first_attempt_is_at_once_and_later_ones_wait_longer_within_bounds(attempt: int) -> None:
    assert backoff_s(1) == 0
    assert backoff_s(attempt) <= backoff_s(attempt + 1) <= 30
