"""Weight versions: (lineage, step). A trainer rolled back to a checkpoint starts a new lineage, so that a sampler
which is ahead of it is known to be stale."""

from __future__ import annotations

from typing import NamedTuple

GIVEN = -1  # version of a token that nobody sampled


class WeightVersion(NamedTuple):
    """lineage: how often the run was started or rolled back; step: optimiser steps the weights have behind them."""

    lineage: int
    step: int

    def packed(self) -> int:
        """As one int64, for a column; order is (lineage, step) order."""
        return self.lineage << 32 | self.step

    @classmethod
    def unpack(cls, value: int) -> WeightVersion:
        return cls(value >> 32, value & 0xFFFFFFFF)
