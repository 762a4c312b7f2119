"""The critic's loss (arXiv 1707.06347, with the value clipping of its reference implementation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlsys.algorithms.collective import Collective
from rlsys.algorithms.objective import ChannelSums, ForwardOutput, Prepared, ResponseBatch, live_fraction


@dataclass(frozen=True)
class ValueLoss:
    """½ max((V − R)², (V_clipped − R)²) over sampled tokens, V_clipped = V_old + clamp(V − V_old, ±clip).

    clip: None: ½ (V − R)².
    """

    clip: float | None = 0.5

    sequences = ("response",)
    entropy_gradient = False
    divergence = None
    reads = ("response_mask", "values", "returns")

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        return Prepared(collective.sum([float(batch.columns["response_mask"].sum())])[0])

    def loss(self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor]) -> ChannelSums:
        if output.values is None:
            raise ValueError("the value loss needs a critic's values")
        mask = batch.columns["response_mask"]
        returns = torch.where(mask, batch.columns["returns"], 0.0)
        values = torch.where(mask, output.values, 0.0)
        errors, count = (values - returns).square(), mask.sum()
        sums = {}
        if self.clip is not None:
            old = torch.where(mask, batch.columns["values"], 0.0)
            clipped = (old + (values - old).clamp(-self.clip, self.clip) - returns).square()
            sums["clip_fraction"] = ((clipped > errors).sum(), count)
            errors = torch.maximum(errors, clipped)
        exact = (values.detach() - returns).double()
        sums |= {
            "error": (exact.square().sum(), count),
            "prediction": (values.detach().sum(), count),
            "prediction_square": (values.detach().square().sum(), count),
            "return": (returns.sum(), count),
            "return_square": (returns.square().sum(), count),
            "live_fraction": live_fraction(mask, batch),
        }
        return ChannelSums(0.5 * errors.sum(), {"tokens": count}, sums)
