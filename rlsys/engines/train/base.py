"""The train-engine contract: the verbs of one trainer rank. Every rank of a group is called with the same verb at the
same time; collectives happen inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto


class TrainEngine(Protocol):
    """parameter_count: of the whole model, tied weights once."""

    parameter_count: int

    def forward(self, batch: DataProto) -> DataProto:
        """Log-probs of the response tokens, without gradient.

        Args:
            batch: this rank's rows (may be none) with ``prompt_ids``, ``response_ids`` and ``response_mask``.

        Returns:
            DataProto with the jagged columns ``logprobs`` and ``entropy`` (a critic's: ``values``) [B, j:response]
            float32 on the CPU, at the sampling temperature, rows in the order given; 0 where ``response_mask`` is 0.
        """
        ...

    def forward_backward(
        self, batch: DataProto, objective: Objective, *, channel_gradients: bool = False
    ) -> dict[str, float]:
        """Accumulates the gradient of ``objective`` over the global batch (all ranks' rows together).

        The normaliser of each channel is fixed over the global batch before the first micro-batch, so the gradient
        does not depend on micro-batches or ranks.

        Args:
            channel_gradients: also measure the norm of every channel's gradient (``CHANNEL/grad_norm``), for one more
                pass a channel.

        Returns:
            Metrics, reduced over ranks (the same on every rank): ``loss``; each channel's, prefixed by its name;
            ``tokens`` (prompt and response), ``padding_fraction``, ``micro_batches`` (of a rank).
        """
        ...

    def optim_step(self) -> dict[str, float]:
        """Clips, steps the optimiser and the schedule, zeroes the gradient. Returns ``grad_norm`` (before clipping),
        ``lr`` and ``skipped``: 1 where the loss or the gradient was not finite, and the weights stayed as they were."""
        ...

    def save_state(self, folder: Path) -> None:
        """Writes this rank's shard of weights, optimiser, schedule and RNG into ``folder`` (which exists)."""
        ...

    def load_state(self, folder: Path) -> None:
        """Reads what any number of ranks saved; afterwards this rank is where they were. With another number of ranks
        the generators of random numbers are seeded anew, from the run's seed, the rank and the step."""
        ...

    def export_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights by Hugging Face name, one after the other, cast to ``dtype``, on the CPU on rank 0. A
        collective: every rank must exhaust it; the tensors are the same on each. Tied weights appear once."""
        ...
