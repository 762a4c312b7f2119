"""Which tokens drive the collapse of entropy: covariance of log-prob and advantage (arXiv 2505.22617)."""

from __future__ import annotations

import torch

from rlsys.algorithms.collective import Collective


def covariances(
    old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, collective: Collective
) -> torch.Tensor:
    """(A − mean A)·(log π_old − mean log π_old), means over the tokens of all ranks: [N] float64, −inf off the mask.

    float64, so that the same token has the same value whatever order its rank added up in.
    """
    logprobs = torch.where(mask, old_logprobs, 0.0).double()
    gains = torch.where(mask, advantages, 0.0).double()
    sums = collective.sum([float(gains.sum()), float(logprobs.sum()), float(mask.sum())])
    count = max(sums[2], 1.0)
    product = (gains - sums[0] / count) * (logprobs - sums[1] / count)
    return product.masked_fill(~mask, -torch.inf)
