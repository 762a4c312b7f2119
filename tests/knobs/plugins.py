"""What a user might bring, by import path: losses, a divergence, an estimator, an environment, a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlsys.algorithms.losses import PolicyLoss
from rlsys.algorithms.preferences import PairLogprobs, PreferenceLoss, without_reference
from rlsys.environments.base import SamplingClient, Span, Trajectory


def reinforce(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> PolicyLoss:
    return PolicyLoss(-torch.where(mask, advantages * logprobs, 0.0))


def squared_gap(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[n] Σ over words of the squared difference of probabilities."""
    return (student.exp() - teacher.exp()).square().sum(-1)


@without_reference
def hinge(chosen: PairLogprobs, rejected: PairLogprobs, *, room: float = 1.0) -> PreferenceLoss:
    """By how much the margin of summed log-probs is short of ``room``."""
    margin = chosen.policy - rejected.policy
    return PreferenceLoss((room - margin).clamp(min=0), margin.detach())


class OneToken:
    """Lets the model say one token, whatever it may say."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory:
        sample = await client.sample(prompt_ids, max_tokens=1)
        span = Span(sample.token_ids, True, sample.logprobs, sample.versions)
        return Trajectory([span], sample.finish_reason)


class FileTracker:
    def start(self, config: Mapping[str, Any], folder: Path) -> str | None:
        (folder / "tracked").touch()
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...
