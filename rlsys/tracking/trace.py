"""A trace of a few steps over all actors, for chrome://tracing and ui.perfetto.dev, and what it says as tables.

The file is in the Trace Event Format: a process (``pid``) for the driver and one for each actor, ``X`` events with
``ts`` and ``dur`` in microseconds since the trace began. Categories: ``step`` and ``phase`` (driver), ``verb``
(actors), ``op`` (torch's operators inside an actor).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from rlsys.checkpoint.atomic import writing
from rlsys.tracking.meter import Span, busy_s
from rlsys.tracking.ops import Op

_DRIVER = "driver"
_OPS_LANE = 100  # the first thread id of operators; verbs have the lower ones


@dataclass
class Trace:
    """What is known so far. All times are the driver's Unix seconds.

    steps, phases: of the driver. verbs, ops: by actor. offsets: by actor, what its clock is ahead of the driver's;
    they have been taken off.
    """

    steps: list[Span] = field(default_factory=list)
    phases: list[Span] = field(default_factory=list)
    verbs: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    ops: dict[str, list[Op]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)

    def add_verbs(self, actor: str, spans: Iterable[Span]) -> None:
        ahead = self.offsets.get(actor, 0.0)
        self.verbs[actor] += [Span(s.name, s.start - ahead, s.stop - ahead) for s in spans]

    def add_ops(self, actor: str, ops: Iterable[Op]) -> None:
        ahead = self.offsets.get(actor, 0.0)
        self.ops[actor] = [op._replace(start=op.start - ahead) for op in ops]

    @property
    def began(self) -> float:
        return min((span.start for span in self.steps), default=0.0)

    def content(self) -> dict[str, Any]:
        """JSON of the file."""
        events: list[dict[str, Any]] = []
        for pid, actor in enumerate([_DRIVER, *self.verbs]):
            events.append(_meta("process_name", pid, 0, name=actor))
            events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
            if pid:
                lanes = [("verb", lane, spans) for lane, spans in enumerate(in_lanes(self.verbs[actor]))]
            else:
                lanes = [("step", 0, self.steps), ("phase", 1, self.phases)]
            for kind, lane, spans in lanes:
                events.append(_meta("thread_name", pid, lane, name=f"{kind}s"))
                events += [self._event(s.name, kind, pid, lane, s.start, s.stop - s.start) for s in spans]
            events += self._op_events(pid, self.ops.get(actor, []))
        about = {"clock_offsets_s": self.offsets, "began_unix_s": self.began}
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}

    def write(self, path: Path) -> Path:
        """Raises:
        UserError: the disk is full.
        """
        with writing(path.name, path):
            path.write_text(json.dumps(self.content(), separators=(",", ":")) + "\n", encoding="utf-8")
        return path

    def _op_events(self, pid: int, ops: Sequence[Op]) -> list[dict[str, Any]]:
        lanes = {lane: _OPS_LANE + index for index, lane in enumerate(dict.fromkeys(op.lane for op in ops))}
        events = [_meta("thread_name", pid, number, name=f"torch {lane}") for lane, number in lanes.items()]
        return events + [self._event(op.name, "op", pid, lanes[op.lane], op.start, op.duration_s) for op in ops]

    def _event(self, name: str, kind: str, pid: int, tid: int, start: float, duration: float) -> dict[str, Any]:
        times = {"ts": round(1e6 * (start - self.began), 3), "dur": round(1e6 * duration, 3)}
        return {"name": name, "cat": kind, "ph": "X", "pid": pid, "tid": tid, **times}

    # --- what it says

    def tables(self) -> list[Table]:
        """Time of the loop's phases, of the actors' verbs, and of torch's operators."""
        return [self._phase_table(), self._verb_table(), *self._op_tables()]

    def _whole_s(self) -> float:
        return math.fsum(step.stop - step.start for step in self.steps)

    def _phase_table(self) -> Table:
        whole, spent = self._whole_s(), _sums(self.phases)
        table = _table("phase of the loop", "seconds a step", "share")
        for name, (seconds, _) in _largest(spent):
            table.add_row(name, f"{seconds / len(self.steps):.3f}", f"{seconds / whole:.1%}")
        rest = whole - math.fsum(seconds for seconds, _ in spent.values())
        table.add_row("between phases", f"{rest / len(self.steps):.3f}", f"{rest / whole:.1%}")
        return table

    def _verb_table(self) -> Table:
        whole = self._whole_s()
        table = _table("actor", "verb", "calls", "seconds a step", "share of the time", texts=2)
        for actor, spans in self.verbs.items():
            inside = [s for s in spans if s.stop > self.steps[0].start]
            for name, (_, calls) in _largest(_sums(inside)):
                busy = self._busy([s for s in inside if s.name == name])
                table.add_row(actor, name, str(calls), f"{busy / len(self.steps):.3f}", f"{busy / whole:.1%}")
            idle = whole - self._busy(inside)
            table.add_row(actor, "idle", "", f"{idle / len(self.steps):.3f}", f"{idle / whole:.1%}", style="dim")
        return table

    def _busy(self, spans: Sequence[Span]) -> float:
        return math.fsum(busy_s(spans, step.start, step.stop) for step in self.steps)

    def _op_tables(self, most: int = 12) -> list[Table]:
        tables = []
        for actor, ops in self.ops.items():
            own = own_times(ops)
            whole = math.fsum(seconds for seconds, _ in own.values()) or 1.0
            table = _table(f"torch in {actor}, the last step", "calls", "own ms", "share")
            for name, (seconds, calls) in _largest(own)[:most]:
                table.add_row(name, str(calls), f"{1e3 * seconds:.1f}", f"{seconds / whole:.1%}")
            tables.append(table)
        return tables


def in_lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans that overlap on different lanes, as few as it takes: a viewer draws a thread's events as nested calls."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.start):
        for lane in lanes:
            if lane[-1].stop <= span.start:
                lane.append(span)
                break
        else:
            lanes.append([span])
    return lanes


def own_times(ops: Sequence[Op]) -> dict[str, tuple[float, int]]:
    """Name → seconds in operators of that name without those that they call, and how many there were."""
    own: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    by_lane: dict[str, list[Op]] = defaultdict(list)
    for op in ops:
        by_lane[op.lane].append(op)
    for lane in by_lane.values():
        running: list[Op] = []
        for op in sorted(lane, key=lambda o: (o.start, -o.duration_s)):
            while running and running[-1].start + running[-1].duration_s <= op.start:
                running.pop()
            if running:
                outer = running[-1].name
                own[outer] = (own[outer][0] - op.duration_s, own[outer][1])
            own[op.name] = (own[op.name][0] + op.duration_s, own[op.name][1] + 1)
            running.append(op)
    return dict(own)


def _sums(spans: Iterable[Span]) -> dict[str, tuple[float, int]]:
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for span in spans:
        seconds, calls = sums[span.name]
        sums[span.name] = (seconds + span.stop - span.start, calls + 1)
    return dict(sums)


def _largest(sums: dict[str, tuple[float, int]]) -> list[tuple[str, tuple[float, int]]]:
    return sorted(sums.items(), key=lambda item: -item[1][0])


def _meta(kind: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": arguments}


def _table(*columns: str, texts: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < texts else "right", no_wrap=True)
    return table
