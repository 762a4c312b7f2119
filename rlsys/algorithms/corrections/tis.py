"""Truncated importance sampling, by token (https://fengyao.notion.site/off-policy-rl) and by sequence."""

from __future__ import annotations

import torch

from rlsys.algorithms.aggregation import row_sum
from rlsys.algorithms.corrections import CORRECTIONS, Correction, require_positive
from rlsys.algorithms.corrections.ratio import LOG_RATIO_LIMIT, log_ratio


@CORRECTIONS.register("tis_token")
def tis_token(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    cap: float = 2.0,
) -> Correction:
    """Weight min(r, cap) with r = π_old/μ of the token itself: low variance, biased (what came before is ignored).

    Args:
        old_logprobs, rollout_logprobs, mask, rows, num_rows: as in ``apply_corrections``.
        cap: more than 0.

    Returns:
        Correction with metrics ``weight`` and ``capped`` (fraction of tokens).
    """
    require_positive("tis_token", cap=cap)
    ratio = log_ratio(old_logprobs, rollout_logprobs, mask).exp()
    return _capped(ratio, mask, cap)


@CORRECTIONS.register("tis_sequence")
def tis_sequence(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    cap: float = 2.0,
) -> Correction:
    """Weight min(∏ r, cap), the product over the row's tokens: unbiased but for the cap, of high variance.

    Args, returns: as ``tis_token``.
    """
    require_positive("tis_sequence", cap=cap)
    tokens = log_ratio(old_logprobs, rollout_logprobs, mask)
    product = row_sum(tokens, mask, rows, num_rows).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return _capped(product[rows], mask, cap)


def _capped(ratio: torch.Tensor, mask: torch.Tensor, cap: float) -> Correction:
    weights = torch.where(mask, ratio.clamp(max=cap), 0.0)
    count = mask.sum()
    return Correction(
        weights, mask, {"weight": (weights.sum(), count), "capped": (((ratio > cap) & mask).sum(), count)}
    )
