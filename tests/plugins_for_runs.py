"""Plug-ins of a user's own, by import path, for runs in tests. Rewards are in ``rewards_for_runs.py``."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlsys.algorithms.losses import PolicyLoss
from rlsys.environments.base import SamplingClient, Trajectory
from rlsys.environments.single_turn import SingleTurn


class Stuck(SingleTurn):
    """Blocks the sampler's event loop for good on the prompt ``stuck``."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory:
        if task["prompt"] == "stuck":
            time.sleep(3600)
        return await super().run(prompt_ids, task, client)


def fragile(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, limit: float
) -> PolicyLoss:
    """A policy-gradient loss that is not a number where an advantage is above ``limit``."""
    tokens = -advantages * logprobs * torch.sqrt(limit - advantages)
    return PolicyLoss(torch.where(mask, tokens, 0.0), {})
