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
