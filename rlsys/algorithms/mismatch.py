"""How far the sampler's log-probs are from the trainer's own on the tokens that were sampled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mismatch(NamedTuple):
    """Scalars over the sampled tokens, to be added up over micro-batches and ranks (``largest``: to be maximised).

    absolute: Σ|log π_old − log μ|; k3: Σ of the k3 estimate of KL(μ‖π_old), the samples being μ's; largest: max of the
    absolute difference; tokens: how many.
    """

    absolute: Tensor
    k3: Tensor
    largest: Tensor
    tokens: Tensor


def mismatch_sums(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Mismatch:
    """Compares trainer and sampler.

    Args:
        old_logprobs: [T] log π_old, the trainer's own before its first optimiser step on the batch, in nats.
        rollout_logprobs: [T] log μ, the sampler's.
        mask: [T] bool, sampled tokens.
    """
    delta = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).double()
    size = delta.abs()
    largest = size.amax() if len(size) else size.new_zeros(())
    return Mismatch(size.sum(), (torch.expm1(delta) - delta).sum(), largest, mask.sum())
