"""Group sequence policy optimisation (arXiv 2507.18071)."""

from __future__ import annotations

import torch

from rlsys.algorithms.aggregation import row_mean
from rlsys.algorithms.losses import POLICY_LOSSES, PolicyLoss, aggregated
from rlsys.algorithms.losses.surrogate import (
    clipped_surrogate,
    masked_log_ratio,
    ratio_maxima,
    ratio_sums,
    require_positive,
    same_shape,
)
from rlsys.config.plugins import reads

# A bound on the sequence's log-ratio, which is a mean: e^10 is five orders beyond any clip range.
_LOG_RATIO_LIMIT = 10.0


@POLICY_LOSSES.register("gspo")
@aggregated("seq-mean-token-mean")
@reads("rows", "num_rows")
def gspo(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    rows: torch.Tensor,
    num_rows: int,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """The clipped surrogate on the ratio of whole sequences, s = exp(mean over the row of log π − log π_old).

    The ratio of a token is sg(s)·π/sg(π): its value is s, and its gradient goes to its own log-prob alone (GSPO-token,
    eq. 13), so that advantages may differ by token; where they do not, the gradient is that of s. Where s is clipped
    the gradient of the whole row is exactly 0.

    Args:
        logprobs: [N] log π, carries the gradient.
        old_logprobs, advantages, mask: [N], without gradient.
        rows: [N] int64, the row of each token; rows are whole. num_rows: B.
        clip_low, clip_high: how far s may fall below and rise above 1 and still earn a gradient.

    Returns:
        PolicyLoss with sums ``clip_fraction`` (of tokens), ``approx_kl`` and ``ratio`` of the tokens' own ratios,
        ``sequence_ratio``; maximum ``ratio_max``.

    Raises:
        UserError: an option is out of its range.
        ValueError: shapes disagree.
    """
    require_positive(clip_low=clip_low, clip_high=clip_high, zero=True)
    same_shape(logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask, rows=rows)
    advantages = torch.where(mask, advantages, 0.0)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask).detach()
    own = torch.where(mask, logprobs, 0.0)
    log_sequence = row_mean(log_ratio, mask, rows, num_rows)[rows]
    ratio = (own - own.detach() + log_sequence).clamp(max=_LOG_RATIO_LIMIT).exp()
    tokens, clipped = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    count = mask.sum()
    sums = {
        "clip_fraction": (clipped.sum(), count),
        "sequence_ratio": (ratio.detach()[mask].sum(), count),
        **ratio_sums(log_ratio, mask),
    }
    return PolicyLoss(tokens, sums, ratio_maxima(log_ratio, mask))
