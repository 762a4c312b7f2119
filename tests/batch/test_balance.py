"""Prompt groups over ranks, rows over micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch.balance import balanced_partitions, micro_batches, packed_batches, padding_share
from rlsys.config.errors import UserError

LENGTHS = st.lists(st.integers(0, 40), max_size=40)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_every_group_goes_to_one_part_and_parts_are_even(tokens: list[int], parts: int) -> None:
    result = balanced_partitions(tokens, parts)
    assert len(result) == parts
    assert sorted(group for part in result for group in part) == list(range(len(tokens)))
    assert all(part == sorted(part) for part in result)
    loads = [sum(tokens[group] for group in part) for part in result]
    assert max(loads) - min(loads) <= max(tokens, default=0)
    assert result == balanced_partitions(tokens, parts)


def test_equal_groups_come_in_equal_numbers() -> None:
    assert sorted(len(part) for part in balanced_partitions([7] * 12, 4)) == [3, 3, 3, 3]


def test_many_groups_are_balanced_to_the_token() -> None:
    tokens = [100 + 37 * index % 211 for index in range(64)]
    loads = [sum(tokens[group] for group in part) for part in balanced_partitions(tokens, 8)]
    assert max(loads) - min(loads) <= 2


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 parts"):
        balanced_partitions([1], 0)


@given(LENGTHS, st.integers(40, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) * max(lengths[row] for row in rows) <= budget for rows in batches)
    assert all(rows and rows == sorted(rows) for rows in batches)
    assert batches == micro_batches(lengths, budget)


@given(LENGTHS, st.integers(40, 200))
def test_similar_lengths_come_together_the_longest_first(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    for longer, shorter in pairwise(batches):
        assert min(lengths[row] for row in longer) >= max(lengths[row] for row in shorter)


def _runs(count: int) -> list[list[int]]:
    """Every way to cut ``count`` rows into runs, as sizes."""
    if count == 0:
        return [[]]
    return [[size, *rest] for size in range(1, count + 1) for rest in _runs(count - size)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(9, 30))
def test_no_other_cut_is_fewer_or_pads_less(lengths: list[int], budget: int) -> None:
    ordered = sorted(lengths, reverse=True)
    best = (len(ordered) + 1, 0)
    for sizes in _runs(len(ordered)):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        padded = [size * ordered[start] for size, start in zip(sizes, starts, strict=True)]
        if max(padded) <= budget:
            best = min(best, (len(sizes), sum(padded)))
    batches = micro_batches(lengths, budget)
    assert (len(batches), sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)) == best


def test_a_row_over_the_budget_names_the_key() -> None:
    with pytest.raises(UserError) as error:
        micro_batches([3, 9, 4], 8)
    assert error.value.where == "trainer.micro_batch_tokens"
    assert "row 1" in error.value.what
    assert "9 or more" in str(error.value.fix)


@given(LENGTHS, st.integers(40, 200), st.integers(1, 6))
def test_packed_rows_come_once_within_the_budget_in_even_micro_batches(
    tokens: list[int], budget: int, parts: int
) -> None:
    batches = packed_batches(tokens, budget, parts)
    sizes = [sum(tokens[row] for row in rows) for rows in batches]
    assert sorted(row for rows in batches for row in rows) == list(range(len(tokens)))
    assert all(rows and rows == sorted(rows) for rows in batches)
    assert all(size <= budget for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes, default=0) <= sum(tokens) / max(len(batches), 1) + max(tokens, default=0)
    if max(tokens, default=0) <= budget / 2:  # then at least half of what was paid for is used
        assert len(packed_batches(tokens, budget)) <= max(-(-2 * sum(tokens) // budget), 1)


def test_packed_rows_of_a_rank_with_less_are_divided_over_as_many_micro_batches() -> None:
    assert [len(rows) for rows in packed_batches([10] * 8, 1000, 4)] == [2, 2, 2, 2]
    assert packed_batches([], 10, 4) == []


def test_a_packed_row_over_the_budget_names_the_key() -> None:
    with pytest.raises(UserError, match="row 1 has 9 tokens") as error:
        packed_batches([3, 9, 4], 8)
    assert error.value.where == "trainer.micro_batch_tokens"


def test_padding_share() -> None:
    assert padding_share([4, 2, 1], [[0, 1], [2]]) == pytest.approx(2 / 9)
    assert padding_share([], []) == 0.0
    assert padding_share([3, 3], [[0, 1]]) == 0.0
