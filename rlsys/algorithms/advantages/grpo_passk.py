"""GRPO for pass@k (arXiv 2503.19595): the best response of a group learns, by its lead on the second best."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_std


@ADVANTAGES.register("grpo_passk")
@compares_in_group
def grpo_passk(
    rewards: torch.Tensor, groups: torch.Tensor, *, normalize: bool = True, eps: Annotated[float, Field(gt=0)] = 1e-6
) -> torch.Tensor:
    """(best − second best reward of the group) / (std + eps) for the best sample, 0 for all others.

    0 for the whole group where two are best, or where there is one sample.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        normalize: divide by the group's standard deviation (with n − 1).
        eps: added to it.

    Returns:
        [B] float32.
    """
    values = rewards.to(torch.float64)
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]  # by group, and by reward within it
    last = torch.bincount(groups).cumsum(0) - 1
    paired = torch.bincount(groups) > 1
    best, second = order[last[paired]], order[last[paired] - 1]
    advantages = torch.zeros_like(values)
    advantages[best] = values[best] - values[second]
    if normalize:
        advantages = advantages / (group_std(centered(rewards, groups), groups, correction=1) + eps)
    return advantages.to(torch.float32)
