"""Profiling a run: the trace of its steps over all actors, with torch's operators in the last one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlsys.tracking.meter import Span
from rlsys.tracking.throughput import ActorReading
from rlsys.tracking.trace import Trace
from rlsys.workers.waits import Call, gather

if TYPE_CHECKING:
    from rlsys.controller.job import Groups

_PINGS = 5
_SAME_CLOCK_S = 1e-3  # a smaller distance is what it takes to ask
_SECONDS = 120.0  # deadline of what only profiling asks for; operators of a long step are many


class Profile:
    """Collects while the job runs; the job tells it where a step begins and ends.

    Args:
        sampler_ops: the sampler computes with torch in its actor's own process, where a profiler sees it.
    """

    def __init__(self, groups: Groups, *, sampler_ops: bool):
        self.trace = Trace()
        self._groups, self._sampler_ops = groups, sampler_ops
        for name, ahead in clock_offsets(groups).items():
            self.trace.offsets[name] = ahead

    def before_step(self, *, last: bool) -> None:
        """last: of the run; its operators are recorded."""
        if last:
            _answers(self._recorded("record_ops"))

    def after_step(
        self, step: int, phases: Sequence[Span], readings: Sequence[ActorReading], start: float, *, last: bool
    ) -> None:
        """start: Unix seconds; the step ends now."""
        self.trace.steps.append(Span(f"step {step}", start, time.time()))
        self.trace.phases += [span for span in phases if span.start >= start]
        for actor in readings:
            self.trace.add_verbs(actor.name, [s for s in actor.reading.spans if s.stop >= start])
        if last:
            calls = self._recorded("take_ops")
            for call, ops in zip(calls, _answers(calls), strict=True):
                self.trace.add_ops(call.payload, ops)

    def finish(self, folder: Path, console: Console) -> None:
        """Writes ``trace.json`` and prints where the time went."""
        if not self.trace.steps:
            return
        path = self.trace.write(folder / "trace.json")
        for table in self.trace.tables():
            console.print(table)
            console.print()
        console.print(f"{path}: open it in ui.perfetto.dev or chrome://tracing", soft_wrap=True, markup=False)

    def _recorded(self, method: str) -> list[Call]:
        groups = self._groups
        calls = [*groups.trainer.asks(method), *(groups.critic.asks(method) if groups.critic is not None else ())]
        if not self._sampler_ops:
            return calls
        # Its forward passes run on a thread of their own.
        return calls + (
            groups.rollout.asks(method, all_threads=True) if method == "record_ops" else groups.rollout.asks(method)
        )


def clock_offsets(groups: Groups) -> dict[str, float]:
    """By actor, by how many seconds its clock is ahead of this process's: asked a few times, the quickest answer
    counts, as if given half-way (as NTP does, RFC 5905). 0 where the difference is below what asking takes."""
    offsets: dict[str, float] = {}
    for group in groups.present():
        best: dict[str, tuple[float, float]] = {}
        for _ in range(_PINGS):
            for call in group.asks("clock"):
                sent = time.time()
                (there,) = _answers([call])
                took = time.time() - sent
                best[call.payload] = min(best.get(call.payload, (float("inf"), 0.0)), (took, there - sent - took / 2))
        offsets |= {
            name: ahead if abs(ahead) > max(took, _SAME_CLOCK_S) else 0.0 for name, (took, ahead) in best.items()
        }
    return offsets


def _answers(calls: list[Call]) -> list:
    return gather(calls, phase="profile", seconds=_SECONDS)
