"""Plug-ins of a user's own, by import path, for runs in tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rlsys.algorithms.losses import PolicyLoss
from rlsys.environments.base import SamplingClient, Trajectory
from rlsys.environments.single_turn import SingleTurn

_calls = 0


def digits(response: str, task: dict[str, Any]) -> float:
    """The fraction of digits: a reward that a random model varies in."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def gated_digits(response: str, task: dict[str, Any], *, gate: str, after: int) -> float:
    """:func:`digits`; from call ``after`` + 1 of its process on it does not return while the file ``gate`` exists."""
    global _calls
    _calls += 1
    while _calls > after and Path(gate).exists():
        time.sleep(0.05)
    return digits(response, task)


class Stuck(SingleTurn):
    """Blocks the sampler's event loop for good on the prompt ``stuck``."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory:
        if task["prompt"] == "stuck":
            time.sleep(3600)
        return await super().run(prompt_ids, task, client)


def spiky_digits(response: str, task: dict[str, Any]) -> float:
    """:func:`digits`; a hundred times that on the prompt ``spike``, and 0 on ``flat``."""
    return {"spike": 100.0, "flat": 0.0}.get(task["prompt"], 1.0) * digits(response, task)


def fragile(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *, limit: float
) -> PolicyLoss:
    """A policy-gradient loss that is not a number where an advantage is above ``limit``."""
    tokens = -advantages * logprobs * torch.sqrt(limit - advantages)
    return PolicyLoss(torch.where(mask, tokens, 0.0), {})
