"""The ranks' process group, and the few numbers that they reduce over it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from rlsys.algorithms.objective import ObjectiveSums, SumCount


def init_process_group(rank: int, world_size: int, master_addr: str, port: int, *, timeout_s: float) -> None:
    """Meets the other ranks: NCCL between GPUs, gloo between CPUs.

    Args:
        rank, world_size: of this process, from 0, and of all.
        master_addr, port: where rank 0 listens; the same on every rank.
        timeout_s: how long a rank waits for the others, here and in every collective, before it raises.
    """
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{master_addr}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def training_device() -> torch.device:
    """The process's current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def reduce_floats(values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    """Element-wise over ranks, on the CPU, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


class Ranks:
    """``Collective`` over the process group, on the CPU."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return reduce_floats(values, dist.ReduceOp.SUM)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        here = values.detach().cpu()
        counts = [int(n) for n in self._counts(len(here))]
        padded = torch.zeros(max(counts), dtype=here.dtype)
        padded[: len(here)] = here
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(values.device)

    def _counts(self, count: int) -> list[float]:
        counts = [0.0] * dist.get_world_size()
        counts[dist.get_rank()] = float(count)
        return self.sum(counts)


class Slots:
    """What micro-batches compute, beside what they are about."""

    def __init__(self) -> None:
        self._areas: list[float] = []
        self._tokens = 0

    def add(self, area: int, tokens: int) -> None:
        """A micro-batch's inputs with and without padding. Every rank adds as many micro-batches."""
        self._areas.append(float(area))
        self._tokens += tokens

    def reduce(self) -> dict[str, float]:
        """Over all ranks. ``padding_fraction``: of the inputs that were computed. ``waste_fraction``: of those that
        could have been: padding, and what a rank did not compute while it waited for the fullest one."""
        *areas, tokens = reduce_floats([*self._areas, self._tokens], dist.ReduceOp.SUM)
        slots = sum(reduce_floats(self._areas, dist.ReduceOp.MAX)) * dist.get_world_size()
        return {
            "padding_fraction": 1 - tokens / sum(areas) if tokens else 0.0,
            "waste_fraction": 1 - tokens / slots if tokens else 0.0,
        }


class Meter:
    """Metrics of one pass over a batch: added up over micro-batches on the device, reduced over ranks once."""

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}
        self._sums: dict[str, SumCount] = {}
        self._maxima: dict[str, torch.Tensor] = {}

    def add(self, result: ObjectiveSums) -> None:
        """Takes one micro-batch's metrics. Every rank adds at least one, and all have the same names."""
        for name, value in result.totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + value.double()
        for name, (value, count) in result.sums.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + value.double(), before[1] + count.double())
        for name, value in result.maxima.items():
            self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)

    def reduce(self) -> dict[str, float]:
        """Over all ranks: totals and sum / count (0 where nothing was counted), and maxima."""
        columns = [*self._totals.values(), *(v for pair in self._sums.values() for v in pair)]
        reduced = iter(reduce_floats(torch.stack(columns).tolist(), dist.ReduceOp.SUM))
        metrics = {name: next(reduced) for name in self._totals}
        for name in self._sums:
            value, count = next(reduced), next(reduced)
            metrics[name] = value / count if count else 0.0
        if self._maxima:
            largest = torch.stack([value.double() for value in self._maxima.values()]).tolist()
            metrics |= dict(zip(self._maxima, reduce_floats(largest, dist.ReduceOp.MAX), strict=True))
        return metrics
