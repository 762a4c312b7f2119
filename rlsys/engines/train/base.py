"""The train-engine contract: the verbs of one trainer rank. Every rank of a group is called with the same verb at the
same time; collectives happen inside.

The verbs are written once (``rlsys.engines.train.engine``); what differs between back ends is how a model is spread
over the ranks and stepped: ``ShardedModel`` and ``TrainedModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto
from rlsys.checkpoint.shards import Shard
from rlsys.engines.flops import Work

if TYPE_CHECKING:  # it imports transformers, which takes seconds, and the driver reads this module
    from rlsys.engines.train.model import PolicyModel, ValueModel


class TrainEngine(Protocol):
    """parameter_count: of the whole model, tied weights once; trained_count: of those that are trained, an adapter's or
    all; work: this rank's of the last ``forward_backward``, each row's once however often it was passed."""

    parameter_count: int
    trained_count: int
    work: Work

    def forward(self, batch: DataProto, *, adapter: bool = True) -> DataProto:
        """Log-probs of the response tokens, without gradient.

        Args:
            batch: this rank's rows (may be none) with ``prompt_ids``, ``response_ids`` and ``response_mask``.
            adapter: False: of the model that an adapter was put into, as training found it.

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
            ``tokens`` (prompt and response), ``micro_batches`` (of a rank), ``padding_fraction`` (of the inputs) and
            ``waste_fraction`` (padding, and what ranks with less in a micro-batch waited for).
        """
        ...

    def optim_step(self) -> dict[str, float]:
        """Clips, steps the optimiser and the schedule, zeroes the gradient. Returns ``grad_norm`` (before clipping),
        ``lr`` and ``skipped``: 1 where the loss or the gradient was not finite, and the weights stayed as they were."""
        ...

    def save_state(self, folder: Path) -> None:
        """Writes this rank's shard of weights, optimiser, schedule and RNG into ``folder`` (which exists). Of a model
        with an adapter, the adapter's alone."""
        ...

    def load_state(self, folder: Path) -> None:
        """Reads what any number of ranks saved; afterwards this rank is where they were. With another number of ranks
        the generators of random numbers are seeded anew, from the run's seed, the rank and the step."""
        ...

    def offload(self, *, weights: bool = True) -> int:
        """Moves optimiser and gradient from the GPU to main memory, and with ``weights`` these too. Until
        :meth:`onload` nothing that reads them may be called. Does nothing where main memory is all there is.

        Returns:
            Bytes that were moved.
        """
        ...

    def onload(self, *, optimizer: bool = True) -> None:
        """Moves back what is away, bit for bit; without ``optimizer`` the weights alone."""
        ...

    def export_weights(
        self, dtype: torch.dtype, *, adapter: bool = True, on_device: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights by Hugging Face name, one after the other, cast to ``dtype``, on the CPU on rank 0. A
        collective: every rank must exhaust it; the tensors are the same on each. Tied weights appear once.

        Args:
            adapter: an adapter is merged into the weights; False: they are as training found them.
            on_device: where the model is, on rank 0 too.
        """
        ...

    def export_adapter(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """``….lora_A.weight`` and ``….lora_B.weight`` of every adapted layer, the second times the adapter's scale;
        otherwise as :meth:`export_weights`."""
        ...


class ShardedModel(Protocol):
    """A model whose weights are spread over the ranks.

    model: called like any module, by every rank at the same time.
    """

    model: PolicyModel | ValueModel

    def weights(self) -> dict[str, Shard]:
        """This rank's float32 slices by Hugging Face name (a value head by its own); tied weights once. Of a model that
        is trained, of what is trained. Views: whoever writes to them calls :meth:`moved`."""
        ...

    def moved(self) -> None:
        """The slices were written to: the next forward pass is about them."""
        ...

    def release(self) -> None:
        """Lets go of whole weights that a forward pass without a backward pass left gathered."""
        ...


class TrainedModel(ShardedModel, Protocol):
    """A sharded model with its gradient and AdamW.

    run: the model's forward pass, where a backward pass may follow.
    names: of every weight, trained or frozen.
    parameter_count: of the whole, tied weights once; trained_count: without frozen ones.
    """

    run: Callable[..., Any]
    names: tuple[str, ...]
    parameter_count: int
    trained_count: int

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``, summed (not averaged) over ranks. A collective."""
        ...

    def gradient(self) -> dict[str, Shard]:
        """This rank's slices of what was added up, as views; empty before the first backward pass."""
        ...

    def drop_gradient(self) -> None:
        """Forgets it."""
        ...

    def step(self, lr: float) -> None:
        """AdamW at rate ``lr`` with the gradient as it is."""
        ...

    def moments(self) -> dict[str, Shard]:
        """This rank's slices of AdamW's moments, as exp_avg/NAME and exp_avg_sq/NAME, as views; 0 before a step."""
        ...

    def optimizer_memory(self) -> Iterator[torch.Tensor]:
        """Tensors that gradient, moments and whatever else only a step reads lie in."""
        ...

    def resume(self, steps: int) -> None:
        """Weights and moments were written to, and are those after ``steps`` optimiser steps."""
        ...

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A weight, cast and gathered, on the training device. A collective."""
        ...
