"""Estimates agree with exact enumeration, keep their bounds, and cover the truth as often as they say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.evals import estimates


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int):
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    assert estimates.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.35, 0.8])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_unbiased(p: float, k: int):
    n = 8
    binomial = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(weight * estimates.pass_at_k(n, c, k) for c, weight in enumerate(binomial))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_holds_for_large_n():
    assert estimates.pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=r"n=4"):
        estimates.pass_at_k(n, c, k)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_grows_with_k_and_starts_at_the_mean(case: tuple[int, int]):
    n, c = case
    curve = [estimates.pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(c / n)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(curve))
    assert curve[-1] == pytest.approx(float(c > 0))


def test_wilson_known_values():
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    for right, trials, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        estimate = estimates.wilson(right / trials, trials)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_accuracy_is_the_mean_inside_its_interval(correct: list[bool]):
    estimate = estimates.accuracy(correct)
    assert estimate.mean == pytest.approx(np.mean(correct))
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1
    assert estimate.low < estimate.high


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 6))
def test_sampled_figures_average_problems(counts: list[int], k: int):
    correct = np.array([[1] * c + [0] * (6 - c) for c in counts])
    metrics = estimates.sampled_metrics(correct, k)
    assert metrics["eval/avg@6"] == pytest.approx(np.mean(counts) / 6)
    assert metrics[f"eval/pass@{k}"] == pytest.approx(np.mean([estimates.pass_at_k(6, c, k) for c in counts]))
    for name in ("eval/avg@6", f"eval/pass@{k}"):
        assert 0 <= metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] <= 1


@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0])
def test_interval_covers_the_truth(spread: float):
    """Responses of one problem from independent (spread 0) to identical (spread 10)."""
    rng = np.random.default_rng(0)
    problems, n, runs = 60, 8, 400
    if spread < 1:
        chance = np.clip(0.6 + spread * rng.standard_normal((200_000, 1)), 0, 1)
    else:
        chance = (rng.random((200_000, 1)) < 0.6).astype(float)
    hits = 0
    for _ in range(runs):
        drawn = chance[rng.integers(len(chance), size=problems)]
        estimate = estimates.avg_at_n(rng.random((problems, n)) < drawn)
        hits += estimate.low <= chance.mean() <= estimate.high
    assert 0.91 <= hits / runs <= 0.99


def test_more_problems_narrow_the_interval():
    widths = [(e := estimates.accuracy([1, 0] * half)).high - e.low for half in (5, 50, 500)]
    assert widths == sorted(widths, reverse=True)


@settings(max_examples=20)
@given(st.integers(1, 40))
def test_problems_all_right_do_not_claim_certainty(problems: int):
    estimate = estimates.avg_at_n(np.ones((problems, 4)))
    assert estimate.mean == estimate.high == 1.0
    assert estimate.low < 1.0


@pytest.mark.parametrize("bad", [[], [[1, 0]], [0.5, 1.5], [float("nan")]])
def test_malformed_outcomes_are_refused(bad: list):
    with pytest.raises(ValueError, match="problem"):
        estimates.accuracy(bad)
