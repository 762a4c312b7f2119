"""A step's metrics from what the driver sees of its rows."""

from __future__ import annotations

import warnings

import numpy as np

from rlsys.algorithms.mismatch import Mismatch
from rlsys.config.schema import RunConfig
from rlsys.replay.hints import HintCounts
from rlsys.workers.experience import Experience


def experience_metrics(experience: Experience, config: RunConfig, *, step: int) -> dict[str, float]:
    """``reward/…`` of the rows that are trained on: rewards and their parts; ``rollout/…`` and ``failures/…`` of all
    that were generated, those that filters dropped included: number, lengths, truncation, staleness.

    Args:
        step: of the weights that the trainer had when it was given the samples.
    """
    rewards, generated = experience.rewards.astype(np.float64), experience.everything
    lengths = generated.rollout("response_lengths")
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": float((generated.rollout("finish_reasons") == "length").mean()),
        "rollout/repetition": float(generated.rollout("repetition").mean()),
        "rollout/samples": float(len(generated)),
        "rollout/tokens": float(generated.rollout("sampled_tokens").sum()),
        "rollout/staleness": float(experience.staleness(step)),
        "failures/reward": float(len(experience.failures())),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part whose condition held nowhere has the mean NaN
        metrics |= {f"reward/{part}": float(np.nanmean(experience.scores(part))) for part in config.reward.parts}
    return metrics


def hint_metrics(experience: Experience) -> dict[str, float]:
    """``hints/…``: how many of all samples that were generated got a teacher's context, from which source, and how many
    were cut."""
    found = [shard.reward.hints for shard in experience.shards if shard.reward.hints is not None]
    if not found:
        return {}
    total = sum(found, HintCounts())
    counts = {"live": total.live, "truncated": total.truncated, "too_long": total.too_long, **total.sources}
    return {f"hints/{name}": float(number) for name, number in counts.items()}


def mismatch_metrics(parts: list[Mismatch]) -> dict[str, float]:
    """``mismatch/…`` from the sums of every rank and update."""
    tokens = max(sum(float(part.tokens) for part in parts), 1.0)
    return {
        "mismatch/logprob_abs_mean": sum(float(part.absolute) for part in parts) / tokens,
        "mismatch/kl": sum(float(part.k3) for part in parts) / tokens,
        "mismatch/logprob_abs_max": max(float(part.largest) for part in parts),
    }


# Whichever channel looks at the responses measures them; the names are those of what is measured.
_MEASURED_ON_THE_WAY = {
    f"{channel}/{name}": f"mismatch/{shown}"
    for channel in ("policy", "distillation")
    for name, shown in (
        ("mismatch_abs_mean", "logprob_abs_mean"),
        ("mismatch_kl", "kl"),
        ("mismatch_abs_max", "logprob_abs_max"),
    )
}
_COUNTS = ("tokens", "pairs", "micro_batches")  # of a channel or an engine
_OF_THE_POLICY = {"distillation/entropy": "policy/entropy"}


def combine_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """A step's metrics from those of its optimiser steps: counts add up, maxima stay, sampler against trainer is that
    of the first (in later ones the trainer has moved on), everything else is averaged."""
    result: dict[str, float] = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        if name in _MEASURED_ON_THE_WAY:
            result[_MEASURED_ON_THE_WAY[name]] = values[0]
        elif name.rpartition("/")[2] in _COUNTS:
            result[name] = sum(values)
        else:
            shown = _OF_THE_POLICY.get(name, name)
            result[shown] = max(values) if name.endswith("_max") else float(np.mean(values))
    return result
