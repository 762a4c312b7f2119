"""Advantage estimators: from per-sample rewards to per-sample advantages. One file each.

An estimator is a function ``(rewards [B] float, groups [B] int64, *, options) -> advantages [B] float32``. ``groups``
holds the prompt group of each sample as an index 0 … G-1; groups may have lost samples and differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlsys.config.errors import UserError
from rlsys.config.plugins import Registry, check_options

Estimator = Callable[..., torch.Tensor]
ADVANTAGES: Registry[Estimator] = Registry("advantage estimator", "rlsys.algorithms.advantages")


def compares_in_group(estimator: Estimator) -> Estimator:
    """Decorator: the estimator compares a sample with others of its group, so one sample per prompt teaches nothing."""
    estimator.compares_in_group = True  # type: ignore[attr-defined]
    return estimator


def check_estimator(name: str, options: dict[str, Any], samples_per_prompt: int) -> None:
    """Refuses a configuration that cannot learn or that names unknown things; meant to run before anything starts.

    Raises:
        UserError: unknown estimator or option, or a group estimator with one sample per prompt.
    """
    estimator = ADVANTAGES.get(name, where="algorithm.advantage")
    check_options(estimator, options, where="algorithm.advantage_options")
    if samples_per_prompt < 2 and getattr(estimator, "compares_in_group", False):
        raise UserError(
            f"'{name}' compares the samples of a prompt with each other, and there is one sample per prompt",
            where="rollout.samples_per_prompt",
            fix="set rollout.samples_per_prompt to 2 or more",
        )


def group_index(uids: Sequence[str]) -> torch.Tensor:
    """Prompt-group ids as indices 0 … G-1, in the order of first appearance: [B] int64."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(uid, len(first)) for uid in uids], dtype=torch.int64)


def group_sizes(groups: torch.Tensor) -> torch.Tensor:
    """How many samples the group of each sample has: [B] int64."""
    return torch.bincount(groups)[groups]


def centered(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """R − mean of the group: [B] float64, so that equal rewards give 0 and not round-off over a tiny std."""
    values = rewards.to(torch.float64)
    sizes = torch.bincount(groups).to(torch.float64)
    sums = torch.zeros_like(sizes).index_add_(0, groups, values)
    return values - (sums / sizes)[groups]


def estimate(
    name: str, rewards: torch.Tensor, uids: Sequence[str], **options: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages of a batch by the estimator called ``name``.

    Args:
        rewards: [B].
        uids: prompt-group id of each sample.
        options: of the estimator.

    Returns:
        advantages [B] float32; metrics: ``groups``, ``groups_of_one`` (shrunk by drops: their advantage is 0) and
        ``groups_without_signal`` (fraction of groups all of whose rewards are equal).

    Raises:
        UserError: unknown estimator or option.
        ValueError: rewards and uids differ in number, or a reward is not finite.
    """
    estimator = ADVANTAGES.get(name, where="algorithm.advantage")
    check_options(estimator, options, where="algorithm.advantage_options")
    if rewards.shape != (len(uids),):
        raise ValueError(f"{len(uids)} samples have rewards of shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError(
            f"rewards of samples {torch.nonzero(~torch.isfinite(rewards)).flatten().tolist()} are not finite"
        )
    if not len(uids):
        return rewards.to(torch.float32), {"groups": 0.0, "groups_of_one": 0.0, "groups_without_signal": 0.0}
    groups = group_index(uids)
    sizes = torch.bincount(groups)
    top = torch.full(sizes.shape, -torch.inf, dtype=rewards.dtype).scatter_reduce_(0, groups, rewards, "amax")
    bottom = torch.full(sizes.shape, torch.inf, dtype=rewards.dtype).scatter_reduce_(0, groups, rewards, "amin")
    metrics = {
        "groups": float(len(sizes)),
        "groups_of_one": float((sizes == 1).sum()),
        "groups_without_signal": float((top == bottom).to(torch.float64).mean()),
    }
    return estimator(rewards, groups, **options), metrics
