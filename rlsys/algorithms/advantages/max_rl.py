"""Maximum-likelihood reinforcement learning (arXiv 2602.02710)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered


@ADVANTAGES.register("max_rl")
@compares_in_group
def max_rl(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(R − mean of the group) / mean of the group; 0 where the mean is not above 0, and in a group of one.

    For rewards of 0 and 1 the gradient is that of log p (up to the order of the group's size) and not of p, p being the
    probability of success: rare successes count most. Rewards are meant to be 0 or more.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.

    Returns:
        [B] float32.
    """
    deviations = centered(rewards, groups)
    mean = rewards.to(torch.float64) - deviations
    return torch.where(mean > 0, deviations / torch.where(mean > 0, mean, 1.0), 0.0).to(torch.float32)
