"""Identity preference optimisation (arXiv 2310.12036, eq. 17)."""

from __future__ import annotations

from rlsys.algorithms.preferences import (
    PREFERENCE_LOSSES,
    PairLogprobs,
    PreferenceLoss,
    check_sides,
    require,
    with_reference,
)


@PREFERENCE_LOSSES.register("ipo")
@with_reference
def ipo(
    chosen: PairLogprobs, rejected: PairLogprobs, *, beta: float = 0.1, length_averaged: bool = True
) -> PreferenceLoss:
    """(h − 1/(2β))² with h = (log π_c − log ref_c) − (log π_r − log ref_r): the margin goes to 1/(2β) and no further.

    Args:
        beta: β > 0 (τ in the paper).
        length_averaged: each side's log-ratio is divided by its length (TRL's convention, so that β means the same for
            short and long responses); false: sums, as the paper writes it.

    Returns:
        margin h.

    Raises:
        UserError: β ≤ 0. ValueError: there is no reference, or shapes differ.
    """
    require(beta > 0, "beta", f"beta is positive, not {beta}")
    check_sides(chosen, rejected)
    if length_averaged:
        margin = chosen.a_token(chosen.log_ratio) - rejected.a_token(rejected.log_ratio)
    else:
        margin = chosen.log_ratio - rejected.log_ratio
    return PreferenceLoss((margin - 1 / (2 * beta)) ** 2, margin.detach())
