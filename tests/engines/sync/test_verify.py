"""A sampler that does not hold what it was sent stops the run."""

from __future__ import annotations

import pytest

from rlsys.engines.sync.verify import SyncError, check_sync


@pytest.mark.parametrize("before", [("x", "x"), ("x", None), (None, None), ("y", "y"), ("x", "y")])
def test_agreement_is_enough(before: tuple[str | None, str | None]) -> None:
    check_sync(sender_before=before[0], sender_after="x", sampler_before=before[1], sampler_after="x")


def test_a_sampler_that_did_not_change_while_the_sender_did_is_named() -> None:
    with pytest.raises(SyncError, match="those of rollout-1 did not"):
        check_sync(
            sender_before="old", sender_after="new", sampler_before="old", sampler_after="old", sampler="rollout-1"
        )


@pytest.mark.parametrize(("before", "after"), [("old", "garbled"), (None, "garbled"), (None, "old")])
def test_a_sampler_that_holds_something_else_is_an_error(before: str | None, after: str) -> None:
    with pytest.raises(SyncError, match="other weights than were sent"):
        check_sync(sender_before="old", sender_after="new", sampler_before=before, sampler_after=after)
