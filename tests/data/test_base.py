from __future__ import annotations

import pytest

from rlsys.data.base import LazyRows, user_row


def rows(count: int) -> LazyRows:
    return LazyRows(count, lambda place: user_row(str(place), f"question {place}", {"answer": place}, f"f:{place}"))


def test_lazy_rows_are_a_sequence():
    lazy, eager = rows(5), list(rows(5))
    assert lazy[-1] == eager[-1]
    assert lazy[1:4:2] == eager[1:4:2]
    assert list(reversed(lazy)) == eager[::-1]
    assert [row.task["answer"] for row in lazy] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        lazy[5]


def test_a_row_is_made_only_when_it_is_asked_for():
    made: list[int] = []

    def make(place: int):
        made.append(place)
        return user_row(str(place), "?", {}, "")

    lazy = LazyRows(10**9, make)
    assert len(lazy) == 10**9
    assert lazy[10**9 - 1].row_id == "999999999"
    assert made == [10**9 - 1]
