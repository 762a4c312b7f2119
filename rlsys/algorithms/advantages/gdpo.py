"""Group reward-decoupled normalisation (arXiv 2601.05242): every reward part on its own scale."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import group_sizes, normalized
from rlsys.algorithms.returns import whiten_samples
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads


@ADVANTAGES.register("gdpo")
@compares_in_group
@reads("scores", "weights", "lengths")
def gdpo(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    scores: dict[str, torch.Tensor],
    weights: dict[str, float],
    lengths: torch.Tensor,
    eps: Annotated[float, Field(gt=0)] = 1e-6,
    batch: Literal["samples", "tokens", "none"] = "samples",
) -> torch.Tensor:
    """Σ_k w_k · (R_k − mean of the group) / (std of the group + eps), then normalised over the batch.

    A part that was not computed for a sample (NaN) adds 0 to it and does not count in the part's mean and std.

    Args:
        rewards: [B] Σ_k w_k · R_k; nothing is read from it, but it must be just that.
        groups: [B] int64, group of each sample.
        scores: by reward part, [B], NaN where it was not computed.
        weights: by reward part.
        lengths: [B] int64, sampled tokens.
        eps: added to standard deviations (verl: 1e-6, TRL: 1e-4), which are those with n − 1.
        batch: ``samples``: (A − mean) / (std + eps) over the samples of the batch (the paper, TRL); ``tokens``:
            (A − mean) / √(variance + 1e-8) over its sampled tokens (verl); ``none``: as it is. A group of one is 0 and,
            over tokens, does not count.

    Returns:
        [B] float32.

    Raises:
        UserError: the rewards are not the sum of their parts: a penalty or permutation would be lost.
    """
    total, advantages = torch.zeros(len(rewards), dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.float64)
    for name, part in scores.items():
        there = ~part.isnan()
        part = part.to(torch.float64)
        total[there] += weights[name] * part[there]
        advantages[there] += weights[name] * normalized(part[there], groups[there], eps)
    if not torch.allclose(total, rewards.to(torch.float64), rtol=1e-4, atol=1e-4):
        raise UserError(
            "gdpo takes the reward apart, and the reward is not the weighted sum of its parts",
            where="algorithm.advantage",
            fix="put penalties into the loss (algorithm.kl.placement=loss) or make them a reward part",
        )
    if batch == "samples":
        advantages = normalized(advantages, torch.zeros_like(groups), eps)
    elif batch == "tokens":
        together = group_sizes(groups) > 1
        advantages = torch.where(together, whiten_samples(advantages, torch.where(together, lengths, 0)), 0.0)
    return advantages.to(torch.float32)
