"""Clip-Cov: a few tokens of high covariance earn no gradient, so that entropy does not collapse (arXiv 2505.22617)."""

from __future__ import annotations

from typing import Any

import torch

from rlsys.algorithms.collective import Collective
from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss, prepares
from rlsys.algorithms.losses.covariance import covariances
from rlsys.algorithms.losses.ppo_clip import ppo_clip
from rlsys.algorithms.losses.surrogate import require_fraction, require_positive, same_shape
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads

_RATIO, _LOWER, _UPPER = 2e-4, 1.0, 5.0


def select(
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    collective: Collective,
    *,
    cov_ratio: float = _RATIO,
    cov_low: float = _LOWER,
    cov_high: float = _UPPER,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """``detached`` [N] bool: max(⌊cov_ratio · tokens⌋, 1) tokens of those with cov_low < covariance < cov_high.

    The authors draw them at random from each micro-batch under π. Here they lie evenly over the candidates of the
    global batch, ordered by covariance under π_old: the same tokens for any cut into micro-batches and any number of
    ranks, and no random state. Candidates of equal covariance are selected together.
    """
    covariance = covariances(old_logprobs, advantages, mask, collective)
    candidate = (covariance > cov_low) & (covariance < cov_high)
    ordered = collective.gather(covariance[candidate]).sort().values
    count = max(int(cov_ratio * collective.sum([float(mask.sum())])[0]), 1)
    count = min(count, len(ordered))
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * (len(ordered) / max(count, 1))).long()
    return {"detached": candidate & torch.isin(covariance, ordered[places.to(ordered.device)])}


@POLICY_LOSSES.register("clip_cov")
@prepares(select)
@reads("prepared")
def clip_cov(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    prepared: dict[str, torch.Tensor],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cov_ratio: float = _RATIO,
    cov_low: float = _LOWER,
    cov_high: float = _UPPER,
) -> PolicyLoss:
    """``ppo_clip`` whose loss is exactly 0 on the selected tokens (:func:`select`); they still count as tokens.

    Args:
        logprobs: [N] log π, carries the gradient.
        old_logprobs, advantages, mask: [N], without gradient.
        prepared: ``detached`` [N] bool.
        clip_low, clip_high: as in ``ppo_clip``; the authors set both to 1, which is next to no clipping.
        cov_ratio: share of all tokens that is selected.
        cov_low, cov_high: bounds of the covariance of a candidate.

    Returns:
        PolicyLoss as ``ppo_clip``'s, with the sum ``covariance_selected``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(cov_ratio=cov_ratio)
    require_fraction(cov_ratio=cov_ratio)
    if not cov_low < cov_high:
        raise UserError(f"no covariance lies between {cov_low} and {cov_high}", where="algorithm.loss_options.cov_low")
    selected = prepared["detached"]
    same_shape(logprobs, detached=selected)
    surrogate = ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    selected = selected & mask
    sums = surrogate.sums | {"covariance_selected": (selected.sum(), mask.sum())}
    return PolicyLoss(torch.where(selected, 0.0, surrogate.tokens), sums, surrogate.maxima)
