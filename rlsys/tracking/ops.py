"""torch's profiler inside an actor, as plain events."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_KEPT = ("cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")


class Op(NamedTuple):
    """name; lane: which thread or GPU stream; start: Unix seconds; duration_s; kind: torch's category."""

    name: str
    lane: str
    start: float
    duration_s: float
    kind: str


class OpsRecorder:
    """Records from its making to :meth:`finish`.

    Args:
        all_threads: also those that are not this one's backward passes.
    """

    def __init__(self, *, all_threads: bool = False):
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_initialized() else [])]
        config = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
        self._profile = profile(activities=activities, experimental_config=config)
        self._profile.start()

    def finish(self) -> list[Op]:
        """Stops, and returns what was recorded."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as inside:
            path = Path(inside) / "ops.json"
            self._profile.export_chrome_trace(str(path))
            return read_ops(json.loads(path.read_text(encoding="utf-8")))


def read_ops(trace: dict[str, Any]) -> list[Op]:
    """The events with a duration of a trace that ``torch.profiler`` wrote. Its times count from
    ``baseTimeNanoseconds``, in microseconds."""
    base = trace.get("baseTimeNanoseconds", 0) / 1e9
    return [
        Op(event["name"], f"{event['pid']}/{event['tid']}", base + event["ts"] / 1e6, event["dur"] / 1e6, event["cat"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _KEPT
    ]
