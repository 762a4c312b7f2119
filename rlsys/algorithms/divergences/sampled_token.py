"""Reverse KL from one sample: the response's own token, as in on-policy distillation without a vocabulary."""

from __future__ import annotations

import torch

from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.config.plugins import reads


@DIVERGENCES.register("sampled_token")
@reads("targets")
def sampled_token(student: torch.Tensor, teacher: torch.Tensor, *, targets: torch.Tensor) -> torch.Tensor:
    """−sg(log T(y) − log S(y)) · log S(y): a policy gradient with the advantage log T − log S.

    Its gradient is that of the single-sample estimate of KL(S‖T) (the score function's mean is 0); its value is not a
    divergence. Exactly 0, gradient included, where student and teacher agree on y.

    Args:
        student, teacher: [n, W] log-probs. targets: [n] int64, y.

    Returns:
        [n].
    """
    of_student, of_teacher = (log_p.gather(1, targets[:, None])[:, 0] for log_p in (student, teacher))
    return (of_student.detach() - of_teacher) * of_student
