"""What corrections are made of: the ratio π_old/μ, and results in which whole rows are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.algorithms.aggregation import live_rows
from rlsys.algorithms.corrections import Correction

# exp(±20) is far outside any bound and far inside float32's.
LOG_RATIO_LIMIT = 20.0


def log_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π_old − log μ of each token within ±20; 0 off the mask, whatever the inputs hold there."""
    return torch.where(mask, old_logprobs - rollout_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def row_max(values: Tensor, mask: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] largest of each row's unmasked values, which are not negative; 0 for a row that has none."""
    return values.new_zeros(num_rows).scatter_reduce(0, rows, torch.where(mask, values, 0.0), "amax")


def keep_tokens(keep: Tensor, mask: Tensor) -> Correction:
    """Weights of 1; metric ``kept``: of all unmasked tokens."""
    keep = keep & mask
    return Correction(mask.to(torch.float32), keep, {"kept": (keep.sum(), mask.sum())})


def keep_rows(keep: Tensor, mask: Tensor, rows: Tensor, num_rows: int) -> Correction:
    """As :func:`keep_tokens`, by row: keep [num_rows] bool; also the metric ``rows_kept``, of rows with any token."""
    live = live_rows(mask, rows, num_rows) > 0
    found = keep_tokens(keep[rows], mask)
    return Correction(found.weights, found.keep, found.sums | {"rows_kept": ((keep & live).sum(), live.sum())})
