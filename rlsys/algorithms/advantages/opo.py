"""On-policy optimisation with the optimal reward baseline (arXiv 2505.23585)."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_sums
from rlsys.config.plugins import reads


@ADVANTAGES.register("opo")
@compares_in_group
@reads("lengths")
def opo(rewards: torch.Tensor, groups: torch.Tensor, *, lengths: torch.Tensor) -> torch.Tensor:
    """R − mean of the group weighted by the responses' lengths, Σ l·R / Σ l; 0 in a group of one.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        lengths: [B] int64, sampled tokens.

    Returns:
        [B] float32.
    """
    deviations = centered(rewards, groups)  # the shift cancels, and equal rewards give 0
    baseline = group_sums(lengths * deviations, groups) / group_sums(lengths, groups).clamp(min=1)
    return (deviations - baseline).to(torch.float32)
