"""Group filters: which prompt groups are worth training on. One file each.

A filter is a function ``(rewards [B] float, groups [B] int64, *, options) -> keep [G] bool``, with ``groups`` the
prompt group of each sample as an index 0 … G-1. What to do for the groups that are dropped is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlsys.algorithms.groups import group_index
from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options

GroupFilter = Callable[..., torch.Tensor]
GROUP_FILTERS: Registry[GroupFilter] = Registry("group filter", "rlsys.algorithms.filters")


def check_filters(filters: Mapping[str, dict[str, Any]], samples_per_prompt: int) -> None:
    """Refuses unknown filters and options, options without sense, and filters that would drop every group.

    Raises:
        UserError: at ``algorithm.filters.NAME``.
    """
    for name, options in filters.items():
        where = f"algorithm.filters.{name}"
        group_filter = GROUP_FILTERS.get(name, where=where)
        check_options(group_filter, options, where=where)
        if samples_per_prompt < 2 and getattr(group_filter, "compares_in_group", False):
            raise UserError(
                f"'{name}' judges a prompt by the rewards of its samples, and there is one sample per prompt",
                where=where,
                fix="set rollout.samples_per_prompt to 2 or more, or take the filter out",
            )
        _keep(name, options, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))


def kept(
    filters: Mapping[str, dict[str, Any]], rewards: torch.Tensor, uids: Sequence[str]
) -> tuple[torch.Tensor, dict[str, int]]:
    """Which groups pass all filters.

    Args:
        filters: options by name, in order.
        rewards: [B].
        uids: prompt-group id of each sample.

    Returns:
        keep [G] bool, groups in the order of their first appearance in ``uids``; by filter, how many groups it dropped
        that those before it had kept.

    Raises:
        UserError: unknown filter or option.
        ValueError: rewards and uids differ in number, a reward is not finite, or a filter does not judge each group.
    """
    if rewards.shape != (len(uids),):
        raise ValueError(f"{len(uids)} samples have rewards of shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards of samples {(~torch.isfinite(rewards)).nonzero().flatten().tolist()} are not finite")
    groups = group_index(uids)
    keep = torch.ones(len(torch.bincount(groups)), dtype=torch.bool)
    dropped = {}
    for name, options in filters.items():
        passed = _keep(name, options, rewards, groups)
        dropped[name] = int((keep & ~passed).sum())
        keep &= passed
    return keep, dropped


def _keep(name: str, options: dict[str, Any], rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    where = f"algorithm.filters.{name}"
    group_filter = GROUP_FILTERS.get(name, where=where)
    check_options(group_filter, options, where=where)
    keep = group_filter(rewards, groups, **options)
    count = len(torch.bincount(groups))
    if keep.shape != (count,) or keep.dtype != torch.bool:
        raise ValueError(f"filter '{name}' gives {keep.dtype} of shape {tuple(keep.shape)} for {count} groups")
    return keep
