"""The two Kullback–Leibler divergences."""

from __future__ import annotations

import torch

from rlsys.algorithms.divergences import DIVERGENCES, kl


@DIVERGENCES.register("forward_kl")
def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher‖student): covers all that the teacher might say. Log-probs [n, W] -> [n] nats."""
    return kl(teacher, student)


@DIVERGENCES.register("reverse_kl")
def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student‖teacher): avoids what the teacher would not say. Log-probs [n, W] -> [n] nats."""
    return kl(student, teacher)
