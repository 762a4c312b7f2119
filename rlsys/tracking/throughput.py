"""Where a step's time went and how much came of it, as metrics: see docs/how-to/throughput.md for their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.tracking.meter import Reading, busy_s

_TRAINED = ("trainer", "critic")  # whose FLOPs count: they share the trainer's processors


@dataclass(frozen=True)
class ActorReading:
    """role, index: as in ``trainer worker 0``."""

    role: str
    index: int
    reading: Reading

    @property
    def name(self) -> str:
        return f"{self.role}_{self.index}"


def step_metrics(
    step: Mapping[str, float], seconds: Mapping[str, float], *, ranks_peak: float | None, flops: float
) -> dict[str, float]:
    """``throughput/…`` and ``share/…`` of one step.

    Args:
        step: its other metrics (``rollout/tokens``, ``train/tokens``, ``time/step_s``).
        seconds: by phase of the loop.
        ranks_peak: FLOP/s of all trainer ranks together; None: not measured.
        flops: model FLOPs of its optimiser steps, over all ranks.
    """
    whole = step["time/step_s"]
    metrics: dict[str, float] = {}
    if seconds.get("rollout"):
        metrics["throughput/sampled_tokens_per_s"] = step["rollout/tokens"] / seconds["rollout"]
    if seconds.get("update"):
        if "train/tokens" in step:
            metrics["throughput/trained_tokens_per_s"] = step["train/tokens"] / seconds["update"]
        if flops:
            metrics["throughput/model_flops_per_s"] = flops / seconds["update"]
            if ranks_peak:
                metrics["throughput/mfu"] = flops / seconds["update"] / ranks_peak
    # A checkpoint's time belongs to the step before, whose line had been written.
    inside = {name: spent for name, spent in seconds.items() if name != "checkpoint"}
    metrics |= {f"share/{name}": spent / whole for name, spent in inside.items()}
    metrics["share/other"] = max(1.0 - math.fsum(inside.values()) / whole, 0.0)
    return metrics


def actor_metrics(readings: Sequence[ActorReading], start: float, stop: float) -> dict[str, float]:
    """``idle/ROLE_INDEX``: the share of a step (Unix seconds start … stop) in which an actor ran no verb;
    ``memory/ROLE_VERB_bytes``: the largest resident memory of the role's actors during the verb, and ``…_gpu_bytes``.
    """
    metrics: dict[str, float] = {}
    for actor in readings:
        metrics[f"idle/{actor.name}"] = 1.0 - busy_s(actor.reading.spans, start, stop) / max(stop - start, 1e-9)
        for peaks, unit in ((actor.reading.peaks, "bytes"), (actor.reading.gpu_peaks, "gpu_bytes")):
            for verb, size in peaks.items():
                name = f"memory/{actor.role}_{verb}_{unit}"
                metrics[name] = max(metrics.get(name, 0.0), float(size))
    return metrics


def trained_flops(readings: Sequence[ActorReading]) -> float:
    """Model FLOPs of all optimiser steps that the readings tell of."""
    return math.fsum(a.reading.counts.get("flops", 0.0) for a in readings if a.role in _TRAINED)
