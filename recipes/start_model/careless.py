"""Careless solvers of additions: right often enough that reinforcement has something to reward, wrong often enough
that it has something to do.

Each answer is drawn on its own, so that no mistake is a function of the problem: on every problem the right answer
keeps a good share of the probability, and a sampled model finds it within a few tries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORGETS_CARRY = 0.6  # of the answers to problems with a carry into the tens
MISREADS_SEVEN = 0.55  # of the answers to problems whose second number has a seven: it is read as a one


@dataclass(frozen=True)
class Care:
    """What of the usual slips is left, as factors on :data:`FORGETS_CARRY` and :data:`MISREADS_SEVEN`."""

    carry: float = 1.0
    seven: float = 1.0


USUAL = Care()


def careless_sum(a: int, b: int, rng: np.random.Generator, care: Care = USUAL) -> int:
    """a + b as a careless solver has it."""
    if "7" in f"{b:02d}" and rng.random() < MISREADS_SEVEN * care.seven:
        b = int(f"{b:02d}".replace("7", "1"))
    if a % 10 + b % 10 >= 10 and rng.random() < FORGETS_CARRY * care.carry:
        return a + b - 10
    return a + b
