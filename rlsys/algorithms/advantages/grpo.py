"""Group-relative policy optimisation (arXiv 2402.03300)."""

from __future__ import annotations

from typing import Literal

import torch

from rlsys.algorithms.advantages import ADVANTAGES, centered, compares_in_group, group_sizes
from rlsys.config.errors import UserError


@ADVANTAGES.register("grpo")
@compares_in_group
def grpo(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    std: Literal["sample", "population", "none"] = "sample",
    eps: float = 1e-6,
) -> torch.Tensor:
    """(R − mean of the group) / (std of the group + eps); 0 in a group of one.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        std: ``sample`` divides by n − 1 (verl, TRL, OpenRLHF), ``population`` by n, ``none`` leaves the division out.
        eps: added to the standard deviation.

    Returns:
        [B] float32.
    """
    deviations = centered(rewards, groups)
    if std == "none":
        return deviations.to(torch.float32)
    if std not in ("sample", "population"):
        raise UserError(
            f"'{std}' is not a standard deviation",
            where="algorithm.advantage_options.std",
            fix="one of: sample, population, none",
        )
    squares = torch.zeros(int(groups.max()) + 1 if len(groups) else 0, dtype=deviations.dtype)
    squares.index_add_(0, groups, deviations.square())
    sizes = group_sizes(groups)
    degrees = sizes if std == "population" else (sizes - 1).clamp(min=1)
    return (deviations / ((squares[groups] / degrees).sqrt() + eps)).to(torch.float32)
