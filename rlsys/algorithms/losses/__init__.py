"""Policy losses: per-token losses, and metrics as sums and counts. One file each.

A policy loss is a function ``(logprobs, old_logprobs, advantages, mask, *, options) -> PolicyLoss``. Tensors have one
value a response token and one common shape; ``mask`` is true on the tokens that count. It returns no mean: the
aggregation weighs tokens, over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rlsys.config.plugins import Registry


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy loss returns.

    tokens: loss of each token, 0 off the mask, in the inputs' shape; carries the gradient.
    sums: by name, (sum, count) of a metric, without gradient.
    maxima: by name, the largest value of a metric, without gradient.
    """

    tokens: torch.Tensor
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)


PolicyLossFunction = Callable[..., PolicyLoss]
POLICY_LOSSES: Registry[PolicyLossFunction] = Registry("policy loss", "rlsys.algorithms.losses")
