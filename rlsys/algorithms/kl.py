"""Per-token estimators of KL(π ‖ π_ref) from the log-probs of sampled tokens (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal

import torch

KLEstimator = Literal["k1", "abs", "k2", "k3", "k3+"]
# k3 grows like exp(−log-ratio); both bounds keep one outlier token from deciding the loss.
_LOG_RATIO_LIMIT = 20.0
_K3_LIMIT = 10.0


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """KL of each token, in nats.

    - ``k1``: log π − log π_ref; unbiased, of either sign.
    - ``abs``: its absolute value.
    - ``k2``: half its square; biased, but its gradient is that of the KL in expectation.
    - ``k3``: r − 1 − log r with r = π_ref/π; unbiased, never negative; log r within ±20, the estimate at most 10.
    - ``k3+``: the value of k3, the gradient of k2.

    Args:
        logprobs, ref_logprobs: of one shape.

    Returns:
        The same shape.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "abs":
        return log_ratio.abs()
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        bounded = (-log_ratio).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        return (torch.expm1(bounded) - bounded).clamp(max=_K3_LIMIT)
    if estimator == "k3+":
        k2 = 0.5 * log_ratio.square()
        return k2 - k2.detach() + kl_estimate(logprobs.detach(), ref_logprobs, "k3")
    raise ValueError(f"unknown KL estimator '{estimator}'")


def corrected(kl: torch.Tensor, logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """The estimate times π/π_old: an estimate of the KL of π from samples of π_old (DeepSeek-V3.2, arXiv 2512.02556).

    The gradient goes through both factors. In expectation it is then the KL's own for k1 and k3, the unbiased ones,
    which it is not without the ratio, not even at π = π_old (as far as k3 is not cut off).

    Args:
        kl: what :func:`kl_estimate` returned for ``logprobs``.
        logprobs, old_logprobs: log π and log π_old, of its shape; their difference counts within ±20.

    Raises:
        ValueError: shapes disagree.
    """
    for other in (logprobs, old_logprobs):
        if other.shape != kl.shape:
            raise ValueError(f"the estimates have the shape {tuple(kl.shape)}, their log-probs {tuple(other.shape)}")
    return kl * (logprobs - old_logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()


def adapt(coef: float, kl: float, target: float, horizon: int, samples: int) -> float:
    """The next coefficient of a KL penalty that is to keep the KL near a target (arXiv 1909.08593, section 2.2).

    coef·(1 + clip(kl/target − 1, −0.2, 0.2)·samples/horizon), and never below 0.

    Args:
        coef: in use for the samples that ``kl`` was measured on.
        kl: their mean KL a token, in nats; may be negative, being an estimate. target: what it should be, more than 0.
        horizon: samples over which the coefficient may change by a fifth. samples: how many there were.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return max(coef * (1.0 + error * samples / horizon), 0.0)
