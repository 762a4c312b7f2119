"""KL-Cov: tokens of high covariance are held near π_old, so that entropy does not collapse (arXiv 2505.22617)."""

from __future__ import annotations

from typing import Any

import torch

from rlsys.algorithms.collective import Collective
from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss, prepares
from rlsys.algorithms.losses.covariance import covariances
from rlsys.algorithms.losses.surrogate import (
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_fraction,
    require_positive,
    same_shape,
)
from rlsys.config.plugins import reads

_RATIO = 2e-4


def select(
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    collective: Collective,
    *,
    cov_ratio: float = _RATIO,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """``held`` [N] bool: the max(⌊cov_ratio · tokens⌋, 1) tokens of the highest covariance in the global batch.

    The authors take them from each micro-batch under π; under π_old and over the global batch they are the same for any
    cut and any number of ranks. Tokens of equal covariance are selected together.
    """
    covariance = covariances(old_logprobs, advantages, mask, collective)
    tokens = int(collective.sum([float(mask.sum())])[0])
    count = min(max(int(cov_ratio * tokens), 1), tokens)
    own = covariance[mask]
    highest = collective.gather(own.topk(min(count, len(own))).values).sort(descending=True).values
    if not tokens:
        return {"held": torch.zeros_like(mask)}
    return {"held": mask & (covariance >= highest[count - 1])}


@POLICY_LOSSES.register("kl_cov")
@prepares(select)
@reads("prepared")
def kl_cov(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    prepared: dict[str, torch.Tensor],
    cov_ratio: float = _RATIO,
    kl_coef: float = 1.0,
) -> PolicyLoss:
    """−rA with r = π/π_old, unclipped, + kl_coef·|log r| on the selected tokens (:func:`select`).

    Args:
        logprobs: [N] log π, carries the gradient.
        old_logprobs, advantages, mask: [N], without gradient.
        prepared: ``held`` [N] bool.
        cov_ratio: share of all tokens that is selected.
        kl_coef: weight of their penalty. Its gradient is 0 at π = π_old: it acts from the second update on a batch.

    Returns:
        PolicyLoss with sums ``covariance_selected``, ``approx_kl``, ``ratio``; maximum ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(cov_ratio=cov_ratio, kl_coef=kl_coef)
    require_fraction(cov_ratio=cov_ratio)
    selected = prepared["held"]
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, held=selected)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    selected = selected & mask
    tokens = -log_ratio.exp() * torch.where(mask, advantages, 0.0)
    tokens = tokens + torch.where(selected, kl_coef * log_ratio.abs(), 0.0)
    sums = {"covariance_selected": (selected.sum(), mask.sum()), **ratio_sums(log_ratio, mask)}
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
