"""Token-level estimators: given spans, ranks, idle ranks, and where rewards go."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms.advantages import TokenAdvantages, estimate_tokens, spread_rewards
from rlsys.algorithms.collective import Alone
from rlsys.algorithms.returns import whiten, whiten_samples
from rlsys.config.errors import UserError

TOKEN_ESTIMATORS = ["gae", "reinforce_plus_plus"]
# the masks of a batch's responses; a response may have no sampled token
masks = st.lists(st.lists(st.booleans(), min_size=0, max_size=12), min_size=1, max_size=6)


class Threads:
    """A collective of threads: every rank waits at each call for the others."""

    def __init__(self, ranks: int):
        self._barrier = threading.Barrier(ranks, timeout=10)
        self._given: dict[int, Any] = {}

    def of(self, rank: int) -> Threads._Rank:
        return Threads._Rank(self, rank)

    class _Rank:
        def __init__(self, together: Threads, rank: int):
            self._together, self._rank = together, rank

        def _exchange(self, value: Any) -> list[Any]:
            everyone = self._together
            everyone._given[self._rank] = value
            everyone._barrier.wait()
            values = [everyone._given[rank] for rank in sorted(everyone._given)]
            everyone._barrier.wait()
            return values

        def sum(self, values: Sequence[float]) -> list[float]:
            return [sum(column) for column in zip(*self._exchange(list(values)), strict=True)]

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            return torch.cat(self._exchange(values))


def on_ranks(work: Sequence[Callable[[Any], Any]]) -> list[Any]:
    together, results = Threads(len(work)), [None] * len(work)

    def run(rank: int) -> None:
        results[rank] = work[rank](together.of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def batch_of(shape: list[list[bool]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(seed)
    flat = [sampled for row in shape for sampled in row]
    normal = lambda count: torch.tensor(generator.normal(size=count), dtype=torch.float32)  # noqa: E731
    return {
        "rewards": normal(len(shape)),
        "mask": torch.tensor(flat, dtype=torch.bool),
        "rows": torch.tensor([row for row, tokens in enumerate(shape) for _ in tokens], dtype=torch.int64),
        "values": normal(len(flat)),
        "penalty": normal(len(flat)),
    }


def run(name: str, batch: dict[str, torch.Tensor], collective: Any = None, **options: Any) -> TokenAdvantages:
    return estimate_tokens(
        name,
        batch["rewards"],
        batch["mask"],
        batch["rows"],
        len(batch["rewards"]),
        collective or Alone(),
        token_penalty=batch["penalty"],
        inputs={"values": batch["values"]},
        **options,
    )


def only_rows(batch: dict[str, torch.Tensor], first: int, last: int) -> dict[str, torch.Tensor]:
    here = (batch["rows"] >= first) & (batch["rows"] < last)
    part = {name: batch[name][here] for name in ("mask", "rows", "values", "penalty")}
    return part | {"rows": part["rows"] - first, "rewards": batch["rewards"][first:last]}


@given(masks, st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_is_the_backward_recursion_over_sampled_tokens(shape: list[list[bool]], gamma: float, lam: float) -> None:
    batch = batch_of(shape)
    ours = run("gae", batch, gamma=gamma, lam=lam, whiten=False)
    expected = torch.zeros(len(batch["mask"]), dtype=torch.float64)
    for row, reward in enumerate(batch["rewards"].double()):
        sampled = [i for i in range(len(expected)) if batch["rows"][i] == row and batch["mask"][i]]
        following, carried = 0.0, 0.0
        for i in reversed(sampled):
            value = float(batch["values"].double()[i])
            earned = float(reward) * (i == sampled[-1]) - float(batch["penalty"].double()[i])
            carried = earned + gamma * following - value + gamma * lam * carried
            expected[i], following = carried, value
    torch.testing.assert_close(ours.advantages, expected.float(), atol=1e-6, rtol=1e-6)
    returns = torch.where(batch["mask"], expected + batch["values"], 0.0)
    torch.testing.assert_close(ours.returns, returns.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
@given(masks)
def test_given_tokens_might_as_well_not_be_there(name: str, shape: list[list[bool]]) -> None:
    batch = batch_of(shape)
    ours = run(name, batch, gamma=0.9)
    assert (ours.advantages[~batch["mask"]] == 0).all()
    assert (ours.returns[~batch["mask"]] == 0).all()
    without = {name: batch[name][batch["mask"]] for name in ("mask", "rows", "values", "penalty")}
    bare = run(name, without | {"rewards": batch["rewards"]}, gamma=0.9)
    assert torch.equal(ours.advantages[batch["mask"]], bare.advantages)
    assert torch.equal(ours.returns[batch["mask"]], bare.returns)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
@settings(max_examples=30)
@given(shape=masks, data=st.data())
def test_two_ranks_give_what_one_gives(name: str, shape: list[list[bool]], data: st.DataObject) -> None:
    batch = batch_of(shape)
    cut = data.draw(st.integers(0, len(shape)))  # at either end one rank is idle
    parts = [only_rows(batch, 0, cut), only_rows(batch, cut, len(shape))]
    results = on_ranks([lambda collective, part=part: run(name, part, collective) for part in parts])
    alone = run(name, batch)
    together = torch.cat([result.advantages for result in results])
    torch.testing.assert_close(together, alone.advantages, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([result.returns for result in results]), alone.returns)


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    shape = [[True, False, True], [True] * 5, [False, True]]
    batch = batch_of(shape)
    order = [2, 0, 1]
    picked = torch.cat([(batch["rows"] == row).nonzero().flatten() for row in order])
    moved = {name: batch[name][picked] for name in ("mask", "values", "penalty")}
    moved["rows"] = torch.tensor([new for new, row in enumerate(order) for _ in shape[row]])
    moved["rewards"] = batch["rewards"][order]
    torch.testing.assert_close(run(name, moved).advantages, run(name, batch).advantages[picked])


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_an_idle_rank_has_nothing_and_says_so(name: str) -> None:
    ours = run(name, batch_of([]))
    assert ours.advantages.shape == ours.returns.shape == (0,)
    assert ours.advantages.dtype == ours.returns.dtype == torch.float32


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20), st.sampled_from([0.0, 1e6]))
def test_whitened_tokens_have_mean_0_and_variance_1_however_large_their_mean(tokens: list[float], mean: float) -> None:
    values = torch.tensor(tokens, dtype=torch.float64) + mean
    ours = whiten(values, Alone())
    spread = float(values.var())
    assert abs(float(ours.mean())) < 1e-6 * max(1.0, float(ours.abs().max()))
    assert float(ours.var()) == pytest.approx(spread / (spread + 1e-8), abs=1e-5)


def test_one_token_in_all_is_whitened_to_0() -> None:
    assert whiten(torch.tensor([3.0]), Alone()).tolist() == [0.0]


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), min_size=1, max_size=10))
def test_whitening_samples_by_their_lengths_is_whitening_their_tokens(samples: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in samples], dtype=torch.float64)
    lengths = torch.tensor([length for _, length in samples])
    tokens = whiten(values.repeat_interleave(lengths), Alone())
    ours = whiten_samples(values, lengths).repeat_interleave(lengths)
    torch.testing.assert_close(ours, tokens, atol=1e-6, rtol=1e-6)


def test_rewards_go_to_the_last_sampled_token_and_penalties_to_every_one() -> None:
    mask = torch.tensor([True, False, True, False, False, True])
    rows = torch.tensor([0, 0, 0, 0, 1, 2])
    penalty = torch.tensor([0.5, 99.0, 0.25, float("nan"), 7.0, 1.0])
    ours = spread_rewards(torch.tensor([2.0, 5.0, 3.0]), mask, rows, 3, penalty)
    assert ours.tolist() == [-0.5, 0.0, 1.75, 0.0, 0.0, 2.0]
    assert spread_rewards(torch.tensor([2.0, 5.0, 3.0]), mask, rows, 3).tolist() == [0, 0, 2, 0, 0, 3]


def test_shapes_that_disagree_are_refused() -> None:
    batch = batch_of([[True, True], [True]])
    with pytest.raises(ValueError, match=r"values of shape \(2,\) beside a mask of shape \(3,\)"):
        run("gae", batch | {"values": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"token_penalty of shape \(1,\)"):
        run("gae", batch | {"penalty": torch.zeros(1)})
    with pytest.raises(ValueError, match="indices fall"):
        run("gae", batch | {"rows": torch.tensor([1, 0, 0])})
    with pytest.raises(ValueError, match=r"2 rows have rewards of shape \(3,\)"):
        spread_rewards(torch.zeros(3), batch["mask"], batch["rows"], 2)
    with pytest.raises(ValueError, match="values of sampled tokens are not finite"):
        run("gae", batch | {"values": torch.full((3,), torch.nan)})
    with pytest.raises(ValueError, match="'gae' reads values; given: nothing"):
        estimate_tokens("gae", batch["rewards"], batch["mask"], batch["rows"], 2, Alone())
    with pytest.raises(UserError, match="every sample one advantage"):
        run("grpo", batch)
    with pytest.raises(UserError, match="less than or equal to 1"):
        run("gae", batch, gamma=1.5)
