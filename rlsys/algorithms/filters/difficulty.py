"""A floor and a ceiling for the difficulty of a prompt, as the policy of the moment finds it."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import compares_in_group
from rlsys.algorithms.filters import GROUP_FILTERS
from rlsys.config.errors import UserError


@GROUP_FILTERS.register("difficulty")
@compares_in_group
def difficulty(
    rewards: torch.Tensor, groups: torch.Tensor, *, low: float | None = 0.0, high: float | None = 1.0
) -> torch.Tensor:
    """Keeps groups with low < mean reward < high.

    The bounds themselves are outside, so that by default rewards of 0 and 1 lose the groups all of whose samples fail
    and those all of whose samples succeed.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        low: prompts this hard or harder are dropped; None: none are.
        high: prompts this easy or easier are dropped; None: none are.

    Returns:
        [G] bool.

    Raises:
        UserError: no mean lies between the bounds, or there are none.
    """
    bottom, top = -torch.inf if low is None else low, torch.inf if high is None else high
    if not bottom < top or (low is None and high is None):
        raise UserError(
            f"between low={low} and high={high} lies " + ("everything" if low is None and high is None else "nothing"),
            where="algorithm.filters.difficulty",
            fix="low and high bound the mean reward of a group: low below high, one of them may be null",
        )
    sizes = torch.bincount(groups)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, rewards.to(torch.float64))
    means = sums / sizes
    return (means > bottom) & (means < top)
