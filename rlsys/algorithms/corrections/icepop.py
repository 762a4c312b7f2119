"""IcePop: importance weights inside a window, nothing outside (https://ringtech.notion.site/icepop)."""

from __future__ import annotations

import torch

from rlsys.algorithms.corrections import CORRECTIONS, Correction, require_bounds
from rlsys.algorithms.corrections.ratio import log_ratio


@CORRECTIONS.register("icepop")
def icepop(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> Correction:
    """Weight r = π_old/μ for a token with low ≤ r ≤ high, else 0; tokens of weight 0 are still counted.

    Args:
        old_logprobs, rollout_logprobs, mask, rows, num_rows: as in ``apply_corrections``.
        low, high: 0 ≤ low ≤ 1 ≤ high.

    Returns:
        Correction with metrics ``weight`` and ``outside`` (fraction of tokens).
    """
    require_bounds("icepop", low, high)
    ratio = log_ratio(old_logprobs, rollout_logprobs, mask).exp()
    inside = (ratio >= low) & (ratio <= high) & mask
    weights = torch.where(inside, ratio, 0.0)
    count = mask.sum()
    return Correction(weights, mask, {"weight": (weights.sum(), count), "outside": ((mask & ~inside).sum(), count)})
