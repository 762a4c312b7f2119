"""REINFORCE leave-one-out (arXiv 2402.14740)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_sizes, normalized


@ADVANTAGES.register("rloo")
@compares_in_group
def rloo(rewards: torch.Tensor, groups: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """R − mean of the group's other samples, 0 in a group of one.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        normalize: then (A − mean) / (std + 1e-4) over the batch, std with n − 1 (TRL's normalize_advantages). The mean
            is 0 already, because every group adds up to 0.

    Returns:
        [B] float32.
    """
    sizes = group_sizes(groups)
    # R − (S − R)/(n − 1) = (R − S/n) · n/(n − 1)
    advantages = centered(rewards, groups) * sizes / (sizes - 1).clamp(min=1)
    if normalize:
        advantages = normalized(advantages, torch.zeros_like(groups), 1e-4)
    return advantages.to(torch.float32)
