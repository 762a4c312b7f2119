"""Rewards that a user might bring. Imports nothing heavy: reward processes start with it."""

from __future__ import annotations

import threading
from typing import Any


def hang(response: str, task: dict[str, Any]) -> float:
    threading.Event().wait()
    return 0.0


def length_of(response: str, task: dict[str, Any], *, times: float = 1.0) -> float:
    return times * len(response)
