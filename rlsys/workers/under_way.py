"""The waits of this process that are under way: what a watchdog looks at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsys.workers.waits import Call


@dataclass(eq=False)
class Wait:
    """One wait.

    pending: calls without an answer; whoever waits takes them out as answers come.
    since: when the last answer came, or the wait began; by the monotonic clock.
    """

    phase: str
    pending: Mapping[Any, Call]
    since: float = field(default_factory=time.monotonic)

    def answered(self) -> None:
        self.since = time.monotonic()

    def asked(self) -> list[tuple[str, str]]:
        """(actor, what for) of every call without an answer."""
        return [(call.actor, call.what) for call in list(self.pending.values())]


_LOCK = threading.Lock()
_WAITS: list[Wait] = []


@contextmanager
def under_way(phase: str, pending: Mapping[Any, Call]) -> Iterator[Wait]:
    """Registers a wait for the block. pending: stays the caller's, which takes out what has been answered."""
    wait = Wait(phase, pending)
    with _LOCK:
        _WAITS.append(wait)
    try:
        yield wait
    finally:
        with _LOCK:
            _WAITS.remove(wait)


def waits() -> list[Wait]:
    """Those with something left to wait for, longest silence first."""
    with _LOCK:
        return sorted((wait for wait in _WAITS if wait.pending), key=lambda wait: wait.since)
