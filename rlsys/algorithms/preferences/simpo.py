"""Simple preference optimisation, which needs no reference (arXiv 2405.14734)."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from rlsys.algorithms.preferences import (
    PREFERENCE_LOSSES,
    PairLogprobs,
    PreferenceLoss,
    check_sides,
    require,
    without_reference,
)


@PREFERENCE_LOSSES.register("simpo")
@without_reference
def simpo(chosen: PairLogprobs, rejected: PairLogprobs, *, beta: float = 2.0, gamma: float = 1.0) -> PreferenceLoss:
    """−log σ(β (mean log π_c − mean log π_r) − γ), means over a response's tokens.

    Args:
        beta: β > 0.
        gamma: γ ≥ 0, the margin that is asked for. The authors' code takes it as ``gamma_beta_ratio`` = γ / β: its 0.5
            with β = 2 is our γ = 1. TRL's ``simpo_gamma`` is our γ.

    Returns:
        margin β (mean log π_c − mean log π_r), without γ.

    Raises:
        UserError: β ≤ 0 or γ < 0. ValueError: shapes differ.
    """
    require(beta > 0, "beta", f"beta is positive, not {beta}")
    require(gamma >= 0, "gamma", f"gamma is a margin of at least 0, not {gamma}")
    check_sides(chosen, rejected)
    margin = beta * (chosen.a_token(chosen.policy) - rejected.a_token(rejected.policy))
    return PreferenceLoss(-logsigmoid(margin - gamma), margin.detach())
