"""Alarms: what in a step's metrics a person should look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

MISMATCH = "mismatch/logprob_abs_mean"


class Alert(NamedTuple):
    """name: for the metric ``alerts/NAME`` and for events; text: one sentence that says what to look at."""

    name: str
    text: str


def check(metrics: Mapping[str, float], *, mismatch_alarm: float) -> list[Alert]:
    """Alerts of one step.

    Args:
        metrics: of the step.
        mismatch_alarm: mean absolute log-prob difference between sampler and trainer above which samples count as
            coming from another policy (config: ``rollout.mismatch_alarm``), where they are of the trainer's weights.
    """
    alerts = []
    # Of older samples it also has how far the weights have moved since, which is the controller's choice.
    mismatch = None if metrics.get("rollout/staleness", 0.0) > 0 else metrics.get(MISMATCH)
    if mismatch is not None and not mismatch <= mismatch_alarm:  # NaN is an alarm too
        alerts.append(
            Alert(
                "mismatch",
                f"sampler and trainer differ by {mismatch:.2g} nats a token (alarm at {mismatch_alarm:g}): "
                "the samples come from another policy than the one trained; compare dtypes and weight checksums",
            )
        )
    nonfinite = [name for name in ("policy/loss", "train/grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if nonfinite:
        alerts.append(
            Alert(
                "nonfinite",
                f"{' and '.join(nonfinite)} not finite, which no update is made from: lower trainer.lr or look at the "
                "rewards",
            )
        )
    skipped = {who: metrics.get(f"{key}/skipped", 0.0) for who, key in (("policy", "train"), ("critic", "critic"))}
    for who, share in skipped.items():
        if share > 0:
            alerts.append(
                Alert(
                    "skipped",
                    f"{share:.0%} of the step's updates of the {who} were skipped, for a loss or gradient that is not "
                    "finite: the weights stayed as they were; look at the saved batch, and lower the learning rate",
                )
            )
    return alerts


def as_metrics(alerts: list[Alert]) -> dict[str, float]:
    """``alerts/NAME`` = 1 for every alert raised."""
    return {f"alerts/{alert.name}": 1.0 for alert in alerts}
