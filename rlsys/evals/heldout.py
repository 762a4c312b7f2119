"""Held-out evaluation: greedy accuracy, and sampled avg@n and pass@k, through the same samplers and rewards as
training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rlsys.batch import DataProto
from rlsys.config.schema import RunConfig
from rlsys.evals.estimates import greedy_metrics, sampled_metrics
from rlsys.workers.experience import Experience, collect
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import RewardGroup, RolloutGroup
from rlsys.workers.rollout import SampleRequest
from rlsys.workers.waits import StopFlag


def evaluate(
    config: RunConfig,
    problems: DataProto,
    rollout: RolloutGroup,
    reward: RewardGroup,
    stop: StopFlag,
    fleets: Fleets | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]], int]:
    """The samplers' present weights on the held-out problems. fleets: keep the actors alive.

    Returns:
        ``eval/…`` metrics; the rewards that failed, with their rows (they count as wrong); the number of responses.
    """
    greedy = SampleRequest(samples=1, temperature=0.0, max_tokens=config.data.max_response_tokens, run_seed=config.seed)

    def sample(request: SampleRequest) -> Experience:
        return collect(
            problems,
            request,
            rollout,
            reward,
            None,
            config.deadlines,
            stop,
            shards_per_worker=1,
            train=False,
            fleets=fleets,
        )

    answers = sample(greedy)
    metrics = greedy_metrics(_correct(config, answers))
    metrics["eval/reward"] = float(answers.rewards.mean())
    metrics["eval/length_mean"] = float(answers.rollout("response_lengths").mean())
    failures, rows = answers.failures(), len(answers)
    n = config.eval.samples
    if n:
        sampled = sample(replace(greedy, samples=n, temperature=config.rollout.temperature))
        metrics |= sampled_metrics(_correct(config, sampled).reshape(-1, n), config.eval.pass_k)
        failures, rows = failures + sampled.failures(), rows + len(sampled)
    metrics["eval/failures"] = float(len(failures))
    return metrics, failures, rows


def _correct(config: RunConfig, answers: Experience) -> np.ndarray:
    """[B] bool: the metric's reward part is at least 1."""
    part = config.eval.metric or next(iter(config.reward.parts))
    return np.nan_to_num(answers.scores(part)) >= 1.0
