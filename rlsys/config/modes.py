"""The groups ``controller``, how sampling and training overlap, and ``health``, who is waited for and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.values import Flag, NonNegative, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class SyncController:
    """A step's samples come from the weights that it then trains: samplers wait for the trainer and it for them."""

    kind: Literal["sync"]


@dataclass(frozen=True, kw_only=True)
class OneStepOffController:
    """While a step is trained the next one is sampled, from weights that are one step older.

    uncorrected: train on older samples without ``algorithm.correction`` (or a loss that corrects by itself).
    """

    kind: Literal["one_step_off"]
    uncorrected: Flag = False


@dataclass(frozen=True, kw_only=True)
class AsyncController:
    """Samplers never wait: the trainer takes whole prompt groups as they end.

    max_staleness: most steps between the weights that are trained and the oldest that sampled a token of the batch.
    in_flight: what happens to sequences under way when new weights come. ``finish``: they end with the old ones first;
        ``keep``: they pause between two tokens and go on with the new ones, on the KV cache of the old;
        ``recompute``: the same, on a KV cache that is computed anew.
    uncorrected: as for ``one_step_off``.
    """

    kind: Literal["async"]
    max_staleness: NonNegative = 4
    in_flight: Literal["finish", "keep", "recompute"] = "keep"
    uncorrected: Flag = False


ControllerConfig = Annotated[SyncController | OneStepOffController | AsyncController, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Who counts as alive.

    liveness_s: an actor that does not answer a short question for so long is ended, and another one takes its place.
    restarts: of any one rollout, reward or reference actor, and of the trainers together, without a whole step in
        between.
    stall_s: a wait as long as this writes the stacks of all actors into the run folder.
    on_stall: then ``warn`` alone, or also ``stop`` the run.
    """

    liveness_s: PositiveFloat = 60.0
    restarts: NonNegative = 3
    stall_s: PositiveFloat = 300.0
    on_stall: Literal["warn", "stop"] = "warn"


def staleness_bound(controller: ControllerConfig) -> int:
    """Most steps between the weights that are trained and the oldest that sampled a token."""
    if isinstance(controller, AsyncController):
        return controller.max_staleness
    return 1 if isinstance(controller, OneStepOffController) else 0
