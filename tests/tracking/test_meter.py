"""What an actor measures about itself."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from rlsys.tracking.meter import Metered, Span, busy_s


class Worker(Metered, verbs=("work", "wait", "fail")):
    def work(self, mebibytes: int) -> int:
        self.meter.count("bytes", mebibytes << 20)
        return int(np.ones(mebibytes << 20, dtype=np.uint8).sum())

    async def wait(self, other: asyncio.Event, own: asyncio.Event) -> None:
        own.set()
        await other.wait()

    def fail(self) -> None:
        raise RuntimeError("no")

    def unmeasured(self) -> int:
        return 3


def test_a_verb_is_measured_and_does_what_it_did():
    worker, before = Worker(), time.time()
    assert worker.work(3) == 3 << 20
    assert worker.unmeasured() == 3
    reading = worker.take_reading()
    (span,) = reading.spans
    assert span.name == "work"
    assert before <= span.start <= span.stop <= time.time()
    assert reading.counts == {"bytes": 3 << 20}
    assert worker.take_reading().spans == []


def test_the_peak_is_that_of_the_verb_alone():
    worker = Worker()
    worker.work(300)
    large = worker.take_reading().peaks["work"]
    worker.work(1)
    small = worker.take_reading().peaks["work"]
    assert large - small > 200 << 20


def test_a_verb_that_raises_is_measured_too():
    worker = Worker()
    with pytest.raises(RuntimeError, match="no"):
        worker.fail()
    assert [span.name for span in worker.take_reading().spans] == ["fail"]


def test_coroutines_overlap():
    async def both() -> Worker:
        worker, first, second = Worker(), asyncio.Event(), asyncio.Event()
        await asyncio.gather(worker.wait(second, first), worker.wait(first, second))
        return worker

    one, two = asyncio.run(both()).take_reading().spans
    assert one.start <= two.stop
    assert two.start <= one.stop


def test_a_worker_names_verbs_that_it_has():
    with pytest.raises(AttributeError):

        class Wrong(Metered, verbs=("missing",)):
            pass


def test_busy_time_counts_what_overlaps_once_and_only_inside_the_step():
    spans = [Span("a", 0.0, 2.0), Span("b", 1.0, 3.0), Span("c", 5.0, 9.0), Span("d", 1.5, 1.6)]
    assert busy_s(spans, 1.0, 6.0) == pytest.approx(3.0)
    assert busy_s([], 0.0, 1.0) == 0.0
