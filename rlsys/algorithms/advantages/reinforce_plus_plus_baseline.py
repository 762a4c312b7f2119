"""REINFORCE++ with a baseline (arXiv 2501.03262): the group's mean, then the scale of the whole batch."""

from __future__ import annotations

import torch

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_sizes
from rlsys.algorithms.returns import whiten_samples
from rlsys.config.plugins import reads


@ADVANTAGES.register("reinforce_plus_plus_baseline")
@compares_in_group
@reads("lengths")
def reinforce_plus_plus_baseline(rewards: torch.Tensor, groups: torch.Tensor, *, lengths: torch.Tensor) -> torch.Tensor:
    """R − mean of the group, whitened over the sampled tokens of the batch.

    All tokens of a sample have its value, so their statistics follow from the lengths. Whitening moves the mean over
    tokens to 0, and with it, a little, groups of equal rewards. A group of one is 0 and does not count.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        lengths: [B] int64, sampled tokens.

    Returns:
        [B] float32.
    """
    together = group_sizes(groups) > 1
    whitened = whiten_samples(centered(rewards, groups), torch.where(together, lengths, 0))
    return torch.where(together, whitened, 0.0).to(torch.float32)
