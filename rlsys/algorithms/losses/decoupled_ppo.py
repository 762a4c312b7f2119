"""Decoupled PPO (arXiv 2110.00641; for asynchronous RL of language models AReaL, arXiv 2505.24298)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.ppo_clip import ppo_clip
from rlsys.algorithms.losses.surrogate import masked_log_ratio, require_positive, same_shape
from rlsys.config.plugins import reads


@POLICY_LOSSES.register("decoupled_ppo")
@reads("rollout_logprobs")
def decoupled_ppo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    rollout_logprobs: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weight_cap: float = 5.0,
    clamp: bool = False,
) -> PolicyLoss:
    """w·ppo_clip(π/π_prox) with w = π_prox/μ: the trust region is around a recent policy, w corrects for the sampler.

    A token with w > weight_cap is dropped (its loss is 0), or with ``clamp`` counts weight_cap. The count that the loss
    is divided by includes dropped tokens. The gradient of clipped, dropped and masked tokens is exactly 0.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs: log π_prox; advantages, mask: of the same shape, without gradient.
        rollout_logprobs: log μ, of the same shape.
        clip_low, clip_high, dual_clip: as in ``ppo_clip``.
        weight_cap, clamp: see above.

    Returns:
        PolicyLoss as ``ppo_clip``'s, with sums ``weight`` (0 where dropped) and ``weight_over_cap``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(weight_cap=weight_cap)
    same_shape(logprobs, rollout_logprobs=rollout_logprobs)
    surrogate = ppo_clip(
        logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    weight = masked_log_ratio(old_logprobs, rollout_logprobs, mask).detach().exp()
    over = weight > weight_cap
    weight = torch.where(over, weight_cap if clamp else 0.0, weight)
    count = mask.sum()
    sums = {"weight": (weight[mask].sum(), count), "weight_over_cap": ((over & mask).sum(), count)}
    return PolicyLoss(surrogate.tokens * weight, surrogate.sums | sums, surrogate.maxima)
