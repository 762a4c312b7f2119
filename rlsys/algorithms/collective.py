"""What an algorithm may ask of the other ranks; one process answers itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Collective(Protocol):
    """Every rank calls the same method at the same time, also one that holds no rows."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise over ranks, in float64."""
        ...

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[n] of every rank, n may differ or be 0, one after the other: the same [Σ n] on each rank."""
        ...


class Alone:
    """One process."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values
