"""DAPO's dynamic sampling (arXiv 2503.14476): a group of equal rewards has no gradient."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from rlsys.algorithms.advantages import compares_in_group
from rlsys.algorithms.filters import GROUP_FILTERS
from rlsys.algorithms.groups import group_range


@GROUP_FILTERS.register("zero_variance")
@compares_in_group
def zero_variance(
    rewards: torch.Tensor, groups: torch.Tensor, *, eps: Annotated[float, Field(ge=0)] = 0.0
) -> torch.Tensor:
    """Keeps groups whose largest and smallest reward are more than ``eps`` apart; one sample alone is dropped.

    rewards [B], groups [B] int64 -> [G] bool.
    """
    return group_range(rewards, groups) > eps
