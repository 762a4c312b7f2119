"""``summary.json``: a run in a few figures, over all of its sessions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rlsys.tracking.alerts import MISMATCH
from rlsys.tracking.metrics import Line, history, read_lines
from rlsys.tracking.run import RunFolder

Status = Literal["finished", "interrupted", "failed"]


def build(run: RunFolder, *, name: str, seed: int, status: Status, peak_memory_bytes: int) -> dict[str, Any]:
    """The summary of the run in ``run``, from its ``metrics.jsonl``.

    Steps, tokens and evaluations count along the history that led to the newest weights; wall time counts all sessions,
    abandoned work included.

    Args:
        peak_memory_bytes: of this session; earlier sessions' come from ``memory/pss_bytes``.

    Returns:
        JSON content:
        ``steps``: training steps done; ``wall_s``: from opening the run folder to now, plus what earlier sessions took
        up to their last line; ``tokens_generated``: Σ ``rollout/tokens``; ``tokens_trained``: Σ ``train/tokens``;
        ``tokens_per_s``: generated tokens by ``time/step_s`` of the steps that generated them; ``trained_tokens_per_s``
        and ``mfu``: medians over the steps, null without an update; ``idle``: likewise, by actor;
        ``eval/initial_accuracy``, ``eval/final_accuracy``: first and last evaluation, null without one; ``best``: step
        and accuracy; ``mismatch/logprob_abs_mean_max``: null where it was never measured; ``peak_memory_bytes``; and
        which run it was.

    Raises:
        UserError: the metrics are damaged.
    """
    lines = read_lines(run.metrics) if run.metrics.exists() else []
    steps = history(lines)
    evaluations = [(line["step"], line["eval/accuracy"]) for line in steps if "eval/accuracy" in line]
    tokens = _total(steps, "rollout/tokens")
    seconds = _total([line for line in steps if "rollout/tokens" in line], "time/step_s")
    best = max(evaluations, key=lambda pair: (pair[1], pair[0]), default=None)
    return {
        "name": name,
        "seed": seed,
        "status": status,
        "run_folder": str(run.path),
        "steps": max((line["step"] for line in steps), default=0),
        "wall_s": round(_wall_s(lines, run), 3),
        "eval/initial_accuracy": evaluations[0][1] if evaluations else None,
        "eval/final_accuracy": evaluations[-1][1] if evaluations else None,
        "best": {"step": best[0], "eval/accuracy": best[1]} if best else None,
        "tokens_generated": int(tokens),
        "tokens_trained": int(_total(steps, "train/tokens")),
        "tokens_per_s": tokens / seconds if seconds > 0 else None,
        "trained_tokens_per_s": _median(steps, "throughput/trained_tokens_per_s"),
        "mfu": _median(steps, "throughput/mfu"),
        "idle": {name.removeprefix("idle/"): _median(steps, name) for name in _names(steps, "idle/")},
        "mismatch/logprob_abs_mean_max": _maximum(steps, MISMATCH),
        "peak_memory_bytes": int(max(peak_memory_bytes, _maximum(lines, "memory/pss_bytes") or 0)),
    }


def _wall_s(lines: Iterable[Mapping[str, Any]], run: RunFolder) -> float:
    """This session up to now, and every earlier one up to its last line."""
    sessions = {line["time/session"]: line["time/elapsed_s"] for line in lines if "time/session" in line}
    sessions[run.session] = run.elapsed_s()
    return math.fsum(sessions.values())


def _total(lines: Iterable[Line], name: str) -> float:
    return math.fsum(value for line in lines if math.isfinite(value := line.get(name, 0.0)))


def _median(lines: Iterable[Line], name: str) -> float | None:
    """Over finite values; None without any."""
    values = [line[name] for line in lines if math.isfinite(line.get(name, math.nan))]
    return statistics.median(values) if values else None


def _names(lines: Iterable[Line], prefix: str) -> list[str]:
    return sorted({name for line in lines for name in line if name.startswith(prefix)})


def _maximum(lines: Iterable[Line], name: str) -> float | None:
    """Over finite values; None without any."""
    return max((line[name] for line in lines if math.isfinite(line.get(name, math.nan))), default=None)
