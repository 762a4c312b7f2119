"""What all sample-level estimators have in common, and what they do with unusual groups and inputs.

Their numbers are compared with other implementations in tests/parity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algorithms.advantages import (
    ADVANTAGES,
    check_estimator,
    estimate,
    estimator_reads,
    group_index,
    is_token_level,
    try_out,
)
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads

GROUP_ESTIMATORS = [
    "dr_grpo",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "max_rl",
    "opo",
    "reinforce_plus_plus_baseline",
    "rloo",
]
ZERO_SUM: list[tuple[str, dict[str, Any]]] = [
    ("dr_grpo", {}),
    ("gdpo", {}),
    ("gdpo", {"batch": "none"}),
    ("gpg", {}),
    ("grpo", {}),
    ("grpo", {"std": "population"}),
    ("grpo", {"std": "batch"}),
    ("grpo", {"std": "none", "leave_one_out": True}),
    ("grpo", {"length_unbiased": True}),
    ("grpo", {"weighting": "variance"}),
    ("max_rl", {}),
    ("rloo", {}),
    ("rloo", {"normalize": True}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("gdpo", {"batch": "tokens"}),
    ("gpg", {"counted": "nonzero"}),
    ("grpo", {"std": "others", "leave_one_out": True}),
    ("grpo_passk", {}),
    ("opo", {}),
    ("reinforce_plus_plus_baseline", {}),
    ("remax", {}),
]
NOT_SHIFTED = {"gpg", "max_rl", "remax"}  # they measure rewards from 0, or from another response
few = settings(max_examples=40)  # each of many estimators
batches = st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3, width=32)), min_size=1, max_size=30)


def made_up_inputs(rewards: torch.Tensor) -> dict:
    """Everything that an estimator may read, different for each sample, following its reward."""
    lengths = 1 + (rewards * 7).abs().to(torch.int64) % 5
    scores = {"all": rewards.to(torch.float64), "extra": lengths.to(torch.float64)}
    return {
        "lengths": lengths,
        "scores": scores,
        "weights": {"all": 1.0, "extra": 0.0},
        "baselines": rewards.to(torch.float64).cos(),
    }


def advantages_of(name: str, rewards: torch.Tensor, uids: list[str], **options: Any) -> torch.Tensor:
    return estimate(name, rewards, uids, inputs=made_up_inputs(rewards), **options)[0]


@pytest.mark.parametrize(("name", "options"), [*ZERO_SUM, *OTHERS])
@few
@given(batch=batches)
def test_the_order_of_rows_does_not_matter(name: str, options: dict, batch: list[tuple[int, float]]) -> None:
    uids, rewards = [str(group) for group, _ in batch], torch.tensor([reward for _, reward in batch])
    backwards = advantages_of(name, rewards.flip(0), uids[::-1], **options).flip(0)
    torch.testing.assert_close(backwards, advantages_of(name, rewards, uids, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), ZERO_SUM)
@few
@given(batch=batches)
def test_groups_sum_to_zero(name: str, options: dict, batch: list[tuple[int, float]]) -> None:
    uids, rewards = [str(group) for group, _ in batch], torch.tensor([reward for _, reward in batch])
    ours = advantages_of(name, rewards, uids, **options)
    sums = torch.zeros(len(set(uids))).index_add_(0, group_index(uids), ours)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-5 * max(1.0, float(ours.abs().max())), rtol=0)


@pytest.mark.parametrize(("name", "options"), [case for case in [*ZERO_SUM, *OTHERS] if case[0] not in NOT_SHIFTED])
@few
@given(batch=st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), min_size=1, max_size=30))
def test_a_constant_added_to_all_rewards_changes_nothing(
    name: str, options: dict, batch: list[tuple[int, int]]
) -> None:
    uids, rewards = [str(group) for group, _ in batch], torch.tensor([float(reward) for _, reward in batch])
    inputs = made_up_inputs(rewards)
    moved = inputs | {"scores": {**inputs["scores"], "all": inputs["scores"]["all"] + 16.0}}
    before, _ = estimate(name, rewards, uids, inputs=inputs, **options)
    after, _ = estimate(name, rewards + 16.0, uids, inputs=moved, **options)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_equal_rewards_give_exactly_nothing_to_learn(name: str) -> None:
    # In float32 the mean of seven 0.1 is not 0.1, and the difference over a tiny std would look like a signal.
    rewards = torch.full((7,), 0.1)
    ours, metrics = estimate(name, rewards, ["a"] * 7, inputs=made_up_inputs(rewards))
    assert ours.abs().max() < 1e-8
    assert metrics["groups_without_signal"] == 1.0


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_a_group_shrunk_to_one_is_zero_and_counted(name: str) -> None:
    rewards = torch.tensor([5.0, 1.0, 0.0])
    ours, metrics = estimate(name, rewards, ["lonely", "a", "a"], inputs=made_up_inputs(rewards))
    assert ours[0] == 0
    assert ours[1] > 0 >= ours[2]
    assert metrics == {"groups": 2.0, "groups_of_one": 1.0, "groups_without_signal": 0.5}


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_one_sample_per_prompt_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="one sample per prompt") as error:
        check_estimator(name, {}, samples_per_prompt=1)
    assert error.value.where == "rollout.samples_per_prompt"
    check_estimator(name, {}, samples_per_prompt=2)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'grpo'"):
        check_estimator("grppo", {}, 8)
    with pytest.raises(UserError, match="did you mean 'std'"):
        check_estimator("grpo", {"sdt": "none"}, 8)
    with pytest.raises(UserError, match="input should be"):
        estimate("grpo", torch.ones(2), ["a", "a"], std="bessel")


def test_bad_rewards_are_refused_and_no_rows_are_fine() -> None:
    with pytest.raises(ValueError, match=r"\[1\]"):
        estimate("grpo", torch.tensor([0.0, float("nan")]), ["a", "a"])
    with pytest.raises(ValueError, match="2 samples"):
        estimate("grpo", torch.ones(3), ["a", "a"])
    assert estimate("grpo", torch.empty(0), [])[0].shape == (0,)


def test_variance_weighting_prefers_middling_difficulty() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    plain, _ = estimate("grpo", rewards, ["hard"] * 4 + ["even"] * 4)
    weighted, _ = estimate("grpo", rewards, ["hard"] * 4 + ["even"] * 4, weighting="variance")
    torch.testing.assert_close(weighted, plain * torch.tensor([3 / 16] * 4 + [4 / 16] * 4))


def test_one_success_beside_equal_others_is_not_divided_by_their_round_off() -> None:
    rewards = torch.tensor([1.0] + [0.1] * 6)
    ours, _ = estimate("grpo", rewards, ["a"] * 7, std="others", leave_one_out=True)
    torch.testing.assert_close(ours[0], torch.tensor(0.9))


def test_rare_successes_count_most_under_max_rl() -> None:
    ours, _ = estimate("max_rl", torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, 0.0]), ["rare"] * 4 + ["negative"] * 2)
    assert ours.tolist() == [3.0, -1.0, -1.0, -1.0, 0.0, 0.0]


def test_a_tie_for_the_best_teaches_nothing_under_pass_at_k() -> None:
    ours, _ = estimate("grpo_passk", torch.tensor([1.0, 1.0, 0.0, 2.0, 5.0]), ["a", "a", "a", "b", "b"])
    assert ours[:4].tolist() == [0.0] * 4
    assert ours[4] > 0


def test_parts_that_were_not_computed_count_nothing() -> None:
    nan = float("nan")
    scores = {
        "always": torch.tensor([0.0, 1.0, 0.0, 1.0]).double(),
        "some": torch.tensor([0.0, nan, 4.0, nan]).double(),
    }
    inputs = {"scores": scores, "weights": {"always": 1.0, "some": 0.5}, "lengths": torch.ones(4, dtype=torch.int64)}
    ours, _ = estimate("gdpo", torch.tensor([0.0, 1.0, 2.0, 1.0]), ["a"] * 4, inputs=inputs, batch="none")
    # always: ±1/std of (0, 1, 0, 1); some: ±2/std of (0, 4), half of it
    always, some = 0.5 / (1 / 3) ** 0.5, 0.5 * 2 / 8**0.5
    torch.testing.assert_close(ours, torch.tensor([-always - some, always, -always + some, always]), atol=1e-5, rtol=0)


def test_gdpo_refuses_a_reward_that_is_more_than_its_parts() -> None:
    rewards = torch.tensor([0.0, 1.0])
    with pytest.raises(UserError, match="not the weighted sum"):
        estimate("gdpo", rewards - 0.1, ["a", "a"], inputs=made_up_inputs(rewards))


def test_every_estimator_runs_on_made_up_samples() -> None:
    names = ADVANTAGES.names()
    assert {*GROUP_ESTIMATORS, "remax", "gae", "reinforce_plus_plus"} <= set(names)
    for name in names:
        assert try_out(name, {}).shape == (2,)
        assert torch.isfinite(try_out(name, {})).all()
    assert [name for name in names if is_token_level(name)] == ["gae", "reinforce_plus_plus"]
    assert estimator_reads("opo") == ("lengths",)


def test_options_without_effect_are_refused() -> None:
    for options in ({"std": "none", "eps": 1e-6}, {"std": "sample", "length_unbiased": True}):
        with pytest.raises(UserError) as error:
            try_out("grpo", options)
        assert error.value.where.startswith("algorithm.advantage_options.")


def test_what_an_estimator_reads_must_be_there_and_fit() -> None:
    rewards = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="'opo' reads lengths; given: baselines"):
        estimate("opo", rewards, ["a", "a"], inputs={"baselines": rewards, "lengths": None})
    with pytest.raises(ValueError, match=r"2 samples have lengths of shape \(3,\)"):
        estimate("opo", rewards, ["a", "a"], inputs={"lengths": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"baselines of samples \[1\] are not finite"):
        estimate("remax", rewards, ["a", "a"], inputs={"baselines": torch.tensor([0.0, float("inf")])})
    inputs = made_up_inputs(rewards)
    with pytest.raises(ValueError, match=r"scores of 'all' of shape \(2, 1\)"):
        estimate("gdpo", rewards, ["a", "a"], inputs=inputs | {"scores": {"all": torch.zeros(2, 1)}})
    with pytest.raises(ValueError, match=r"beside weights of \['other'\]"):
        estimate("gdpo", rewards, ["a", "a"], inputs=inputs | {"weights": {"other": 1.0}})
    with pytest.raises(UserError, match="every token its own"):
        estimate("gae", rewards, ["a", "a"])


@reads("entropy")
def curious(rewards: torch.Tensor, groups: torch.Tensor, *, entropy: torch.Tensor) -> torch.Tensor:
    return rewards * entropy


def test_an_estimator_that_reads_what_nothing_provides_is_refused() -> None:
    with pytest.raises(UserError, match="reads entropy, which nothing provides"):
        check_estimator(f"{__name__}:curious", {}, 8)
