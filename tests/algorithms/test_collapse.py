"""How far values are spread, and how much of a response repeats itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms import collapse
from rlsys.algorithms.collapse import Spread, repetition, spread

NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)


def naive_spread(points: list[list[float]]) -> Spread:
    """Both figures in loops."""
    pairs = list(itertools.combinations(points, 2))
    variances = []
    for column in zip(*points, strict=True):
        mean = math.fsum(column) / len(column)
        variances.append(math.fsum((x - mean) ** 2 for x in column) / len(column))
    return Spread(math.fsum(variances) / len(variances), math.fsum(math.dist(a, b) for a, b in pairs) / len(pairs))


def naive_repetition(row: list[int], n: int) -> float:
    seen: set[tuple[int, ...]] = set()
    again = total = 0
    for start in range(len(row) - n + 1):
        gram = tuple(row[start : start + n])
        again, total = again + (gram in seen), total + 1
        seen.add(gram)
    return again / total if total else 0.0


def close(found: Spread, wanted: Spread) -> None:
    assert found.variance == pytest.approx(wanted.variance, rel=1e-9, abs=1e-9)
    assert found.pairwise_distance == pytest.approx(wanted.pairwise_distance, rel=1e-9, abs=1e-9)


@given(st.lists(NUMBERS, min_size=2, max_size=30))
def test_spread_of_numbers_is_the_sum_over_pairs(values: list[float]) -> None:
    points = torch.tensor(values, dtype=torch.float64)
    close(spread(points), naive_spread([[value] for value in values]))
    close(spread(points), spread(points[:, None]))


@given(
    st.integers(1, 4).flatmap(lambda d: st.lists(st.lists(NUMBERS, min_size=d, max_size=d), min_size=2, max_size=20))
)
def test_spread_of_vectors_is_the_sum_over_pairs(points: list[list[float]]) -> None:
    close(spread(torch.tensor(points, dtype=torch.float64)), naive_spread(points))


@pytest.mark.parametrize("held", [1, 7, 64, 1000])
def test_blocks_of_any_size_give_the_same_distance(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(23, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = spread(points)
    monkeypatch.setattr(collapse, "_HELD", held)
    close(spread(points), whole)


def test_no_block_holds_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, cdist = [], torch.cdist

    def measured(*args: torch.Tensor, **kwargs: str) -> torch.Tensor:
        found = cdist(*args, **kwargs)  # type: ignore[arg-type]
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch, "cdist", measured)
    spread(torch.randn(2500, 2, generator=torch.Generator().manual_seed(0)))
    assert len(sizes) > 1
    assert max(sizes) <= 2**20


@settings(max_examples=30)
@given(st.lists(NUMBERS, min_size=2, max_size=30), st.randoms())
def test_spread_sees_neither_order_nor_shift(values: list[float], random) -> None:
    shuffled = random.sample(values, len(values))
    points = torch.tensor(values, dtype=torch.float64)
    close(spread(torch.tensor(shuffled, dtype=torch.float64) + 5.0), spread(points))
    twice = spread(2 * points)
    close(Spread(twice.variance / 4, twice.pairwise_distance / 2), spread(points))


def test_float32_far_from_zero_keeps_its_figures() -> None:
    close(spread(torch.tensor([4096.0, 4096.5, 4097.0])), Spread(1 / 6, 2 / 3))


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (1, 3), (5, 0)])
def test_fewer_than_two_points_have_no_spread(shape: tuple[int, ...]) -> None:
    assert spread(torch.ones(shape)) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_a_constant_has_exactly_no_spread(shape: tuple[int, ...]) -> None:
    assert spread(torch.full(shape, 0.1)) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_a_value_that_is_not_finite_shows(bad: float, shape: tuple[int, ...]) -> None:
    points = torch.ones(shape)
    points[1] = bad
    assert all(math.isnan(figure) for figure in spread(points))


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_points_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        spread(torch.ones(shape))


@given(st.lists(st.lists(st.integers(-1, 2), max_size=14), max_size=6), st.integers(1, 5))
def test_repetition_is_that_of_each_row_alone(rows: list[list[int]], n: int) -> None:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    found = repetition(ids, torch.tensor([len(row) for row in rows], dtype=torch.int64), n)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([naive_repetition(row, n) for row in rows], abs=1e-6)


def test_long_rows_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, high, (size,), generator=generator) for high, size in ((2, 3000), (150_000, 5000), (9, 0))]
    rows.append(torch.arange(500).repeat(3) + 2**40)
    found = repetition(torch.cat(rows), torch.tensor([len(row) for row in rows]))
    assert found.tolist() == pytest.approx([naive_repetition(row.tolist(), 4) for row in rows], abs=1e-6)


@pytest.mark.parametrize(("size", "wanted"), [(0, 0.0), (3, 0.0), (4, 0.0), (5, 0.5), (103, 0.99)])
def test_one_token_over_and_over(size: int, wanted: float) -> None:
    assert repetition(torch.full((size,), 7), torch.tensor([size])).tolist() == pytest.approx([wanted])


def test_ids_and_lengths_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 3"):
        repetition(torch.arange(4), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        repetition(torch.ones(2, 2, dtype=torch.int64), torch.tensor([2]))
    with pytest.raises(ValueError, match="at least one token"):
        repetition(torch.arange(4), torch.tensor([4]), n=0)
