"""TAID's adaptive interpolation between student and teacher (arXiv 2501.16937, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlsys.config.errors import UserError


@dataclass(frozen=True)
class TaidState:
    """Plain floats, so that a checkpoint's JSON gives back the same numbers.

    t: the present interpolation: 0 the student, 1 the teacher.
    momentum: running mean of the loss's relative change.
    last_loss: of the update before; None: there was none.
    """

    t: float
    momentum: float = 0.0
    last_loss: float | None = None


def advance(
    state: TaidState,
    loss: float,
    step: int,
    total_steps: int,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
) -> TaidState:
    """The state after an update. The first one only stores its loss.

        δ = (L₋ − L) / (L₋ + 1e-15),  m = β m + (1−β) δ,  Δ = α σ(m) (1−t)
        t = min(t_end, max(t_start + (t_end − t_start) · step / total_steps, t + Δ))

    So t never falls, keeps up with a straight line to t_end, and runs ahead of it while the loss falls.

    Args:
        loss: of this update, finite, in any unit: only its relative change counts.
        step: this update, counted from 1, of total_steps.
        t_start, t_end: ends of the straight line.
        alpha: size of an adaptive step.
        beta: of the running mean.

    Raises:
        ValueError: a loss that is not finite, or total_steps < 1.
        UserError: an option out of its range.
    """
    check_schedule(t_start, t_end, alpha, beta)
    if not math.isfinite(loss):
        raise ValueError(f"the schedule follows a finite loss, not {loss}")
    if total_steps < 1:
        raise ValueError(f"the schedule ends after at least one step, not {total_steps}")
    if state.last_loss is None:
        return TaidState(state.t, state.momentum, float(loss))
    change = (state.last_loss - loss) / (state.last_loss + 1e-15)
    momentum = beta * state.momentum + (1 - beta) * change
    adaptive = state.t + alpha * _sigmoid(momentum) * (1 - state.t)
    line = t_start + (t_end - t_start) * step / total_steps
    return TaidState(min(t_end, max(line, adaptive)), momentum, float(loss))


def check_schedule(t_start: float, t_end: float, alpha: float, beta: float) -> None:
    """Raises UserError, naming the option, unless 0 ≤ t_start ≤ t_end ≤ 1, 0 ≤ alpha ≤ 1 and 0 ≤ beta < 1."""
    for name, value, holds, range_ in (
        ("t_start", t_start, 0 <= t_start <= 1, "from 0 to 1"),
        ("t_end", t_end, t_start <= t_end <= 1, "from t_start to 1"),
        ("alpha", alpha, 0 <= alpha <= 1, "from 0 to 1"),
        ("beta", beta, 0 <= beta < 1, "at least 0 and below 1"),
    ):
        if not holds:
            raise UserError(
                f"TAID's {name} is {range_}, not {value}", where=f"algorithm.distillation.divergence_options.{name}"
            )


def _sigmoid(x: float) -> float:
    """Without overflow, whatever the loss has done."""
    small = math.exp(-abs(x))
    return 1 / (1 + small) if x >= 0 else small / (1 + small)
