"""Generalised advantage estimation (arXiv 1506.02438), PPO's with a critic."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, TokenAdvantages, token_level
from rlsys.algorithms.collective import Collective
from rlsys.algorithms.returns import discounted_sums, next_sampled
from rlsys.algorithms.returns import whiten as whitened
from rlsys.config.plugins import reads


@ADVANTAGES.register("gae")
@token_level
@reads("values")
def gae(
    token_rewards: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    collective: Collective,
    *,
    values: torch.Tensor,
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95,
    whiten: bool = True,
) -> TokenAdvantages:
    """A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ·V_{t+1} − V_t; returns A + V from before whitening.

    t counts a row's sampled tokens: the successor of a turn's last token is the first of the next turn, and a value or
    reward of a given token does not count. After the last one V is 0.

    Args:
        token_rewards: [N].
        mask: [N] bool, sampled tokens.
        rows: [N] int64, row of each token.
        num_rows: B.
        collective: the other ranks, for whitening.
        values: [N], the critic's value of the state before each token.
        gamma: discount a token.
        lam: λ = 1 is the return less the value, λ = 0 the one-step error.
        whiten: advantages are whitened over the sampled tokens of all ranks (:func:`rlsys.algorithms.returns.whiten`).
    """
    rows = rows[mask]
    sampled = values[mask].to(torch.float64)
    errors = token_rewards[mask].to(torch.float64) + gamma * next_sampled(sampled, rows) - sampled
    estimates = discounted_sums(errors, rows, num_rows, gamma * lam)
    advantages = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    returns = torch.zeros_like(advantages)
    returns[mask] = (estimates + sampled).to(torch.float32)
    advantages[mask] = (whitened(estimates, collective) if whiten else estimates).to(torch.float32)
    return TokenAdvantages(advantages, returns)
