"""AdamW as every back end builds it: matrices decay, the rest does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsys.algorithms.schedules import no_decay
from rlsys.config.schema import TrainerConfig


def adamw(parameters: Mapping[str, torch.Tensor], trainer: TrainerConfig) -> torch.optim.AdamW:
    """Over ``parameters``, by Hugging Face name."""
    decayed = [p for name, p in parameters.items() if not no_decay(name, p.ndim)]
    plain = [p for name, p in parameters.items() if no_decay(name, p.ndim)]
    groups = [{"params": decayed, "weight_decay": trainer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.lr,
        betas=(trainer.betas[0], trainer.betas[1]),
        eps=trainer.eps,
        fused=True,
    )
