"""REINFORCE leave-one-out (arXiv 2402.14740)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, centered, compares_in_group, group_sizes


@ADVANTAGES.register("rloo")
@compares_in_group
def rloo(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """R − mean of the group's other samples, 0 in a group of one. rewards [B], groups [B] int64 -> [B] float32."""
    sizes = group_sizes(groups)
    # R − (S − R)/(n − 1) = (R − S/n) · n/(n − 1)
    return (centered(rewards, groups) * sizes / (sizes - 1).clamp(min=1)).to(torch.float32)
