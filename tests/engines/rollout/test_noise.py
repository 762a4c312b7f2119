"""The noise of a row is standard Gumbel and its own."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.rollout.noise import gumbel_noise

SEEDS = st.integers(0, 2**63 - 1)


@given(seeds=st.lists(SEEDS, min_size=1, max_size=6), position=st.integers(0, 10_000))
def test_a_row_does_not_depend_on_its_batch(seeds: list[int], position: int) -> None:
    batch = gumbel_noise(torch.tensor(seeds), torch.full((len(seeds),), position), 50)
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(row, gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 50)[0])


@given(seed=SEEDS, position=st.integers(0, 1000))
def test_neighbours_share_nothing(seed: int, position: int) -> None:
    here = gumbel_noise(torch.tensor([seed, seed, seed ^ 1]), torch.tensor([position, position + 1, position]), 2000)
    correlation = torch.corrcoef(here) - torch.eye(3)
    assert correlation.abs().max() < 0.15


def test_its_distribution_is_gumbel() -> None:
    noise = gumbel_noise(torch.arange(1000), torch.arange(1000) % 7, 1000).double().flatten()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772156649) < 0.005
    assert abs(noise.std() - math.pi / 6**0.5) < 0.005
    # Kolmogorov–Smirnov distance to exp(-exp(-x)); 1.63 / sqrt(n) is the 1 % level
    cdf = (-(-noise.sort().values).exp()).exp()
    steps = torch.arange(1, len(cdf) + 1) / len(cdf)
    assert (cdf - steps).abs().max() < 1.63 / len(cdf) ** 0.5
