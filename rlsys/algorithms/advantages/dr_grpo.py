"""Dr. GRPO (arXiv 2503.20783): no division by the standard deviation. Its loss is the aggregation
``seq-mean-token-sum-norm``, which leaves out the division by the response's length."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered


@ADVANTAGES.register("dr_grpo")
@compares_in_group
def dr_grpo(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """R − mean of the group, 0 in a group of one. rewards [B], groups [B] int64 -> [B] float32."""
    return centered(rewards, groups).to(torch.float32)
