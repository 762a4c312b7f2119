"""ReMax (arXiv 2310.10505): the greedy response is the baseline."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES
from rlsys.config.plugins import reads


@ADVANTAGES.register("remax")
@reads("baselines")
def remax(rewards: torch.Tensor, groups: torch.Tensor, *, baselines: torch.Tensor) -> torch.Tensor:
    """R − reward of the greedy response to the same prompt. rewards [B], baselines [B] -> [B] float32."""
    return (rewards.to(torch.float64) - baselines.to(torch.float64)).to(torch.float32)
