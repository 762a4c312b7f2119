"""Imitation: −log π of the response tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlsys.algorithms.aggregation import Aggregation, normaliser, token_weights
from rlsys.algorithms.collective import Collective
from rlsys.algorithms.objective import ChannelSums, ForwardOutput, Prepared, ResponseBatch, live_fraction


@dataclass(frozen=True)
class CrossEntropy:
    """−log π of the response tokens, for supervised training. The engine divides logits by its temperature, which is 1
    for supervised training."""

    aggregation: Aggregation = "token-mean"
    horizon: int | None = None

    reads = ("response_mask",)
    sequences = ("response",)
    entropy_gradient = False
    divergence = None

    def prepare(self, batch: ResponseBatch, collective: Collective) -> Prepared:
        local = normaliser(self.aggregation, batch.columns["response_mask"], batch.rows, batch.num_rows)
        return Prepared(None if local is None else collective.sum([local])[0])

    def loss(self, batch: ResponseBatch, output: ForwardOutput, columns: Mapping[str, torch.Tensor]) -> ChannelSums:
        mask = batch.columns["response_mask"]
        weights = token_weights(self.aggregation, mask, batch.rows, batch.num_rows, self.horizon)
        sums = {
            "entropy": (output.entropy.detach()[mask].sum(), mask.sum()),
            "live_fraction": live_fraction(mask, batch),
        }
        return ChannelSums(-(torch.where(mask, output.logprobs, 0.0) * weights).sum(), {"tokens": mask.sum()}, sums)
