"""Token weights and a global normaliser against verl's agg_loss, and the mean of micro-batch means proven different."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.aggregation import Aggregation, normaliser, row_mean, row_sum, token_weights

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
HORIZON = 9


def ragged(seed: int, num_rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense losses and mask [B, L], and the same mask and rows flat; some rows are masked throughout."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, HORIZON, generator=generator) < torch.rand(num_rows, 1, generator=generator)
    mask[0] = False
    mask[1, 0] = True
    rows = torch.arange(num_rows).repeat_interleave(HORIZON)
    return torch.randn(num_rows, HORIZON, generator=generator), mask, mask.flatten(), rows


def aggregate(
    aggregation: Aggregation, losses: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, num: int
) -> torch.Tensor:
    weights = token_weights(aggregation, mask, rows, num, HORIZON)
    total = normaliser(aggregation, mask, rows, num)
    return (losses.flatten() * weights).sum() / (1.0 if total is None else total)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_matches_verl(aggregation: Aggregation, seed: int) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    losses, dense_mask, mask, rows = ragged(seed)
    theirs = core_algos.agg_loss(losses, dense_mask.float(), aggregation, loss_scale_factor=HORIZON)
    torch.testing.assert_close(aggregate(aggregation, losses, mask, rows, 7), theirs, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 1000), st.lists(st.integers(0, 7), max_size=3), st.sampled_from(AGGREGATIONS))
def test_any_cut_into_micro_batches_of_whole_rows_gives_the_same(
    seed: int, cuts: list[int], aggregation: Aggregation
) -> None:
    losses, _, mask, rows = ragged(seed)
    whole = aggregate(aggregation, losses, mask, rows, 7)
    borders = [0, *sorted(cuts), 7]
    total, loss = 0.0, torch.zeros(())
    for start, stop in itertools.pairwise(borders):
        part = (rows >= start) & (rows < stop)
        weights = token_weights(aggregation, mask[part], rows[part] - start, stop - start, HORIZON)
        loss = loss + (losses.flatten()[part] * weights).sum()
        total += normaliser(aggregation, mask[part], rows[part] - start, stop - start) or 0.0
    torch.testing.assert_close(loss / (total or 1.0), whole, rtol=1e-5, atol=1e-5)


def test_the_mean_of_micro_batch_means_is_another_number() -> None:
    losses, _, mask, rows = ragged(0)
    whole = aggregate("token-mean", losses, mask, rows, 7)
    halves = [(rows < 2), (rows >= 2)]
    means = [losses.flatten()[half & mask].mean() for half in halves]
    assert abs((sum(means) / 2 - whole).item()) > 0.05


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.int64)
    for aggregation in AGGREGATIONS:
        assert token_weights(aggregation, *empty, 0, HORIZON).shape == (0,)  # type: ignore[arg-type]
        assert not normaliser(aggregation, *empty, 0)  # type: ignore[arg-type]


def test_a_missing_horizon_and_an_unknown_name_are_refused() -> None:
    mask, rows = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="horizon"):
        token_weights("seq-mean-token-sum-norm", mask, rows, 1)
    with pytest.raises(ValueError, match="mean-mean"):
        token_weights("mean-mean", mask, rows, 1)  # type: ignore[arg-type]


def test_sums_and_means_of_rows() -> None:
    values = torch.tensor([1.0, 2.0, torch.nan, 5.0], requires_grad=True)
    mask, rows = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 2])
    assert row_sum(values, mask, rows, 4).tolist() == [3.0, 0.0, 5.0, 0.0]
    means = row_mean(values, mask, rows, 4)
    assert means.tolist() == [1.5, 0.0, 5.0, 0.0]
    assert torch.autograd.grad(means.sum(), values)[0].tolist() == [0.5, 0.5, 0.0, 1.0]
