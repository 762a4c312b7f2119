"""The plain policy gradient (REINFORCE; as in GPG, arXiv 2504.02546)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.surrogate import masked_log_ratio, ratio_maxima, ratio_sums, same_shape


@POLICY_LOSSES.register("gpg")
def gpg(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> PolicyLoss:
    """−A·log π. π_old does not enter the loss: with several updates a step the later ones are off-policy, unnoticed.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs, advantages, mask: of the same shape, without gradient.

    Returns:
        PolicyLoss with sums ``approx_kl``, ``ratio``; maximum ``ratio_max``.

    Raises:
        ValueError: shapes disagree.
    """
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    tokens = -torch.where(mask, advantages, 0.0) * torch.where(mask, logprobs, 0.0)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    return PolicyLoss(tokens, ratio_sums(log_ratio, mask), ratio_maxima(log_ratio, mask))
