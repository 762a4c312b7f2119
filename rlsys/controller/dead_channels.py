"""A loss channel that finds no input for many steps is a mistake in the configuration, not patience."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rlsys.config.errors import UserError

_NO_TEACHER = "no response had a teacher's context (hints.source, hints.threshold)"
_NO_INPUT = {
    "distillation": _NO_TEACHER,
    "policy/hybrid": _NO_TEACHER,
    "preference": "no pair was found (replay.source, replay.min_gap)",
}
_WITHOUT = {"policy/hybrid": "leave algorithm.distillation.hybrid out, or look at the rollouts"}


def check_dead(dead_steps: Counter[str], metrics: Mapping[str, float], limit: int, *, step: int) -> None:
    """Counts, in ``dead_steps``, the steps in a row in which a channel had no input.

    Raises:
        UserError: there were ``limit`` of them.
    """
    for name, fraction in metrics.items():
        if name.endswith("/live_fraction"):
            dead_steps[name] = 0 if fraction else dead_steps[name] + 1
            if dead_steps[name] >= limit:
                part = name.removesuffix("/live_fraction")
                what = "part" if "/" in part else "channel"
                raise UserError(
                    f"the loss {what} '{part}' found no input in {limit} steps: "
                    + _NO_INPUT.get(part, "no sampled token reached it"),
                    where=f"step {step}",
                    fix=_WITHOUT.get(part, "give it weight 0, or look at the rollouts"),
                )
