"""Geometric-mean policy optimisation (arXiv 2507.20673)."""

from __future__ import annotations

import torch

from rlsys.algorithms.aggregation import row_mean
from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss, aggregated
from rlsys.algorithms.losses.surrogate import (
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_positive,
    same_shape,
)
from rlsys.config.plugins import reads


@POLICY_LOSSES.register("gmpo")
@aggregated("seq-mean-token-mean")
@reads("rows", "num_rows")
def gmpo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    rows: torch.Tensor,
    num_rows: int,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> PolicyLoss:
    """−A·exp(mean over the row of the clipped log-ratio): the geometric mean of token ratios, clipped token by token.

    A row has one advantage, the mean over its tokens. Where it is positive a token's log-ratio counts at most
    ``clip_high``, where it is negative at least ``−clip_low``. The gradient of clipped and of masked tokens is exactly
    0. Every token of a row is given the row's loss, of which the aggregation takes the mean.

    Args:
        logprobs: [N] log π, carries the gradient.
        old_logprobs, advantages, mask: [N], without gradient.
        rows: [N] int64, the row of each token; rows are whole. num_rows: B.
        clip_low, clip_high: bounds on the log-ratio, in nats (0.4: ratios within e^±0.4).

    Returns:
        PolicyLoss with sums ``clip_fraction`` (of tokens), ``sequence_ratio``, ``approx_kl``, ``ratio``; maximum
        ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(clip_low=clip_low, clip_high=clip_high, zero=True)
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, rows=rows)
    advantage = row_mean(torch.where(mask, advantages, 0.0), mask, rows, num_rows)[rows]
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    bounded = torch.where(advantage > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    ratio = row_mean(bounded, mask, rows, num_rows).exp()[rows]
    tokens = torch.where(mask, -advantage * ratio, 0.0)
    count = mask.sum()
    clipped = (bounded != log_ratio) & (advantage != 0)
    sums = {
        "clip_fraction": (clipped.sum(), count),
        "sequence_ratio": (ratio.detach()[mask].sum(), count),
        **ratio_sums(log_ratio, mask),
    }
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
