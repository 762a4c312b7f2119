"""What an actor measures about itself: when each verb ran, how much memory it took, and whatever the verb counts.

A worker inherits from :class:`Metered` and names its verbs; nothing else in it changes. Times are Unix seconds, so that
those of several processes can be laid side by side.
"""

from __future__ import annotations

import functools
import inspect
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from rlsys.tracking import stacks

if TYPE_CHECKING:  # it imports torch.profiler
    from rlsys.tracking.ops import Op, OpsRecorder


class Span(NamedTuple):
    """start, stop: Unix seconds."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Reading:
    """What an actor did since the reading before.

    spans: one a call of a verb, in the order in which they ended; they overlap where verbs do.
    counts: sums by name, of what verbs counted (``flops``).
    peaks: verb → the process's largest resident memory while it ran, bytes. gpu_peaks: likewise, of what torch had
        allocated on its GPU; empty without one.
    """

    pid: int
    host: str
    spans: list[Span]
    counts: dict[str, float]
    peaks: dict[str, int]
    gpu_peaks: dict[str, int] = field(default_factory=dict)


class Meter:
    """Of one process."""

    def __init__(self) -> None:
        self._running = 0
        self._clear()

    def _clear(self) -> None:
        self._spans: list[Span] = []
        self._counts: Counter[str] = Counter()
        self._peaks: dict[str, int] = {}
        self._gpu_peaks: dict[str, int] = {}

    def count(self, name: str, amount: float) -> None:
        self._counts[name] += amount  # type: ignore[assignment] # a Counter of floats

    @contextmanager
    def during(self, verb: str) -> Iterator[None]:
        """Measures what runs inside. Of verbs that overlap each has the peak since the first of them began."""
        if not self._running:
            _forget_peaks()
        self._running += 1
        began = time.time()
        try:
            yield
        finally:
            self._running -= 1
            self._spans.append(Span(verb, began, time.time()))
            self._peaks[verb] = max(self._peaks.get(verb, 0), peak_resident())
            if (allocated := _gpu_peak()) is not None:
                self._gpu_peaks[verb] = max(self._gpu_peaks.get(verb, 0), allocated)

    def take(self) -> Reading:
        """What was measured since the last time; starts anew."""
        reading = Reading(
            os.getpid(), socket.gethostname(), self._spans, dict(self._counts), self._peaks, self._gpu_peaks
        )
        self._clear()
        return reading


class Metered:
    """Base of a worker whose ``verbs`` (names of its methods, plain or coroutines) are measured.

        class RewardWorker(Metered, verbs=("score",)): ...

    Raises:
        AttributeError: the class has no such method.
    """

    def __init_subclass__(cls, verbs: Sequence[str] = (), **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for verb in verbs:
            setattr(cls, verb, _measured(getattr(cls, verb)))

    _recorder: OpsRecorder

    def __new__(cls, *_: Any, **__: Any) -> Metered:
        """Whoever is measured can also be asked where it is, by a signal, when it answers nothing else."""
        stacks.answer_signal()
        return super().__new__(cls)

    @functools.cached_property
    def meter(self) -> Meter:
        return Meter()

    def take_reading(self) -> Reading:
        return self.meter.take()

    def clock(self) -> float:
        """This host's Unix time: what the clocks of several hosts are compared by."""
        return time.time()

    def record_ops(self, *, all_threads: bool = False) -> None:
        """Starts torch's profiler in this process, for the calling thread and its backward passes, or for all."""
        from rlsys.tracking.ops import OpsRecorder

        self._recorder = OpsRecorder(all_threads=all_threads)

    def take_ops(self) -> list[Op]:
        """Ends it. Returns what it recorded."""
        return self._recorder.finish()


def _measured(method: Callable[..., Any]) -> Callable[..., Any]:
    name = method.__name__
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def waiting(self: Metered, *args: Any, **kwargs: Any) -> Any:
            with self.meter.during(name):
                return await method(self, *args, **kwargs)

        return waiting

    @functools.wraps(method)
    def calling(self: Metered, *args: Any, **kwargs: Any) -> Any:
        with self.meter.during(name):
            return method(self, *args, **kwargs)

    return calling


def busy_s(spans: Sequence[Span], start: float, stop: float) -> float:
    """Seconds between start and stop in which at least one of the spans ran."""
    total, done = 0.0, start
    for span in sorted(spans, key=lambda span: span.start):
        first, last = max(span.start, done), min(span.stop, stop)
        if last > first:
            total += last - first
            done = last
    return total


def peak_resident() -> int:
    """Bytes: this process's largest resident set since :func:`_forget_peaks`; where the kernel does not keep it, the
    present one."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the present one below
    return psutil.Process().memory_info().rss


def _forget_peaks() -> None:
    with suppress(OSError):  # where the kernel has no such file, or not for us, a peak is that of the whole life
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set alone
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def _gpu_peak() -> int | None:
    cuda = _cuda()
    return None if cuda is None else int(cuda.max_memory_allocated())


def _cuda() -> Any:
    """``torch.cuda`` where this process uses a GPU through torch; None elsewhere, and torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
