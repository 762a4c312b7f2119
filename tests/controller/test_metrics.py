"""A step's metrics from what the driver sees."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from composing import run_config
from experiences import make_experience

from rlsys.algorithms.mismatch import mismatch_sums
from rlsys.controller.metrics import combine_updates, experience_metrics, mismatch_metrics
from rlsys.workers.experience import Experience


def test_experience_metrics_are_means_over_rows() -> None:
    experience = make_experience([[10, 50], [20, 20]], shards=2, rewards=[0.0, 1.0, 1.0, 1.0])
    metrics = experience_metrics(experience, run_config(), step=0)
    assert metrics["reward/mean"] == metrics["reward/correct"] == 0.75
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.1875))
    assert (metrics["rollout/length_mean"], metrics["rollout/length_max"]) == (25.0, 50.0)
    assert (metrics["rollout/samples"], metrics["rollout/tokens"]) == (4.0, 100.0)
    assert metrics["rollout/truncated"] == 0.25
    assert metrics["failures/reward"] == 0.0


def test_what_filters_dropped_was_generated_and_is_not_trained_on() -> None:
    """Sampling counts and lengths are of all rows, rewards of those that are trained on."""
    whole = make_experience([[10, 50], [20, 20]], shards=2, rewards=[0.0, 1.0, 1.0, 1.0])
    more = make_experience([[7, 3]], rewards=[1.0, 1.0])
    dropped, refilled = np.array([True, True, False, False]), np.zeros(2, dtype=bool)
    kept = whole.keep(dropped).followed_by(more.keep(refilled))
    metrics = experience_metrics(kept, run_config(), step=0)
    assert len(kept) == 2
    assert metrics["reward/mean"] == 0.5
    assert (metrics["rollout/samples"], metrics["rollout/tokens"]) == (6.0, 110.0)
    assert metrics["rollout/length_mean"] == pytest.approx(110 / 6)
    assert metrics["rollout/truncated"] == pytest.approx(1 / 6)

    none = whole.keep(refilled.repeat(2)).followed_by(more.keep(refilled)).first(whole.generated)
    assert none.rewards.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert experience_metrics(none, run_config(), step=0)["rollout/tokens"] == 110.0


def test_a_part_that_was_gated_everywhere_has_no_mean() -> None:
    experience = make_experience([[1, 1]])
    shard = experience.shards[0]
    gated = replace(shard.reward, scores={"correct": np.full(2, np.nan)})
    gated_experience = Experience([replace(shard, reward=gated)], experience.seconds)
    metrics = experience_metrics(gated_experience, run_config(), step=0)
    assert math.isnan(metrics["reward/correct"])
    assert metrics["reward/mean"] == 0.0


def test_updates_counts_add_up_maxima_stay_the_rest_is_averaged() -> None:
    first = {"policy/loss": 1.0, "train/tokens": 10.0, "policy/ratio_max": 1.5, "train/micro_batches": 1.0}
    second = {"policy/loss": 3.0, "train/tokens": 30.0, "policy/ratio_max": 1.2, "train/micro_batches": 2.0}
    first |= {"policy/tokens": 8.0, "preference/pairs": 2.0}
    second |= {"policy/tokens": 25.0, "preference/pairs": 1.0}
    combined = combine_updates([first, second])
    assert combined == {
        "policy/loss": 2.0,
        "train/tokens": 40.0,
        "policy/ratio_max": 1.5,
        "train/micro_batches": 3.0,
        "policy/tokens": 33.0,
        "preference/pairs": 3.0,
    }


def test_sampler_against_trainer_is_that_of_the_first_update() -> None:
    """Later updates have moved the trainer on: their difference is no mismatch."""
    measured = {
        "policy/mismatch_abs_mean": 1e-7,
        "policy/mismatch_kl": 1e-9,
        "policy/mismatch_abs_max": 1e-6,
    }
    combined = combine_updates([measured, dict.fromkeys(measured, 1.0)])
    assert combined == {
        "mismatch/logprob_abs_mean": 1e-7,
        "mismatch/kl": 1e-9,
        "mismatch/logprob_abs_max": 1e-6,
    }


def test_mismatch_is_a_mean_over_all_ranks_tokens() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    parts = [
        mismatch_sums(torch.tensor([0.1, 0.1, 0.1, 0.5]), zeros, torch.tensor([True, True, True, False])),
        mismatch_sums(torch.tensor([0.3, 0.0, 0.0, 0.0]), zeros, torch.tensor([True, False, False, False])),
    ]
    metrics = mismatch_metrics(parts)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.15)
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.3)
    assert mismatch_metrics([mismatch_sums(zeros, zeros, ones)])["mismatch/kl"] == 0.0
