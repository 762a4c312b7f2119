"""Sums along a response and statistics over all tokens: what token-level estimators are made of.

Flat tokens: N response tokens of all rows laid end to end, ``rows`` [N] int64 the row of each, ``mask`` [N] bool the
sampled ones. Given tokens (a tool's answer, the next turn's prompt) are passed over as if they were not there: the
token after a sampled one is the row's next *sampled* one. Arithmetic is in float64.
"""

from __future__ import annotations

import torch

from rlsys.algorithms.collective import Collective

# Variance below which whitening no longer scales up, as in the common implementations.
_WHITEN_EPS = 1e-8


def spread_rewards(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    num_rows: int,
    token_penalty: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reward of each sample on its last sampled token, less a penalty on every sampled token.

    A row without a sampled token has nowhere to put its reward, and nothing to learn.

    Args:
        rewards: [B].
        token_penalty: [N], such as coefficient · KL; what it says off the mask does not count.

    Returns:
        [N] float64, 0 off the mask.

    Raises:
        ValueError: shapes disagree.
    """
    check_flat(mask, rows, token_penalty=token_penalty)
    if rewards.shape != (num_rows,):
        raise ValueError(f"{num_rows} rows have rewards of shape {tuple(rewards.shape)}")
    spread = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    sampled = mask.nonzero().flatten()
    last = torch.full((num_rows,), -1, dtype=torch.int64, device=mask.device)
    last.scatter_reduce_(0, rows[sampled], sampled, "amax")
    spread[last[last >= 0]] = rewards.to(spread)[last >= 0]
    if token_penalty is not None:
        spread -= torch.where(mask, token_penalty.to(spread), 0.0)
    return spread


def next_sampled(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of sampled tokens alone [M], the value of the row's next one; 0 after its last."""
    after = torch.zeros_like(values)
    after[:-1] = torch.where(rows[1:] == rows[:-1], values[1:], 0.0)
    return after


def discounted_sums(values: torch.Tensor, rows: torch.Tensor, num_rows: int, decay: float) -> torch.Tensor:
    """Σ_k decay^k · value k tokens later in the row, of sampled tokens alone: values, rows [M] -> [M] float64."""
    lengths = torch.bincount(rows, minlength=num_rows)
    place = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
    longest = int(lengths.max()) if num_rows else 0
    # time first: one step back is one operation on all rows, and rows that have ended hold zeros
    sums = torch.zeros(longest, num_rows, dtype=torch.float64, device=values.device)
    sums[place, rows] = values.to(torch.float64)
    for t in range(longest - 2, -1, -1):
        sums[t].add_(sums[t + 1], alpha=decay)
    return sums[place, rows]


def whiten(values: torch.Tensor, collective: Collective) -> torch.Tensor:
    """(x − mean) / √(variance + 1e-8) over the tokens of all ranks: [M] float64 of sampled tokens alone.

    The variance is the unbiased one (n − 1), as in verl's ``masked_whiten``. The mean is known before squares are
    summed up, so that a large mean costs no digits. One token in all gives 0.
    """
    values = values.to(torch.float64)
    count, total = collective.sum([float(len(values)), float(values.sum())])
    deviations = values - total / max(count, 1.0)
    (squares,) = collective.sum([float(deviations.square().sum())])
    return deviations / (squares / max(count - 1, 1.0) + _WHITEN_EPS) ** 0.5


def whiten_samples(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What :func:`whiten` gives where sample i has ``lengths`` [B] int64 tokens of one value [B]: [B] float64."""
    values, weights = values.to(torch.float64), lengths.to(torch.float64)
    count = float(weights.sum())
    deviations = values - (weights * values).sum() / max(count, 1.0)
    return deviations / ((weights * deviations.square()).sum() / max(count - 1, 1.0) + _WHITEN_EPS) ** 0.5


def check_flat(mask: torch.Tensor, rows: torch.Tensor, **columns: torch.Tensor | None) -> None:
    """That everything has one value a token, and that each row's tokens lie together.

    Raises:
        ValueError: a column has another shape than the mask, which must be flat, or ``rows`` falls.
    """
    for name, column in {"rows": rows, **columns}.items():
        if column is not None and (column.shape != mask.shape or mask.ndim != 1):
            raise ValueError(f"{name} of shape {tuple(column.shape)} beside a mask of shape {tuple(mask.shape)}")
    if (rows.diff() < 0).any():
        raise ValueError("rows of tokens are not laid end to end: their indices fall")
