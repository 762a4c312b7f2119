"""The noise of a row is standard exponential and its own; what is drawn with it follows the distribution."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.rollout.noise import exponential_noise, sample_tokens

SEEDS = st.integers(0, 2**63 - 1)


@given(seeds=st.lists(SEEDS, min_size=1, max_size=6), position=st.integers(0, 10_000))
def test_a_row_does_not_depend_on_its_batch(seeds: list[int], position: int) -> None:
    batch = exponential_noise(torch.tensor(seeds), torch.full((len(seeds),), position), 50)
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(row, exponential_noise(torch.tensor([seed]), torch.tensor([position]), 50)[0])


@given(seed=SEEDS, position=st.integers(0, 1000))
def test_neighbours_share_nothing(seed: int, position: int) -> None:
    seeds, positions = [seed, seed, seed ^ 1, seed ^ (1 << 40)], [position, position + 1, position, position]
    here = exponential_noise(torch.tensor(seeds), torch.tensor(positions), 2000).log()
    correlation = torch.corrcoef(here) - torch.eye(4)
    assert correlation.abs().max() < 0.15


def test_its_distribution_is_exponential() -> None:
    noise = exponential_noise(torch.arange(1000), torch.arange(1000) % 7, 1000).double().flatten()
    finite = noise[torch.isfinite(noise)]
    assert len(noise) - len(finite) < 10
    assert (noise > 0).all()
    assert abs(finite.mean() - 1) < 0.005
    assert abs(finite.std() - 1) < 0.005
    # Kolmogorov–Smirnov distance to 1 - exp(-x); 1.63 / sqrt(n) is the 1 % level
    cdf = -torch.expm1(-noise.sort().values)
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    assert (cdf - steps).abs().max() < 1.63 / len(cdf) ** 0.5


def test_its_small_values_are_not_cut_off() -> None:
    """They decide who wins: log-probabilities of -16 must be drawn as often as they should."""
    noise = exponential_noise(torch.arange(400), torch.zeros(400, dtype=torch.int64), 1 << 17).flatten()
    for exponent in (10, 16, 20):
        expected = len(noise) * 2.0**-exponent
        found = int((noise < 2.0**-exponent).sum())
        assert abs(found - expected) < 5 * expected**0.5


def test_tokens_follow_the_tempered_distribution_wherever_the_row_stands() -> None:
    n, temperature = 200_000, 0.7
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -6.0])
    seeds = torch.arange(n) * 7919
    rows, warm = logits.expand(n, -1), torch.full((n,), temperature)
    tokens, logprobs = sample_tokens(rows, warm, seeds, torch.full((n,), 3))
    p = (logits / temperature).softmax(-1)
    expected, counts = p * n, torch.bincount(tokens, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5
    torch.testing.assert_close(logprobs, p.log()[tokens], atol=1e-6, rtol=0)


def test_greedy_rows_take_the_likeliest() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    greedy = torch.tensor([True, False] * 3)
    tokens, logprobs = sample_tokens(
        logits, torch.ones(6), torch.arange(6), torch.zeros(6, dtype=torch.int64), greedy=greedy
    )
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
