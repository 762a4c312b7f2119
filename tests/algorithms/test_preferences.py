"""Preference losses: where they are 0, which way they push, what they read, and sums over ragged rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.preferences import PREFERENCE_LOSSES, PairLogprobs, pair_sums
from rlsys.config.errors import UserError

EVERY = ("cdpo", "dpo", "ipo", "simpo")
LOG_2 = math.log(2)


def draw(seed: int = 0, pairs: int = 6) -> tuple[PairLogprobs, PairLogprobs]:
    generator = torch.Generator().manual_seed(seed)

    def side() -> PairLogprobs:
        policy = -10 * torch.rand(pairs, generator=generator, dtype=torch.float64)
        reference = policy + torch.randn(pairs, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, 9, (pairs,), generator=generator)
        return PairLogprobs(policy.requires_grad_(), reference.detach(), lengths)

    return side(), side()


def get(name: str):
    return PREFERENCE_LOSSES.get(name, where="")


def test_all_are_registered_and_only_simpo_needs_no_reference() -> None:
    assert set(EVERY) <= set(PREFERENCE_LOSSES.names())
    assert {name: get(name).needs_reference for name in EVERY} == {
        "cdpo": True,
        "dpo": True,
        "ipo": True,
        "simpo": False,
    }


@pytest.mark.parametrize("name", EVERY)
def test_gradcheck(name: str) -> None:
    chosen, rejected = draw()

    def pairs(chosen_policy, rejected_policy):
        return get(name)(
            PairLogprobs(chosen_policy, chosen.reference, chosen.lengths),
            PairLogprobs(rejected_policy, rejected.reference, rejected.lengths),
        ).pairs

    assert torch.autograd.gradcheck(pairs, (chosen.policy, rejected.policy))


@pytest.mark.parametrize("name", ["dpo", "cdpo"])
def test_at_the_reference_the_loss_is_log_2_and_nothing_is_preferred(name: str) -> None:
    sides = [PairLogprobs(side.policy, side.policy.detach(), side.lengths) for side in draw()]
    result = get(name)(*sides)
    torch.testing.assert_close(result.pairs, torch.full((6,), LOG_2, dtype=torch.float64))
    assert not result.margin.any()


@given(st.integers(0, 1000), st.sampled_from(("dpo", "simpo")))
def test_pushes_chosen_up_and_rejected_down(seed: int, name: str) -> None:
    chosen, rejected = draw(seed)
    up, down = torch.autograd.grad(get(name)(chosen, rejected).pairs.sum(), [chosen.policy, rejected.policy])
    assert (up < 0).all()
    assert (down > 0).all()


@given(st.integers(0, 1000), st.sampled_from(EVERY))
def test_the_margin_says_which_side_is_preferred_and_carries_no_gradient(seed: int, name: str) -> None:
    chosen, rejected = draw(seed)
    there, back = get(name)(chosen, rejected), get(name)(rejected, chosen)
    torch.testing.assert_close(there.margin, -back.margin)
    assert not there.margin.requires_grad
    assert all(not value.requires_grad for pair in there.sums.values() for value in pair)
    larger = PairLogprobs(chosen.policy + 100, chosen.reference, chosen.lengths)
    assert (get(name)(larger, rejected).margin > there.margin).all()


@given(st.integers(0, 1000), st.sampled_from(EVERY), st.permutations(range(6)))
def test_a_pairs_loss_is_its_own(seed: int, name: str, order: list[int]) -> None:
    chosen, rejected = draw(seed)
    whole = get(name)(chosen, rejected)

    def at(side: PairLogprobs) -> PairLogprobs:
        return PairLogprobs(side.policy[order], side.reference[order], side.lengths[order])

    shuffled = get(name)(at(chosen), at(rejected))
    assert torch.equal(shuffled.pairs, whole.pairs[order])
    assert torch.equal(shuffled.margin, whole.margin[order])


def test_cdpo_without_smoothing_is_dpo_and_with_it_stops_at_its_belief() -> None:
    chosen, rejected = draw()
    assert torch.equal(get("cdpo")(chosen, rejected, label_smoothing=0.0).pairs, get("dpo")(chosen, rejected).pairs)
    policy = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)  # σ(h) = 1 − ε at β = 1
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    result = get("cdpo")(PairLogprobs(policy, zero, one), PairLogprobs(zero, zero, one), beta=1.0, label_smoothing=0.2)
    assert abs(torch.autograd.grad(result.pairs.sum(), policy)[0].item()) < 1e-12


@pytest.mark.parametrize("length_averaged", [True, False])
def test_ipo_is_0_at_its_target(length_averaged: bool) -> None:
    lengths = torch.tensor([4])
    policy = torch.tensor([5.0 * (4 if length_averaged else 1)], requires_grad=True)  # 1/(2β) = 5
    sides = PairLogprobs(policy, torch.zeros(1), lengths), PairLogprobs(torch.zeros(1), torch.zeros(1), lengths)
    result = get("ipo")(*sides, beta=0.1, length_averaged=length_averaged)
    assert result.pairs.item() == pytest.approx(0.0, abs=1e-10)
    assert torch.autograd.grad(result.pairs.sum(), policy)[0].item() == pytest.approx(0.0, abs=1e-5)


def test_simpo_by_hand_and_without_a_reference() -> None:
    chosen = PairLogprobs(torch.tensor([-2.0]), None, torch.tensor([4]))
    rejected = PairLogprobs(torch.tensor([-3.0]), None, torch.tensor([2]))
    result = get("simpo")(chosen, rejected)
    assert result.margin.item() == pytest.approx(2 * (-0.5 + 1.5))
    assert result.pairs.item() == pytest.approx(math.log(1 + math.exp(-(2.0 - 1.0))))


def test_dpo_sums_its_implicit_rewards() -> None:
    chosen, rejected = draw()
    result = get("dpo")(chosen, rejected)
    rewards = [total / count for total, count in (result.sums["chosen_reward"], result.sums["rejected_reward"])]
    torch.testing.assert_close(rewards[0] - rewards[1], result.margin.mean())


@pytest.mark.parametrize("name", EVERY)
def test_no_pairs(name: str) -> None:
    policy = torch.zeros(0, requires_grad=True)
    side = PairLogprobs(policy, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    result = get(name)(side, side)
    assert result.pairs.shape == result.margin.shape == (0,)
    assert torch.autograd.grad(result.pairs.sum(), policy)[0].shape == (0,)


@pytest.mark.parametrize("name", ["cdpo", "dpo", "ipo"])
def test_a_missing_reference_is_refused(name: str) -> None:
    chosen, rejected = (PairLogprobs(side.policy, None, side.lengths) for side in draw())
    with pytest.raises(ValueError, match="reference"):
        get(name)(chosen, rejected)


@pytest.mark.parametrize("name", EVERY)
def test_shapes_that_differ_are_refused(name: str) -> None:
    chosen, rejected = draw(pairs=1)[0], draw(pairs=3)[1]
    with pytest.raises(ValueError, match=r"\(1,\) .*\(3,\)"):
        get(name)(chosen, rejected)
    with pytest.raises(ValueError, match=r"\(1,\) .*\(3,\)"):
        PairLogprobs(rejected.policy, chosen.reference, rejected.lengths)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"beta": 0.0}),
        ("cdpo", {"beta": -1.0}),
        ("cdpo", {"label_smoothing": 0.5}),
        ("ipo", {"beta": 0.0}),
        ("simpo", {"beta": 0.0}),
        ("simpo", {"gamma": -0.1}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict) -> None:
    with pytest.raises(UserError) as caught:
        get(name)(*draw(), **options)
    assert caught.value.where == f"algorithm.preference.loss_options.{next(iter(options))}"


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=5), st.randoms(use_true_random=False))
def test_pair_sums_are_those_of_each_row_in_any_order(masks: list[list[bool]], random) -> None:
    rows = torch.tensor([row for row, mask in enumerate(masks) for _ in mask], dtype=torch.int64)
    mask = torch.tensor([value for row in masks for value in row], dtype=torch.bool)
    logprobs = -torch.arange(1.0, len(rows) + 1)
    order = list(range(len(rows)))
    random.shuffle(order)
    sums, lengths = pair_sums(logprobs[order], mask[order], rows[order], len(masks))
    for row in range(len(masks)):
        here = mask & (rows == row)
        assert sums[row] == logprobs[here].sum()
        assert lengths[row] == here.sum()


def test_what_is_off_the_mask_has_no_effect() -> None:
    logprobs = torch.tensor([-1.0, math.nan, -2.0, -math.inf], requires_grad=True)
    mask, rows = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1])
    sums, lengths = pair_sums(logprobs, mask, rows, 3)
    assert sums.tolist() == [-1.0, -2.0, 0.0]
    assert lengths.tolist() == [1, 1, 0]
    assert torch.autograd.grad(sums.sum(), logprobs)[0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_pair_sums_refuse_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(1,\) .*\(3,\)"):
        pair_sums(torch.zeros(3), torch.ones(1, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), 1)
