"""DPPO with a trust region in total variation (arXiv 2602.04879) and a quadratic KL term, against the sampler."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.surrogate import (
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_fraction,
    require_positive,
    same_shape,
)
from rlsys.config.plugins import reads


@POLICY_LOSSES.register("dppo_tv")
@reads("rollout_logprobs")
def dppo_tv(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    rollout_logprobs: torch.Tensor,
    mask_low: float = 0.2,
    mask_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    ratio_cap: float | None = None,
) -> PolicyLoss:
    """−adv_tau·A·r on the tokens that are kept + kl_tau·(log r)² on all, with r = π/μ.

    A token is dropped if its probability has already moved far in the direction that its advantage pushes it: A > 0
    and π − μ > mask_high, or A ≤ 0 and π − μ < −mask_low. It then earns no policy gradient, but the pull of the
    quadratic term back to μ remains. The count that the loss is divided by includes dropped tokens.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs: only for metrics; the trust region is around μ.
        advantages, mask: of the same shape, without gradient.
        rollout_logprobs: log μ, of the same shape.
        mask_low, mask_high: distances of probabilities, in 0 … 1.
        adv_tau, kl_tau: weights of the two terms.
        ratio_cap: the ratio counts at most this, and keeps its gradient there (truncated importance sampling); None:
            it is not capped.

    Returns:
        PolicyLoss with sums ``dropped_low``, ``dropped_high`` (of all tokens), ``rollout_ratio`` (π/μ), ``approx_kl``,
        ``ratio``; maximum ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_fraction(mask_low=mask_low, mask_high=mask_high)
    require_positive(adv_tau=adv_tau, kl_tau=kl_tau, zero=True)
    if ratio_cap is not None:
        require_positive(ratio_cap=ratio_cap)
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, rollout_logprobs=rollout_logprobs)
    advantages = torch.where(mask, advantages, 0.0)
    own, sampler = torch.where(mask, logprobs, 0.0), torch.where(mask, rollout_logprobs, 0.0)
    log_ratio = masked_log_ratio(logprobs, rollout_logprobs, mask)
    moved = own.detach().exp() - sampler.exp()
    high = (advantages > 0) & (moved > mask_high)
    low = (advantages <= 0) & (moved < -mask_low)
    ratio = log_ratio.exp()
    if ratio_cap is not None:
        # value min(r, cap), gradient min(r, cap)·∇log π: a bound on the weight, not an end of the gradient
        ratio = ratio.detach().clamp(max=ratio_cap) * (1 + own - own.detach())
    tokens = torch.where(high | low, 0.0, -adv_tau * advantages * ratio) + kl_tau * log_ratio.square()
    count = mask.sum()
    to_old = masked_log_ratio(logprobs, old_logprobs, mask)
    sums = {
        "dropped_low": ((low & mask).sum(), count),
        "dropped_high": (high.sum(), count),
        "rollout_ratio": (log_ratio.detach().exp()[mask].sum(), count),
        **ratio_sums(to_old, mask),
    }
    return PolicyLoss(tokens, sums, ratio_maxima(to_old, mask))
