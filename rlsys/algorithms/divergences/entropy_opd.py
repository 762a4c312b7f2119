"""Entropy-aware on-policy distillation: forward KL where the teacher is unsure, reverse KL where it is sure."""

from __future__ import annotations

import math

import torch

from rlsys.algorithms.divergences import DIVERGENCES, entropy, kl, require
from rlsys.algorithms.divergences.sampled_token import sampled_token
from rlsys.config.plugins import reads


@DIVERGENCES.register("entropy_opd")
def entropy_opd(student: torch.Tensor, teacher: torch.Tensor, *, h_max: float | None = None) -> torch.Tensor:
    """Soft gate: w KL(T‖S) + (1−w) KL(S‖T) with w = clamp(H_T / h_max, 0, 1), H_T the teacher's entropy.

    Args:
        student, teacher: [n, W] log-probs.
        h_max: entropy in nats from which on only forward KL counts; None: log W, that of a uniform teacher (with top_k,
            over those words and the rest).

    Returns:
        [n] nats.

    Raises:
        UserError: h_max ≤ 0.
    """
    require(h_max is None or h_max > 0, "h_max", f"h_max is an entropy above 0, not {h_max}")
    gate = (entropy(teacher) / (math.log(teacher.shape[1]) if h_max is None else h_max)).clamp(0, 1)
    return gate * kl(teacher, student) + (1 - gate) * kl(student, teacher)


@DIVERGENCES.register("entropy_opd_additive")
@reads("targets")
def entropy_opd_additive(
    student: torch.Tensor, teacher: torch.Tensor, *, targets: torch.Tensor, threshold: float = 0.8
) -> torch.Tensor:
    """After arXiv 2603.07079: ``sampled_token`` on every token, *plus* KL(T‖S) where the teacher's entropy > threshold.

    Reverse KL is there as a policy gradient at the sampled token, and stays where forward KL joins it; a variant in
    which forward KL takes its place is another loss, and so is ``entropy_opd``.

    Args:
        student, teacher: [n, W] log-probs. targets: [n] int64.
        threshold: in nats.

    Returns:
        [n].

    Raises:
        UserError: threshold < 0, which no entropy is.
    """
    require(threshold >= 0, "threshold", f"threshold is an entropy of at least 0, not {threshold}")
    unsure = entropy(teacher) > threshold
    return sampled_token(student, teacher, targets=targets) + unsure * kl(teacher, student)
