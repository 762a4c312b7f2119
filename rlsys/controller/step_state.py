"""What the loss carries from step to step: weights on a schedule, TAID's interpolation, an adaptive KL coefficient.

All of it is a function of the configuration and a few floats in the controller's state, so a resumed run goes on with
the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rlsys.algorithms.channels import Distillation
from rlsys.algorithms.kl import adapt
from rlsys.algorithms.objective import StepSettings
from rlsys.algorithms.requirements import penalises_kl, step_weights
from rlsys.algorithms.taid import TaidState, advance
from rlsys.config.schema import RunConfig

_TAID, _KL = "taid", "kl_coef"


def follows_taid(config: RunConfig) -> bool:
    """Whether the divergence's interpolation is on its schedule, and not fixed."""
    distillation = config.algorithm.distillation
    return (
        distillation.weight > 0
        and distillation.divergence == "taid"
        and distillation.divergence_options.get("t") is None
    )


def settings(config: RunConfig, extra: Mapping[str, Any], step: int) -> StepSettings:
    """The objective of training step ``step``, counted from 1. extra: the controller's other state."""
    result = step_weights(config, step)
    if follows_taid(config):
        spec = Distillation.from_config(config.algorithm.distillation, old_logprobs="self").spec
        return replace(result, fields={"distillation": {"spec": replace(spec, t=_taid(config, extra).t)}})
    return result


def after_update(config: RunConfig, extra: Mapping[str, Any], metrics: Mapping[str, float], update: int) -> dict:
    """The controller's other state after optimiser step ``update``, counted from 1 over the run.

    TAID's interpolation follows losses that the policy learnt from: neither the 0 of an update in which no token had a
    teacher, nor that of an update that was skipped, is one.
    """
    result = dict(extra)
    loss = metrics.get("distillation/loss")
    learnt = metrics.get("distillation/tokens", 0.0) > 0 and not metrics.get("train/skipped")
    if follows_taid(config) and loss is not None and math.isfinite(loss) and learnt:
        total = config.steps * config.trainer.updates_per_step
        options = {key: value for key, value in _taid_options(config).items() if key != "t"}
        result[_TAID] = asdict(advance(_taid(config, extra), loss, update, total, **options))
    return result


def kl_coef(config: RunConfig, extra: Mapping[str, Any]) -> float:
    """Of the penalty on the reward."""
    return float(extra.get(_KL, config.algorithm.kl.coef))


def after_kl(config: RunConfig, extra: Mapping[str, Any], kl: float, samples: int) -> dict:
    """The controller's other state after a step with this mean KL a token."""
    section = config.algorithm.kl
    if section.target is None or not penalises_kl(config) or not math.isfinite(kl):
        return dict(extra)
    return {**extra, _KL: adapt(kl_coef(config, extra), kl, section.target, section.horizon, samples)}


def taid_t(config: RunConfig, extra: Mapping[str, Any]) -> float | None:
    """The present interpolation, for the metrics; None: there is none."""
    return _taid(config, extra).t if follows_taid(config) else None


def _taid_options(config: RunConfig) -> dict[str, Any]:
    return config.algorithm.distillation.divergence_options


def _taid(config: RunConfig, extra: Mapping[str, Any]) -> TaidState:
    if _TAID in extra:
        return TaidState(**extra[_TAID])
    return TaidState(t=float(_taid_options(config).get("t_start", 0.4)), momentum=0.0, last_loss=None)
