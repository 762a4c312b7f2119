"""DAPO's policy loss (arXiv 2503.14476)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.ppo_clip import ppo_clip


@POLICY_LOSSES.register("dapo")
def dapo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """``ppo_clip`` with the upper bound raised, so that unlikely tokens may become likelier.

    The rest of DAPO is configured beside it: ``aggregation: token-mean``, the reward part ``overlong``, and the group
    filter that refills groups of equal rewards. Arguments, metrics and errors as in ``ppo_clip``.
    """
    return ppo_clip(
        logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
