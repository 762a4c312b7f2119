"""How token losses become one number: a weight for each token and one normaliser over the global batch.

loss = Σ_tokens weight · loss / normaliser, where the normaliser is summed over all ranks before the first micro-batch.
A mean over micro-batches would weigh a token by how full its micro-batch happens to be.
"""

from __future__ import annotations

from typing import Literal

import torch

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def live_rows(mask: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Unmasked tokens of each row: mask [N] bool, rows [N] int64 (row of each token) -> [num_rows] int64."""
    return torch.zeros(num_rows, dtype=torch.int64, device=mask.device).index_add_(0, rows, mask.to(torch.int64))


def row_sum(values: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sum over the unmasked tokens of each row: values [N], mask [N] bool, rows [N] int64 -> [num_rows]."""
    return values.new_zeros(num_rows).index_add(0, rows, torch.where(mask, values, 0.0))


def row_mean(values: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean over the unmasked tokens of each row, 0 for a row that has none: as :func:`row_sum`."""
    return row_sum(values, mask, rows, num_rows) / live_rows(mask, rows, num_rows).clamp(min=1)


def token_weights(
    aggregation: Aggregation, mask: torch.Tensor, rows: torch.Tensor, num_rows: int, horizon: int | None = None
) -> torch.Tensor:
    """Weight of each token's loss, 0 off the mask.

    Args:
        mask: [N] bool.
        rows: [N] int64, the row that each token belongs to; rows are whole.
        num_rows: B.
        horizon: the constant that ``seq-mean-token-sum-norm`` divides by (the longest response allowed).

    Returns:
        [N] float32.
    """
    weights = mask.to(torch.float32)
    if aggregation == "seq-mean-token-mean":
        return weights / live_rows(mask, rows, num_rows).clamp(min=1)[rows]
    if aggregation == "seq-mean-token-sum-norm":
        if horizon is None or horizon <= 0:
            raise ValueError(f"seq-mean-token-sum-norm divides by a positive horizon, not {horizon}")
        return weights / horizon
    if aggregation in ("token-mean", "token-sum", "seq-mean-token-sum"):
        return weights
    raise ValueError(f"unknown aggregation '{aggregation}'")


def normaliser(aggregation: Aggregation, mask: torch.Tensor, rows: torch.Tensor, num_rows: int) -> float | None:
    """What these rows add to the normaliser: tokens, or rows with any unmasked token; None: nothing is divided by."""
    if aggregation == "token-sum":
        return None
    if aggregation == "token-mean":
        return float(mask.sum())
    return float((live_rows(mask, rows, num_rows) > 0).sum())
