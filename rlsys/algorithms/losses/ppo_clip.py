"""PPO's clipped surrogate (arXiv 1707.06347), asymmetric bounds (arXiv 2503.14476), dual clip (arXiv 1912.09729)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.config.errors import UserError

# exp(±20) is far outside any clip range and far inside float32's.
_LOG_RATIO_LIMIT = 20.0


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
    """
    if dual_clip is not None and dual_clip <= 1:
        raise UserError(
            f"dual_clip bounds the ratio from above and must be more than 1, not {dual_clip}",
            where="algorithm.loss_options.dual_clip",
            fix="3 is usual; null: no bound",
        )
    # Off the mask the inputs may hold anything, even infinities: they are replaced before exp, not after.
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    tokens = torch.maximum(unclipped, clipped)

    count = mask.sum()
    with torch.no_grad():
        sums = {
            "clip_fraction": ((clipped > unclipped).sum(), count),
            "approx_kl": ((torch.expm1(log_ratio) - log_ratio)[mask].sum(), count),
            "ratio": (ratio[mask].sum(), count),
        }
        maxima = {"ratio_max": ratio.masked_fill(~mask, 0.0).flatten().amax() if ratio.numel() else ratio.new_zeros(())}
    if dual_clip is not None:
        bound = -dual_clip * advantages
        over = (advantages < 0) & (tokens > bound)
        sums["dual_clip_fraction"] = (over.sum(), count)
        tokens = torch.where(over, bound, tokens)
    return PolicyLoss(tokens, sums, maxima)
