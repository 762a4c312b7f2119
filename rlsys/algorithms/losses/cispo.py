"""CISPO: the importance weight is clipped, not the update (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from typing import Literal

import torch

from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss
from rlsys.algorithms.losses.surrogate import (
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_positive,
    same_shape,
)
from rlsys.config.errors import UserError


@POLICY_LOSSES.register("cispo")
def cispo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cap: Literal["window", "absolute"] = "window",
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> PolicyLoss:
    """−sg(clip(r))·A·log π with r = π/π_old: every token keeps a gradient, of a bounded weight.

    Args:
        logprobs: log π, carries the gradient.
        old_logprobs, advantages, mask: of the same shape, without gradient.
        cap: ``window``: the weight lies within [1 − clip_low, 1 + clip_high]; ``absolute``: it is at most clip_high.
            Both are in use under one name.
        clip_low: of the window; None: no lower bound, as in the paper.
        clip_high: None: 0.2 for the window, 5 for the absolute cap.

    Returns:
        PolicyLoss with sums ``clip_fraction``, ``approx_kl``, ``ratio``; maximum ``ratio_max``.

    Raises:
        UserError: an option is out of its range, or has no effect.
        ValueError: shapes disagree.
    """
    if cap == "absolute" and clip_low is not None:
        raise UserError(
            "an absolute cap has no lower bound", where="algorithm.loss_options.clip_low", fix="cap=window has one"
        )
    if clip_high is None:
        clip_high = 0.2 if cap == "window" else 5.0
    require_positive(clip_high=clip_high, zero=cap == "window")
    if clip_low is not None:
        require_positive(clip_low=clip_low, zero=True)
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask).detach()
    ratio = log_ratio.exp()
    low = 1 - clip_low if clip_low is not None else 0.0
    weight = ratio.clamp(low, 1 + clip_high if cap == "window" else clip_high)
    tokens = -weight * advantages * torch.where(mask, logprobs, 0.0)
    clipped = (weight != ratio) & mask
    sums = {"clip_fraction": (clipped.sum(), mask.sum()), **ratio_sums(log_ratio, mask)}
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
