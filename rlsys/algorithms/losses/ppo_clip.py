"""PPO's clipped surrogate (arXiv 1707.06347), asymmetric bounds (arXiv 2503.14476), dual clip (arXiv 1912.09729)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.surrogate import (
    clipped_surrogate,
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_positive,
    same_shape,
)
from rlsys.config.errors import UserError


@POLICY_LOSSES.register("ppo_clip")
def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """−min(rA, clip(r, 1 − clip_low, 1 + clip_high)A) with r = π/π_old; for A < 0 at most −dual_clip·A.

    The gradient is exactly 0 on clipped and on masked tokens.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs, advantages, mask: of the same shape, without gradient.
        clip_low, clip_high: how far the ratio may fall below and rise above 1 and still earn a gradient.
        dual_clip: bound on the loss of a token with A < 0, in units of −A; more than 1; None: no bound.

    Returns:
        PolicyLoss with sums ``clip_fraction``, ``dual_clip_fraction`` (with dual_clip), ``approx_kl``
        (k3 of π_old against π), ``ratio``; maximum ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(clip_low=clip_low, clip_high=clip_high, zero=True)
    if dual_clip is not None and not dual_clip > 1:
        raise UserError(
            f"dual_clip bounds the ratio from above and must be more than 1, not {dual_clip}",
            where="algorithm.loss_options.dual_clip",
            fix="3 is usual; null: no bound",
        )
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    tokens, clipped = clipped_surrogate(log_ratio.exp(), advantages, clip_low, clip_high)
    count = mask.sum()
    sums = {"clip_fraction": (clipped.sum(), count), **ratio_sums(log_ratio, mask)}
    if dual_clip is not None:
        bound = -dual_clip * advantages
        over = (advantages < 0) & (tokens > bound)
        sums["dual_clip_fraction"] = (over.sum(), count)
        tokens = torch.where(over, bound, tokens)
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
