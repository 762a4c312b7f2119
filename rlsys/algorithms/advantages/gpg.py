"""Group policy gradient (arXiv 2504.02546)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_range


@ADVANTAGES.register("gpg")
@compares_in_group
def gpg(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    f_norm: Annotated[float, Field(gt=0)] = 1.0,
    counted: Literal["informative", "nonzero"] = "informative",
) -> torch.Tensor:
    """α · (R − mean of the group) / f_norm with α = B / number of samples that count; 0 in a group of one.

    α makes up for samples without gradient, so that a batch with many of them takes a step as large as another.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        f_norm: a constant divisor.
        counted: ``informative``: samples of groups whose rewards are not all equal (the paper), ``nonzero``: samples
            whose reward is not 0 (verl).

    Returns:
        [B] float32.
    """
    count = (rewards != 0) if counted == "nonzero" else (group_range(rewards, groups) > 0)[groups]
    alpha = len(rewards) / max(int(count.sum()), 1)
    return (alpha * centered(rewards, groups) / f_norm).to(torch.float32)
