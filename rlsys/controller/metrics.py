"""A step's metrics from what the driver sees of its rows."""

from __future__ import annotations

import warnings

import numpy as np

from rlsys.config.schema import RunConfig
from rlsys.workers.experience import Experience


def experience_metrics(experience: Experience, config: RunConfig) -> dict[str, float]:
    """``reward/…`` and ``rollout/…``: rewards and their parts, lengths, truncation."""
    rewards, lengths = experience.rewards.astype(np.float64), experience.rollout("response_lengths")
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": float((experience.rollout("finish_reasons") == "length").mean()),
        "rollout/samples": float(len(experience)),
        "rollout/tokens": float(experience.rollout("sampled_tokens").sum()),
        "failures/reward": float(len(experience.failures())),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part whose condition held nowhere has the mean NaN
        metrics |= {f"reward/{part}": float(np.nanmean(experience.scores(part))) for part in config.reward.parts}
    return metrics


def mismatch_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """``mismatch/…`` from every rank's sums (:func:`rlsys.algorithms.mismatch.mismatch_sums`)."""
    tokens = max(sum(r["tokens"] for r in ranks), 1.0)
    return {
        "mismatch/logprob_abs_mean": sum(r["abs"] for r in ranks) / tokens,
        "mismatch/kl": sum(r["k3"] for r in ranks) / tokens,
        "mismatch/logprob_abs_max": max(r["abs_max"] for r in ranks),
    }
