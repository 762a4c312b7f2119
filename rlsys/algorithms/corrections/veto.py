"""A row with one token that the trainer finds all but impossible is left out (https://richardli.xyz/rl-collapse)."""

from __future__ import annotations

import math

import torch

from rlsys.algorithms.corrections import CORRECTIONS, Correction
from rlsys.algorithms.corrections.ratio import LOG_RATIO_LIMIT, keep_rows, log_ratio, row_max
from rlsys.config.errors import UserError


@CORRECTIONS.register("veto")
def veto(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    low: float = 1e-4,
) -> Correction:
    """Keeps the rows all of whose tokens have r = π_old/μ ≥ low: one token far below spoils all that came after it.

    Args:
        old_logprobs, rollout_logprobs, mask, rows, num_rows: as in ``apply_corrections``.
        low: more than e⁻²⁰ (where log r is cut off) and at most 1.

    Returns:
        Correction with metrics ``kept`` (fraction of tokens) and ``rows_kept``.
    """
    if not math.exp(-LOG_RATIO_LIMIT) < low <= 1:
        raise UserError(
            f"a ratio below {low} cannot be found", where="algorithm.correction.veto.low", fix="choose 1e-8 … 1"
        )
    catastrophic = log_ratio(old_logprobs, rollout_logprobs, mask).exp() < low
    return keep_rows(row_max(catastrophic.float(), mask, rows, num_rows) == 0, mask, rows, num_rows)
