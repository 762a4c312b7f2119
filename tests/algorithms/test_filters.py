"""Group filters: what they keep, what is counted, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.filters import GROUP_FILTERS, check_filters, kept
from rlsys.config.errors import UserError

batches = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 0.5, 1.0])), max_size=30)


@given(batches)
def test_zero_variance_keeps_exactly_the_groups_with_two_different_rewards(batch: list[tuple[int, float]]) -> None:
    uids = [str(group) for group, _ in batch]
    keep, counts = kept({"zero_variance": {}}, torch.tensor([reward for _, reward in batch]), uids)
    expected = [len({reward for other, reward in batch if str(other) == uid}) > 1 for uid in dict.fromkeys(uids)]
    assert keep.tolist() == expected
    assert counts == {"zero_variance": expected.count(False)}


@given(batches, st.randoms())
def test_the_order_of_rows_does_not_matter(batch: list[tuple[int, float]], random: object) -> None:
    filters = {"zero_variance": {"eps": 0.2}, "difficulty": {"low": 0.05, "high": 0.75}}

    def survivors(rows: list[tuple[int, float]]) -> set[int]:
        order = list(dict.fromkeys(group for group, _ in rows))
        keep, _ = kept(filters, torch.tensor([reward for _, reward in rows]), [str(group) for group, _ in rows])
        return {group for group, passed in zip(order, keep.tolist(), strict=True) if passed}

    shuffled = list(batch)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert survivors(shuffled) == survivors(batch)


def test_the_bounds_of_difficulty_are_outside() -> None:
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    uids = ["impossible", "impossible", "even", "even", "trivial", "trivial"]
    assert kept({"difficulty": {}}, rewards, uids)[0].tolist() == [False, True, False]
    assert kept({"difficulty": {"low": None}}, rewards, uids)[0].tolist() == [True, True, False]
    assert kept({"difficulty": {"high": None}}, rewards, uids)[0].tolist() == [False, True, True]
    assert kept({"difficulty": {"low": 0.5}}, rewards, uids)[0].tolist() == [False, False, False]


def test_each_dropped_group_is_counted_once() -> None:
    rewards = torch.tensor([0.0, 0.0, 0.2, 0.0, 1.0, 0.0])
    keep, counts = kept({"zero_variance": {}, "difficulty": {"low": 0.2}}, rewards, ["a", "a", "b", "b", "c", "c"])
    assert keep.tolist() == [False, False, True]
    assert counts == {"zero_variance": 1, "difficulty": 1}


def test_without_filters_or_rows_nothing_is_dropped() -> None:
    keep, counts = kept({}, torch.tensor([1.0, 1.0]), ["a", "b"])
    assert keep.tolist() == [True, True]
    assert counts == {}
    keep, counts = kept({"zero_variance": {}, "difficulty": {}}, torch.empty(0), [])
    assert keep.shape == (0,)
    assert counts == {"zero_variance": 0, "difficulty": 0}


@pytest.mark.parametrize(
    ("filters", "samples", "where"),
    [
        ({"zero_varianse": {}}, 8, "algorithm.filters.zero_varianse"),
        ({"zero_variance": {"epsilon": 0.1}}, 8, "algorithm.filters.zero_variance.epsilon"),
        ({"zero_variance": {"eps": -0.1}}, 8, "algorithm.filters.zero_variance.eps"),
        ({"zero_variance": {}}, 1, "algorithm.filters.zero_variance"),
        ({"difficulty": {}}, 1, "algorithm.filters.difficulty"),
        ({"difficulty": {"low": 0.5, "high": 0.5}}, 8, "algorithm.filters.difficulty"),
        ({"difficulty": {"low": None, "high": None}}, 8, "algorithm.filters.difficulty"),
    ],
)
def test_bad_filters_are_refused_where_they_stand(filters: dict, samples: int, where: str) -> None:
    with pytest.raises(UserError) as error:
        check_filters(filters, samples)
    assert error.value.where == where


def test_every_filter_passes_its_defaults() -> None:
    assert {"difficulty", "zero_variance"} <= set(GROUP_FILTERS.names())
    check_filters({name: {} for name in GROUP_FILTERS.names()}, 8)


def per_sample(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return rewards > 0


def test_a_filter_of_ones_own_must_judge_groups() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) for 1 groups"):
        kept({f"{__name__}:per_sample": {}}, torch.tensor([0.0, 1.0, 2.0]), ["a"] * 3)


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1\]"):
        kept({}, torch.tensor([0.0, float("nan")]), ["a", "a"])
    with pytest.raises(ValueError, match=r"2 samples have rewards of shape \(3,\)"):
        kept({}, torch.ones(3), ["a", "a"])
