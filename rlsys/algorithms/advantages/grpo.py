"""Group-relative policy optimisation (arXiv 2402.03300) and the variants of its baseline, scale and weight."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from rlsys.algorithms.advantages import ADVANTAGES, compares_in_group
from rlsys.algorithms.groups import centered, group_sizes, group_std, group_sums
from rlsys.config.errors import UserError

Std = Literal["sample", "population", "batch", "others", "none"]


@ADVANTAGES.register("grpo")
@compares_in_group
def grpo(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    std: Std | None = None,
    eps: Annotated[float, Field(gt=0)] | None = None,
    leave_one_out: bool = False,
    length_unbiased: bool = False,
    weighting: Literal["none", "variance"] = "none",
) -> torch.Tensor:
    """(R − baseline) / (std + eps), the baseline being the mean of the group; 0 in a group of one.

    Args:
        rewards: [B].
        groups: [B] int64, group of each sample.
        std: ``sample`` (the default) is the group's with n − 1 (verl, TRL, OpenRLHF), ``population`` with n, ``batch``
            that of all rewards of the batch with n − 1 (TRL's scale_rewards="batch"), ``others`` that of the group's
            other samples with n − 2, where 0 leaves the division out (NeMo-RL's leave-one-out), ``none`` leaves it out.
        eps: added to the standard deviation, and more than 0: a group of equal rewards has none; 1e-6 by default (verl;
            TRL: 1e-4, OpenRLHF: 1e-9); ``others`` takes none.
        leave_one_out: the baseline is the mean of the group's other samples (arXiv 2402.14740), and the division is
            as ``std`` says.
        length_unbiased: Dr. GRPO's correction (arXiv 2503.20783) as far as it concerns the advantage: R − baseline
            without division, which is what published trainers compute under this name, and the same as std="none". The
            other half of that paper, no division by the response's length, is the aggregation
            ``seq-mean-token-sum-norm``. It is not the length-weighted baseline, which is the estimator ``opo``.
        weighting: ``variance`` multiplies by the population variance of the group's rewards, which for rewards of 0
            and 1 is p(1 − p), p being the fraction that succeeded: groups of middling difficulty count most. For other
            rewards it is that same variance, and scales with their square.

    Returns:
        [B] float32.

    Raises:
        UserError: options that contradict each other or that the others leave without effect.
    """
    std = _chosen_std(std, eps, length_unbiased)
    deviations = centered(rewards, groups)
    sizes = group_sizes(groups)
    # R − (S − R)/(n − 1) = (R − S/n) · n/(n − 1)
    advantages = deviations * sizes / (sizes - 1).clamp(min=1) if leave_one_out else deviations
    if std == "others":
        scale = _std_of_others(deviations, groups)
        advantages = torch.where(scale > 0, advantages / scale.clamp(min=1e-300), advantages)
    elif std != "none":
        advantages = advantages / (_std(std, rewards, deviations, groups) + (1e-6 if eps is None else eps))
    if weighting == "variance":
        advantages = advantages * group_std(deviations, groups, correction=0).square()
    return advantages.to(torch.float32)


def _chosen_std(std: Std | None, eps: float | None, length_unbiased: bool) -> Std:
    if length_unbiased and std not in (None, "none"):
        raise UserError(
            f"length_unbiased leaves the standard deviation out, and std={std} divides by it",
            where="algorithm.advantage_options.length_unbiased",
            fix="leave one of the two out",
        )
    chosen: Std = "none" if length_unbiased else std or "sample"
    if eps is not None and chosen in ("none", "others"):
        raise UserError(
            f"eps is added to a standard deviation, and std={chosen} adds it to nothing",
            where="algorithm.advantage_options.eps",
            fix="leave it out",
        )
    return chosen


def _std(std: Std, rewards: torch.Tensor, deviations: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    if std == "batch":
        everyone = torch.zeros_like(groups)
        return group_std(centered(rewards, everyone), everyone, correction=1)
    return group_std(deviations, groups, correction=0 if std == "population" else 1)


def _std_of_others(deviations: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[B] with n − 2; 0 where the others are equal, or fewer than two."""
    sizes = group_sizes(groups).to(torch.float64)
    squares = group_sums(deviations.square(), groups)
    # Σ over others of (R − their mean)² = Q − c²·n/(n − 1); what is left of equal others is round-off
    others = squares - deviations.square() * sizes / (sizes - 1).clamp(min=1)
    others = torch.where(others > 1e-12 * squares, others, 0.0)
    return (others / (sizes - 2).clamp(min=1)).sqrt()
