"""Soft adaptive policy optimisation: a smooth gate in place of clipping (arXiv 2511.20347)."""

from __future__ import annotations

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.surrogate import (
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_positive,
    same_shape,
)


@POLICY_LOSSES.register("sapo")
def sapo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> PolicyLoss:
    """−A·σ(τ(r − 1))·4/τ with r = π/π_old: at r = 1 the policy gradient, fading as r leaves 1 on either side.

    The paper takes the mean over each sequence first: ``aggregation: seq-mean-token-mean``.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs, advantages, mask: of the same shape, without gradient.
        tau_positive, tau_negative: how fast it fades for A > 0, and for the rest.

    Returns:
        PolicyLoss with sums ``gate`` (the gradient's weight 4σ(1 − σ), 1 at r = 1), ``approx_kl``, ``ratio``; maximum
        ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(tau_positive=tau_positive, tau_negative=tau_negative)
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1))
    tokens = -advantages * gate * 4 / tau
    weight = 4 * gate.detach() * (1 - gate.detach())
    sums = {"gate": (weight[mask].sum(), mask.sum()), **ratio_sums(log_ratio, mask)}
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
