"""Old objects are left alone while a run trains, and collected as ever afterwards."""

from __future__ import annotations

import gc

from rlsys.controller.heap import settled_heap


def test_what_was_alive_is_not_looked_at_inside_and_is_again_afterwards() -> None:
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    with settled_heap():
        assert gc.get_freeze_count() > len(kept)
        assert not any(found is kept for found in gc.get_objects())
        new: list[object] = [kept]
        assert any(found is new for found in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(found is kept for found in gc.get_objects())
