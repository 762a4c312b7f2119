"""Group estimators against verl's and against the definition, and what they do with unusual groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algorithms.advantages import ADVANTAGES, check_estimator, estimate, group_index
from rlsys.config.errors import UserError

GROUP_ESTIMATORS = ["dr_grpo", "grpo", "rloo"]
batches = st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3, width=32)), min_size=1, max_size=30)


def random_batch(seed: int, sizes: tuple[int, ...] = (4, 2, 7, 3)) -> tuple[torch.Tensor, list[str]]:
    generator = np.random.default_rng(seed)
    uids = generator.permutation(np.repeat([f"{g}@0" for g in range(len(sizes))], sizes))
    return torch.tensor(generator.normal(size=len(uids)), dtype=torch.float32), list(uids)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "oracle", "options"),
    [
        ("grpo", "compute_grpo_outcome_advantage", {}),
        ("grpo", "compute_grpo_vectorized_outcome_advantage", {}),
        ("dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "compute_rloo_outcome_advantage", {}),
    ],
)
def test_matches_verl(name: str, oracle: str, options: dict, seed: int) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards, uids = random_batch(seed)
    token_rewards, mask = torch.zeros(len(uids), 5), torch.ones(len(uids), 5)
    token_rewards[:, 4] = rewards
    theirs, _ = getattr(core_algos, oracle)(token_rewards, mask, np.array(uids), **options)
    ours, _ = estimate(name, rewards, uids)
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-5)


@given(batches)
def test_population_std_by_definition(batch: list[tuple[int, float]]) -> None:
    uids = [str(group) for group, _ in batch]
    rewards = np.array([reward for _, reward in batch])
    expected = np.zeros(len(batch))
    for uid in set(uids):
        rows = [i for i, other in enumerate(uids) if other == uid]
        expected[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std() + 1e-6)
    ours, _ = estimate("grpo", torch.tensor(rewards, dtype=torch.float32), uids, std="population")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-4)


@given(batches, st.sampled_from(GROUP_ESTIMATORS))
def test_groups_sum_to_zero_and_order_does_not_matter(batch: list[tuple[int, float]], name: str) -> None:
    uids = [str(group) for group, _ in batch]
    rewards = torch.tensor([reward for _, reward in batch])
    ours, _ = estimate(name, rewards, uids)
    sums = torch.zeros(len(set(uids))).index_add_(0, group_index(uids), ours)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=2e-4, rtol=0)
    backwards, _ = estimate(name, rewards.flip(0), uids[::-1])
    torch.testing.assert_close(backwards.flip(0), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_equal_rewards_give_exactly_nothing_to_learn(name: str) -> None:
    # In float32 the mean of seven 0.1 is not 0.1, and the difference over a tiny std would look like a signal.
    ours, metrics = estimate(name, torch.full((7,), 0.1), ["a"] * 7)
    assert ours.abs().max() < 1e-8
    assert metrics["groups_without_signal"] == 1.0


@pytest.mark.parametrize("name", GROUP_ESTIMATORS)
def test_a_group_shrunk_to_one_is_zero_and_counted(name: str) -> None:
    ours, metrics = estimate(name, torch.tensor([5.0, 1.0, 0.0]), ["lonely", "a", "a"])
    assert ours[0] == 0
    assert ours[1] > 0 > ours[2]
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


def test_the_registry_finds_every_file() -> None:
    assert set(GROUP_ESTIMATORS) <= set(ADVANTAGES.names())
