"""A CPU sampler's sleep, inside vLLM's processes. On GPUs vLLM sleeps by itself (``enable_sleep_mode``), through an
allocator that unmaps memory below its tensors; there is none for a CPU, so here the storages are emptied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rlsys.engines.storages import Emptied, storages


def _resting(*_: Any) -> torch.Tensor:
    raise RuntimeError("the sampler computes while it sleeps")


class Sleeper:
    """Of one rank. The model's buffers (tables of positions) stay: nobody sends them."""

    def __init__(self, model: torch.nn.Module, caches: list[torch.Tensor]):
        self._model, self._caches = model, caches
        self._weights: Emptied | None = None
        self._cache: Emptied | None = None
        self._filled = True  # vLLM writes to all of its cache when it starts

    def sleep(self, *, weights: bool) -> int:
        """Gives back the cache's memory, and the weights'. Returns at least how many bytes: what kernels have packed
        for themselves goes too, and is not counted, nor is a cache of which only some blocks were written to since it
        was made again: a CPU's untouched pages take nothing."""
        due = 0
        if self._cache is None:
            self._cache = Emptied(storages(self._caches, "cpu"))
            due += self._cache.nbytes if self._filled else 0
            self._filled = False
        if weights and self._weights is None:
            for module in self._model.modules():
                if hasattr(module, "cpu_linear"):  # it holds a packed copy; loading new weights makes a new one
                    module.cpu_linear = _resting
            self._weights = Emptied(storages(self._parameters(), "cpu"))
            due += self._weights.nbytes
        return due

    def make_room(self) -> None:
        """For new weights."""
        if self._weights is not None:
            self._weights.restore()
            self._weights = None

    def wake(self) -> None:
        """The cache has memory again. Every block of it is written to before it is read."""
        if self._cache is not None:
            self._cache.restore()
            self._cache = None

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (p.data for p in self._model.parameters() if p.untyped_storage().resizable())
