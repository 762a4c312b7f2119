"""The trace file, and what is read off it."""

from __future__ import annotations

import io
import json
import time

import torch
from rich.console import Console

from rlsys.tracking.meter import Span
from rlsys.tracking.ops import Op, OpsRecorder
from rlsys.tracking.trace import Trace, in_lanes, own_times


def make_trace() -> Trace:
    trace = Trace(steps=[Span("step 1", 100.0, 110.0)], phases=[Span("collect", 100.0, 104.0)])
    trace.offsets["rollout_0"] = 50.0
    trace.add_verbs("rollout_0", [Span("generate", 151.0, 153.0), Span("generate", 152.0, 154.0)])
    trace.add_ops("rollout_0", [Op("mm", "7/7", 151.5, 0.5, "cpu_op"), Op("add", "7/7", 151.6, 0.1, "cpu_op")])
    return trace


def test_the_file_is_what_viewers_read(tmp_path):
    content = json.loads(make_trace().write(tmp_path / "trace.json").read_text())
    events = content["traceEvents"]
    assert {e["ph"] for e in events} == {"X", "M"}
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "driver", 1: "rollout_0"}


def test_clocks_of_other_hosts_are_put_right():
    events = make_trace().content()["traceEvents"]
    starts = {e["name"]: e["ts"] for e in events if e["ph"] == "X"}
    assert starts["collect"] == 0
    assert starts["mm"] == 1.5e6


def test_what_overlaps_is_on_lanes_of_its_own():
    spans = [Span("a", 0, 2), Span("b", 1, 3), Span("c", 2, 4)]
    assert in_lanes(spans) == [[spans[0], spans[2]], [spans[1]]]


def test_own_time_is_without_that_of_inner_operators():
    ops = [Op("outer", "1", 0.0, 10.0, "cpu_op"), Op("inner", "1", 1.0, 4.0, "cpu_op"), Op("inner", "2", 2.0, 1.0, "x")]
    assert own_times(ops) == {"outer": (6.0, 1), "inner": (5.0, 2)}


def test_tables_say_where_the_time_went():
    console = Console(file=io.StringIO(), width=120)
    for table in make_trace().tables():
        console.print(table)
    text = console.file.getvalue()
    assert "40.0%" in text.replace(" ", "")  # collect, of the step
    assert "30.0%" in text  # the sampler's calls overlap: 3 of 10 seconds
    assert "between phases" in text


def test_torchs_operators_are_recorded_at_the_time_at_which_they_ran():
    recorder, before = OpsRecorder(), time.time()
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    after, ops = time.time(), recorder.finish()
    (product,) = [op for op in ops if op.name == "aten::mm"]
    assert before - 0.05 <= product.start <= product.start + product.duration_s <= after + 0.05
