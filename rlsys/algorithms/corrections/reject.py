"""Tokens or rows on which an estimate of KL(μ‖π_old) is too large are left out (https://richardli.xyz/rl-collapse)."""

from __future__ import annotations

from typing import Literal

import torch

from rlsys.algorithms.aggregation import row_mean, row_sum
from rlsys.algorithms.corrections import CORRECTIONS, Correction, require_positive
from rlsys.algorithms.corrections.ratio import keep_rows, keep_tokens, log_ratio, row_max


@CORRECTIONS.register("reject")
def reject(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    *,
    threshold: float,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    over: Literal["row_mean", "row_sum", "row_max", "token"] = "row_mean",
) -> Correction:
    """Keeps what has an estimate of at most ``threshold``, in absolute value.

    Of a token, with r = π_old/μ: k1 = −log r; k2 = ½ log² r; k3 = r − 1 − log r.

    Args:
        old_logprobs, rollout_logprobs, mask, rows, num_rows: as in ``apply_corrections``.
        threshold: in nats, more than 0. For k1, log c keeps ratios (or their geometric mean, or product) in 1/c … c.
        estimator: see above.
        over: whole rows are judged by the mean, sum or maximum over their tokens, or each ``token`` by itself.

    Returns:
        Correction with metrics ``kept`` (fraction of tokens) and, by row, ``rows_kept``.
    """
    require_positive("reject", threshold=threshold)
    log = log_ratio(old_logprobs, rollout_logprobs, mask)
    if estimator == "k1":
        tokens = -log
    else:
        tokens = 0.5 * log.square() if estimator == "k2" else torch.expm1(log) - log
    if over == "token":
        return keep_tokens(tokens.abs() <= threshold, mask)
    if over == "row_max":
        rowwise = row_max(tokens.abs(), mask, rows, num_rows)
    else:
        rowwise = (row_mean if over == "row_mean" else row_sum)(tokens, mask, rows, num_rows)
    return keep_rows(rowwise.abs() <= threshold, mask, rows, num_rows)
