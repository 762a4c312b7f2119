"""The generalised Jensen–Shannon divergence (arXiv 2306.13649, eq. 1; SDPO's α, arXiv 2601.20802)."""

from __future__ import annotations

import torch

from rlsys.algorithms.divergences import DIVERGENCES, kl, require


@DIVERGENCES.register("jsd")
def jsd(student: torch.Tensor, teacher: torch.Tensor, *, alpha: float = 0.5) -> torch.Tensor:
    """(1−α) KL(S‖M) + α KL(T‖M) with M = (1−α) S + α T; by convention KL(T‖S) at α = 0 and KL(S‖T) at α = 1.

    The ends are no limits: towards both, the divergence falls to 0 (as α KL(T‖S) near 0 and (1−α) KL(S‖T) near 1), and
    at them it jumps. So α = 0.01 is about a hundredth of α = 0 in loss and gradient, and a change of α from inside to
    an end calls for another weight or learning rate.

    Args:
        student, teacher: [n, W] log-probs.
        alpha: α, the teacher's share of M, from 0 to 1 (``beta`` of GKD).

    Returns:
        [n] nats, at most log 2 for α = 0.5.

    Raises:
        UserError: α out of its range.
    """
    require(0 <= alpha <= 1, "alpha", f"alpha is the teacher's share of the mixture, from 0 to 1, not {alpha}")
    if alpha == 0:
        return kl(teacher, student)
    if alpha == 1:
        return kl(student, teacher)
    with torch.no_grad():
        gap = teacher - student
        to_mixture = _log_mixture(gap, alpha)
        from_teacher = (teacher.exp() * (gap - to_mixture)).sum(-1)
    # S times a constant has the whole gradient, (1−α) S log(S/M): how M and log S move cancels out word by word.
    return alpha * from_teacher - (1 - alpha) * (student.exp() * to_mixture).sum(-1)


def _log_mixture(gap: torch.Tensor, alpha: float) -> torch.Tensor:
    """log M − log S from log T − log S; exactly 0 where that is. The larger of S and T is taken out, so that nothing
    overflows, and round-off is relative to the result, not to log S."""
    smaller = torch.where(gap > 0, gap.new_tensor(1 - alpha), gap.new_tensor(alpha))
    return gap.clamp(min=0) + torch.log1p(smaller * torch.expm1(-gap.abs()))
