"""What a job decides without asking an actor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from composing import run_config
from experiences import make_experience

from rlsys.checkpoint.controller_state import ControllerState
from rlsys.controller.job import Job, needs_old_logprobs, reward_kl
from rlsys.controller.metrics import experience_metrics
from rlsys.workers.waits import StopFlag

KL_IN_REWARD = ("algorithm.kl.coef=0.1", "algorithm.kl.placement=reward")


def make_job(*overrides: str, step: int = 0) -> Job:
    """A job without actors, data and observers: what is tested here needs none."""
    absent: Any = None
    return Job(
        config=run_config("rollout=torch", *overrides),
        groups=absent,
        prompts=absent,
        held_out=None,
        store=absent,
        observers=absent,
        stop=StopFlag(),
        state=ControllerState(step=step, lineage=0),
    )


@pytest.mark.parametrize(
    ("overrides", "own_pass"),
    [
        ((), False),
        (("algorithm.kl.coef=0.1",), False),
        (("trainer.updates_per_step=2",), True),
        (("trainer.updates_per_step=2", "algorithm.old_logprobs=sampler"), False),
        (KL_IN_REWARD, True),
        ((*KL_IN_REWARD, "algorithm.old_logprobs=sampler"), True),
    ],
)
def test_old_logprobs_take_a_pass_of_their_own_only_where_nothing_else_has_them(
    overrides: tuple[str, ...], own_pass: bool
) -> None:
    assert needs_old_logprobs(run_config(*overrides)) is own_pass


def test_kl_is_a_penalty_on_the_reward_only_with_a_coefficient() -> None:
    assert reward_kl(run_config(*KL_IN_REWARD))
    assert not reward_kl(run_config("algorithm.kl.placement=reward"))
    assert not reward_kl(run_config("algorithm.kl.coef=0.1"))


# --- advantages ---

REWARDS = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
EXPERIENCE = make_experience([[1] * 4, [1] * 4], shards=2, rewards=REWARDS)


def test_advantages_are_relative_to_the_group() -> None:
    advantages = make_job().advantages(EXPERIENCE, None)
    assert advantages.reshape(2, 4).sum(axis=1) == pytest.approx([0, 0])
    assert ((advantages > 0) == (np.array(REWARDS) > 0)).all()


def test_permuted_rewards_change_advantages_and_not_the_rewards_that_are_logged() -> None:
    job, plain = make_job("reward.permute=true"), make_job()
    before = EXPERIENCE.rewards.copy()
    permuted = job.advantages(EXPERIENCE, None)
    assert not np.array_equal(permuted, plain.advantages(EXPERIENCE, None))
    assert (EXPERIENCE.rewards == before).all()
    assert experience_metrics(EXPERIENCE, job.config) == experience_metrics(EXPERIENCE, plain.config)
    assert np.array_equal(permuted, job.advantages(EXPERIENCE, None)), "the permutation is the step's own, not chance"
    other_step = make_job("reward.permute=true", step=1)
    assert not np.array_equal(permuted, other_step.advantages(EXPERIENCE, None))


def test_kl_to_the_reference_is_taken_off_the_reward() -> None:
    """A reward of 1 with a KL of 10 at 0.1 is worth as much as a reward of 0 without."""
    reference_kl = np.array([0.0, 10.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0])
    advantages = make_job(*KL_IN_REWARD).advantages(EXPERIENCE, reference_kl)
    assert advantages[:4] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert (advantages[4:6] > 0).all()
