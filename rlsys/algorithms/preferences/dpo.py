"""Direct preference optimisation (arXiv 2305.18290), and with label smoothing (conservative DPO, Mitchell 2023)."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from rlsys.algorithms.preferences import (
    PREFERENCE_LOSSES,
    PairLogprobs,
    PreferenceLoss,
    check_sides,
    require,
    with_reference,
)


@PREFERENCE_LOSSES.register("dpo")
@with_reference
def dpo(chosen: PairLogprobs, rejected: PairLogprobs, *, beta: float = 0.1) -> PreferenceLoss:
    """−log σ(h) with h = β [(log π_c − log ref_c) − (log π_r − log ref_r)], on summed log-probs.

    Args:
        beta: β > 0, how hard the policy is held to the reference.

    Returns:
        margin h, the difference of the implicit rewards β (log π − log ref); their sums ``chosen_reward`` and
        ``rejected_reward``.

    Raises:
        UserError: β ≤ 0. ValueError: there is no reference, or shapes differ.
    """
    margin, sums = _implicit_rewards(chosen, rejected, beta)
    return PreferenceLoss(-logsigmoid(margin), margin.detach(), sums)


@PREFERENCE_LOSSES.register("cdpo")
@with_reference
def cdpo(
    chosen: PairLogprobs, rejected: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> PreferenceLoss:
    """−(1−ε) log σ(h) − ε log σ(−h), h as in ``dpo``: each label is wrong with probability ε. Least at σ(h) = 1 − ε.

    Args:
        beta: as of ``dpo``. label_smoothing: ε, at least 0 and below 1/2.

    Returns:
        As ``dpo``.

    Raises:
        UserError: β or ε out of its range. ValueError: there is no reference, or shapes differ.
    """
    require(
        0 <= label_smoothing < 0.5, "label_smoothing", f"label_smoothing is at least 0 and below 0.5: {label_smoothing}"
    )
    margin, sums = _implicit_rewards(chosen, rejected, beta)
    pairs = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return PreferenceLoss(pairs, margin.detach(), sums)


def _implicit_rewards(
    chosen: PairLogprobs, rejected: PairLogprobs, beta: float
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    require(beta > 0, "beta", f"beta is positive, not {beta}")
    check_sides(chosen, rejected)
    rewards = [beta * side.log_ratio for side in (chosen, rejected)]
    pairs = torch.tensor(len(chosen.policy), device=chosen.policy.device)
    names = ("chosen_reward", "rejected_reward")
    sums = {name: (reward.detach().sum(), pairs) for name, reward in zip(names, rewards, strict=True)}
    return rewards[0] - rewards[1], sums
