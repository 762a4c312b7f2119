"""A trainer rank that rests: what it holds on its GPU goes to main memory and comes back, bit for bit and in place, so
that the sampler of the same GPU has room meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch.distributed.tensor import DTensor

from rlsys.engines.storages import HostMemory, Offloaded, storages
from rlsys.engines.train.base import ShardedModel, TrainedModel


class Resting:
    """Of one rank.

    Args:
        device: ``cuda``, or, where there is nothing to be won, None: then offloading does nothing. A CPU's tensors are
            in main memory already, and so are those of a GPU that has no other.
    """

    def __init__(self, device: str | None):
        self._device = device
        self._host = HostMemory(pinned=device == "cuda")
        self._optimizer: Offloaded | None = None
        self._weights: Offloaded | None = None

    def offload(self, trained: TrainedModel, teacher: ShardedModel | None, *, weights: bool) -> int:
        """Moves optimiser and gradient away, and with ``weights`` those too; what is away stays. Returns the bytes that
        were moved."""
        if self._device is None:
            return 0
        moved = 0
        if self._optimizer is None:
            self._optimizer = Offloaded(storages(trained.optimizer_memory(), self._device), self._host)
            moved += self._optimizer.nbytes
        if weights and self._weights is None:
            held = storages(chain(memory_of(trained), () if teacher is None else memory_of(teacher)), self._device)
            self._weights = Offloaded(held, self._host, self._optimizer.nbytes)
            moved += self._weights.nbytes
        return moved

    def onload(self, *, optimizer: bool = True) -> None:
        """Moves back what is away; weights alone without ``optimizer``."""
        if self._weights is not None:
            self._weights.restore()
            self._weights = None
        if optimizer and self._optimizer is not None:
            self._optimizer.restore()
            self._optimizer = None


def resting(device: torch.device) -> Resting:
    """For a rank that trains on ``device``."""
    discrete = device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated
    return Resting("cuda" if discrete else None)


def memory_of(model: ShardedModel) -> Iterator[torch.Tensor]:
    """What the weights of a model lie in, frozen ones and buffers too; none of it is away."""
    model.release()
    yield from (shard.local for shard in model.weights().values())
    yield from model.model.buffers()
    for parameter in model.model.parameters():
        yield parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        partition = getattr(parameter, "ds_tensor", None)  # ZeRO-3's part of it
        if partition is not None:
            yield partition.data
