"""REINFORCE++ (arXiv 2501.03262): discounted returns with the KL penalty in them, on the scale of the whole batch."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, TokenAdvantages, token_level
from rlsys.algorithms.collective import Collective
from rlsys.algorithms.returns import discounted_sums
from rlsys.algorithms.returns import whiten as whitened


@ADVANTAGES.register("reinforce_plus_plus")
@token_level
def reinforce_plus_plus(
    token_rewards: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    collective: Collective,
    *,
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
    whiten: bool = True,
) -> TokenAdvantages:
    """G_t = Σ_k γ^k r_{t+k}, whitened over the batch; returns G.

    t counts a row's sampled tokens: a tool's answer between two turns neither discounts nor earns anything.

    Args:
        token_rewards: [N].
        mask: [N] bool, sampled tokens.
        rows: [N] int64, row of each token.
        num_rows: B.
        collective: the other ranks, for whitening.
        gamma: discount a token.
        whiten: advantages are whitened over the sampled tokens of all ranks (:func:`rlsys.algorithms.returns.whiten`).
    """
    sums = discounted_sums(token_rewards[mask], rows[mask], num_rows, gamma)
    advantages = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    returns = torch.zeros_like(advantages)
    returns[mask] = sums.to(torch.float32)
    advantages[mask] = (whitened(sums, collective) if whiten else sums).to(torch.float32)
    return TokenAdvantages(advantages, returns)
