"""The failure budget: how much may fail, and what is said when more did."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.rewards.base import Failure
from rlsys.rewards.budget import FailureBudget, RewardBudgetExceeded, failure_rows
from rlsys.rewards.compose import ScoredSample

GOOD = ScoredSample(1.0, {"correct": 1.0}, None, {}, None)
BAD = ScoredSample(0.0, {"correct": None}, None, {}, Failure("raised", "correct", "Traceback\n  …\nKeyError: 'answer'"))


def test_rows_hold_what_is_needed_to_try_again() -> None:
    items = [("r0", {"prompt": "p0", "answer": "a0"}), ("r1", {"prompt": "p1"})]
    rows = failure_rows(items, [GOOD, BAD])
    assert json.loads(json.dumps(rows)) == [
        {
            "row": 1, "prompt": "p1", "response": "r1", "answer": None, "part": "correct", "error": "raised",
            "message": "Traceback\n  …\nKeyError: 'answer'",
        }
    ]  # fmt: skip


def test_the_error_names_rate_limit_and_first_failures() -> None:
    rows = failure_rows([("r", {})] * 5, [BAD] * 5)
    with pytest.raises(RewardBudgetExceeded) as caught:
        FailureBudget(0.1).check(rows, 20)
    error = caught.value
    assert isinstance(error, UserError)
    for words in (
        "5 of 20 samples (25.0%)",
        "10.0% may",
        "row 0, part 'correct', raised: KeyError: 'answer'",
        "and 2 more",
    ):
        assert words in error.what
    assert error.where == "reward.max_failure_rate"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 (as Ray does)
    assert (str(copy), copy.rows, type(copy)) == (str(error), rows, RewardBudgetExceeded)


@given(failures=st.integers(0, 1000), total=st.integers(0, 1000), percent=st.integers(0, 100))
def test_exactly_the_allowed_fraction_may_fail(failures: int, total: int, percent: int) -> None:
    failures = min(failures, total)
    assert FailureBudget(percent / 100).allows(failures, total) == (failures * 100 <= percent * total)
