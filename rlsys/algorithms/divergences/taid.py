"""TAID: a target that moves from the student to the teacher (arXiv 2501.16937)."""

from __future__ import annotations

import torch

from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.algorithms.taid import check_schedule
from rlsys.config.plugins import reads


@DIVERGENCES.register("taid")
@reads("t")
def taid(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    t: float,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
) -> torch.Tensor:
    """−Σ p_t log S with p_t = softmax((1−t) sg(log S) + t log T): a cross-entropy, so it includes the target's entropy.

    At t = 0 the teacher does not enter at all and the gradient is 0; at t = 1 it is KL(T‖S) plus the teacher's entropy.
    Log-probs in place of logits, and a temperature that both share, leave the target as it is.

    Args:
        student, teacher: [n, W] log-probs.
        t: the present interpolation. As an option (from 0 to 1) it stays there; without, it follows
            ``rlsys.algorithms.taid.advance``, whose arguments ``t_start``, ``t_end``, ``alpha``, ``beta`` are.

    Returns:
        [n] nats.

    Raises:
        UserError: an option of the schedule is out of its range.
    """
    check_schedule(t_start, t_end, alpha, beta)
    present = student.exp()
    fixed = student.detach()
    target = present.detach() if t == 0 else torch.softmax(torch.lerp(fixed, teacher, t), dim=-1)
    # What is added is 0, and makes the derivative S − p_t word by word: exactly 0 where the target is the student.
    return (present - present.detach() - target * student).sum(-1)
