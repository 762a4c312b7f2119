"""Ragged response tokens for tests of policy losses and corrections, and ranks that share a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
TOKENS = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "mask", "rows")


def random_rows(seed: int, num_rows: int = 6, drift: float = 0.4) -> dict[str, Any]:
    """Flat float64 tokens of rows of 0 … 8 tokens, a fifth of them masked; one advantage a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = torch.arange(num_rows).repeat_interleave(torch.randint(0, 9, (num_rows,), generator=generator))
    old = -3 * torch.rand(len(rows), generator=generator, dtype=torch.float64) - 0.05
    return {
        "logprobs": old + drift * normal(len(rows)),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.3 * normal(len(rows)),
        "advantages": normal(num_rows)[rows],
        "mask": torch.rand(len(rows), generator=generator) < 0.8,
        "rows": rows,
        "num_rows": num_rows,
    }


def pick_rows(batch: dict[str, Any], order: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
    """The batch of these rows in this order, and where its tokens [n] lay in the whole batch."""
    places = [(batch["rows"] == row).nonzero().flatten() for row in order]
    where = torch.cat([*places, torch.empty(0, dtype=torch.int64)])
    part = {name: batch[name][where] for name in TOKENS}
    part["rows"] = torch.arange(len(order)).repeat_interleave(torch.tensor([len(p) for p in places], dtype=torch.int64))
    return part | {"num_rows": len(order)}, where


class Rank:
    """A collective of threads."""

    def __init__(self, rank: int, answers: list[Any], barrier: threading.Barrier):
        self._rank, self._answers, self._barrier = rank, answers, barrier

    def _exchange(self, mine: Any) -> list[Any]:
        self._answers[self._rank] = mine
        self._barrier.wait(10)
        everyone = list(self._answers)
        self._barrier.wait(10)
        return everyone

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self._exchange([float(v) for v in values]), strict=True)]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(values))


def on_ranks(count: int, work: Callable[[int, Rank], T]) -> list[T]:
    """What ``work(rank, collective)`` returns on each rank."""
    answers: list[Any] = [None] * count
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, Rank(rank, answers, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(result is not None for result in results)
    return results
