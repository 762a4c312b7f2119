"""Pieces that policy losses are made of: the ratio π/π_old, its clipped surrogate, its metrics, checks of options."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsys.config.errors import UserError

# exp(±20) is far outside any clip range and far inside float32's.
LOG_RATIO_LIMIT = 20.0

SumCount = tuple[Tensor, Tensor]


def same_shape(logprobs: Tensor, **others: Tensor) -> None:
    """Raises:
    ValueError: one of ``others`` is not of the shape of ``logprobs``.
    """
    for name, other in others.items():
        if other.shape != logprobs.shape:
            raise ValueError(f"logprobs have the shape {tuple(logprobs.shape)}, {name} {tuple(other.shape)}")


def masked_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π − log π_old within ±20, 0 off the mask; the gradient is log π's within the bounds, and 0 off the mask.

    Off the mask the inputs may hold anything, even infinities: they are replaced before any exp, not after.
    """
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """−min(rA, clip(r, 1 − clip_low, 1 + clip_high)A), and where clipping raised the loss (bool): the gradient is
    exactly 0 there."""
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def ratio_sums(log_ratio: Tensor, mask: Tensor) -> dict[str, SumCount]:
    """``approx_kl`` (k3 of π_old against π) and ``ratio``."""
    count = mask.sum()
    log_ratio = log_ratio.detach()
    return {
        "approx_kl": ((torch.expm1(log_ratio) - log_ratio)[mask].sum(), count),
        "ratio": (log_ratio.exp()[mask].sum(), count),
    }


def ratio_maxima(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``ratio_max``; 0 where there is no token."""
    ratio = log_ratio.detach().exp()
    return {"ratio_max": ratio.masked_fill(~mask, 0.0).flatten().amax() if ratio.numel() else ratio.new_zeros(())}


def require_fraction(**options: float) -> None:
    """Raises:
    UserError: an option is not in 0 … 1.
    """
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must lie in 0 … 1, not at {value}", where=f"algorithm.loss_options.{name}")


def require_positive(*, zero: bool = False, **options: float) -> None:
    """Raises:
    UserError: an option is not more than 0 (``zero``: not at least 0).
    """
    for name, value in options.items():
        if not (value > 0 or (zero and value == 0)):
            raise UserError(
                f"{name} must be {'at least' if zero else 'more than'} 0, not {value}",
                where=f"algorithm.loss_options.{name}",
            )
