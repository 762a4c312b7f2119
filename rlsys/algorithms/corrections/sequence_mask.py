"""Rows whose ratio π_old/μ leaves a window are left out (https://richardli.xyz/rl-collapse)."""

from __future__ import annotations

from typing import Literal

import torch

from rlsys.algorithms.aggregation import row_mean, row_sum
from rlsys.algorithms.corrections import CORRECTIONS, Correction, require_bounds
from rlsys.algorithms.corrections.ratio import keep_rows, log_ratio, row_max


@CORRECTIONS.register("sequence_mask")
def sequence_mask(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    low: float = 0.5,
    high: float = 2.0,
    ratio: Literal["geometric", "product", "worst"] = "geometric",
) -> Correction:
    """Keeps the rows with low ≤ ratio ≤ high.

    Args:
        old_logprobs, rollout_logprobs, mask, rows, num_rows: as in ``apply_corrections``.
        low, high: 0 ≤ low ≤ 1 ≤ high.
        ratio: of a row: the ``geometric`` mean of its tokens' ratios (independent of its length), their ``product``, or
            the ``worst`` of them: each token's must lie in the window.

    Returns:
        Correction with metrics ``kept`` (fraction of tokens) and ``rows_kept``.
    """
    require_bounds("sequence_mask", low, high)
    tokens = log_ratio(old_logprobs, rollout_logprobs, mask)
    if ratio == "worst":
        outside = (tokens.exp() < low) | (tokens.exp() > high)
        keep = row_max(outside.float(), mask, rows, num_rows) == 0
    else:
        reduce = row_mean if ratio == "geometric" else row_sum
        whole = reduce(tokens, mask, rows, num_rows).exp()
        keep = (whole >= low) & (whole <= high)
    return keep_rows(keep, mask, rows, num_rows)
