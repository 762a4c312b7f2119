"""Rewards of a user's own, by import path, for runs in tests. What a reward worker imports is waited for at each start
of a run: no torch here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

_calls = 0


def digits(response: str, task: dict[str, Any]) -> float:
    """The fraction of digits: a reward that a random model varies in."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def gated_digits(response: str, task: dict[str, Any], *, gate: str, after: int) -> float:
    """:func:`digits`; from call ``after`` + 1 of its process on it does not return while the file ``gate`` exists."""
    global _calls
    _calls += 1
    while _calls > after and Path(gate).exists():
        time.sleep(0.05)
    return digits(response, task)


def spiky_digits(response: str, task: dict[str, Any]) -> float:
    """:func:`digits`; a hundred times that on the prompt ``spike``, and 0 on ``flat``."""
    return {"spike": 100.0, "flat": 0.0}.get(task["prompt"], 1.0) * digits(response, task)
