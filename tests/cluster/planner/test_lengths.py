"""Lengths of responses, and what is under way at each moment."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.cluster.planner.lengths import decoding, response_lengths


@pytest.mark.parametrize(("mean", "limit"), [(32, 128), (8, 64), (500, 4096), (200, 256)])
def test_quantiles_have_the_mean_and_the_tail(mean: float, limit: int) -> None:
    lengths = response_lengths(2048, mean, limit)
    assert statistics.mean(lengths) == pytest.approx(mean, rel=0.05)
    assert max(lengths) > 2 * mean or max(lengths) == limit
    assert lengths == sorted(lengths)
    assert all(1 <= length <= limit for length in lengths)


def test_a_mean_at_the_limit_is_no_tail() -> None:
    assert response_lengths(5, 64, 64) == [64] * 5
    assert response_lengths(5, 1, 64) == [1] * 5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 20))
def test_every_token_is_decoded_once_by_as_few_rows_as_there_is_room_for(
    lengths: list[int], slots: int, prompt: int
) -> None:
    found = decoding(lengths, slots, prompt)
    assert sum(s.steps * s.rows for s in found) == sum(lengths)
    assert max(s.rows for s in found) == min(slots, len(lengths))
    assert sum(s.steps for s in found) >= max(max(lengths), -(-sum(lengths) // slots))
    behind = sum(s.steps * s.context for s in found)
    assert behind == pytest.approx(sum(length * prompt + length * length / 2 for length in lengths))


def test_with_room_for_all_the_longest_decides() -> None:
    lengths = response_lengths(64, 32, 128)
    assert sum(s.steps for s in decoding(lengths, 64, 10)) == max(lengths)
