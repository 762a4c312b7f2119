"""How far the sampler's log-probs are from the trainer's own on the tokens that were sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch_sums(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Sums over the sampled tokens, to be added up over micro-batches and ranks (``_max``: to be maximised).

    Args:
        old_logprobs: [T] log π_old, the trainer's own before its first optimiser step on the batch, in nats.
        rollout_logprobs: [T] log μ, the sampler's.
        mask: [T] bool, sampled tokens.

    Returns:
        ``abs`` Σ|log π_old − log μ|; ``k3`` Σ of the k3 estimate of KL(μ‖π_old) (samples are μ's); ``abs_max``; ``tokens``.
    """
    delta = (old_logprobs - rollout_logprobs).double()[mask.bool()]
    if not len(delta):
        return {"abs": 0.0, "k3": 0.0, "abs_max": 0.0, "tokens": 0.0}
    return {
        "abs": float(delta.abs().sum()),
        "k3": float((torch.expm1(delta) - delta).sum()),
        "abs_max": float(delta.abs().max()),
        "tokens": float(len(delta)),
    }
