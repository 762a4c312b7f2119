"""Sums over the samples of a prompt group, in float64: an advantage is a small difference of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def group_index(uids: Sequence[str]) -> torch.Tensor:
    """Prompt-group ids as indices 0 … G-1, in the order of first appearance: [B] int64."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(uid, len(first)) for uid in uids], dtype=torch.int64)


def group_sizes(groups: torch.Tensor) -> torch.Tensor:
    """How many samples the group of each sample has: [B] int64."""
    return torch.bincount(groups)[groups]


def group_sums(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sum over the group of each sample: values [B], groups [B] int64 -> [B] float64."""
    sums = torch.zeros(len(torch.bincount(groups)), dtype=torch.float64)
    return sums.index_add_(0, groups, values.to(torch.float64))[groups]


def group_range(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Largest − smallest reward of each group: [G], exactly 0 where all are equal."""
    bounds = torch.bincount(groups).to(rewards.dtype)
    top = torch.full_like(bounds, -torch.inf).scatter_reduce_(0, groups, rewards, "amax")
    bottom = torch.full_like(bounds, torch.inf).scatter_reduce_(0, groups, rewards, "amin")
    return top - bottom


def centered(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """R − mean of the group: [B] float64, so that equal rewards give 0 and not round-off over a tiny std."""
    return rewards.to(torch.float64) - group_sums(rewards, groups) / group_sizes(groups)


def group_std(deviations: torch.Tensor, groups: torch.Tensor, *, correction: int) -> torch.Tensor:
    """Standard deviation of the group of each sample: [B] float64, 0 in a group of ``correction`` samples or fewer.

    Args:
        deviations: [B] of the rewards from their group's mean.
        correction: 1 divides by n − 1, 0 by n.
    """
    return (group_sums(deviations.square(), groups) / (group_sizes(groups) - correction).clamp(min=1)).sqrt()


def normalized(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """(R − mean of the group) / (sample std of the group + eps): [B] float64; 0 in a group of one."""
    deviations = centered(rewards, groups)
    return deviations / (group_std(deviations, groups, correction=1) + eps)
