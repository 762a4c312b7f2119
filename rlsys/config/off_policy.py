"""What a controller that trains on older samples asks of the rest of the configuration."""

from __future__ import annotations

from rlsys.config.errors import UserError
from rlsys.config.modes import SyncController, staleness_bound
from rlsys.config.schema import RunConfig

_CORRECT_BY_THEMSELVES = ("decoupled_ppo",)
"""Policy losses that weigh tokens by π_old/μ."""


def corrects(config: RunConfig) -> bool:
    """Whether the loss knows that its samples come from other weights: by a correction, a loss that weighs tokens by
    π_old/μ, or ratios that are taken to the sampler (π_old := μ). Without a policy gradient there is nothing to
    correct: the other channels learn from whatever text they are given."""
    algorithm = config.algorithm
    return bool(
        not algorithm.weight
        or algorithm.correction
        or algorithm.loss in _CORRECT_BY_THEMSELVES
        or algorithm.old_logprobs == "sampler"
    )


def check_controller(config: RunConfig) -> None:
    """Raises UserError where the controller cannot do, or would silently do wrong, what the rest asks for."""
    controller = config.controller
    if isinstance(controller, SyncController):
        return
    if config.cluster.placement == "colocated":
        raise UserError(
            "samplers and trainer take turns, and this controller has both work at the same time",
            where="cluster.placement",
            fix="set cluster.placement=disaggregated or shared, or controller=sync",
        )
    stale = staleness_bound(controller) > 0
    if stale and not corrects(config) and not controller.uncorrected:
        raise UserError(
            f"samples may be {staleness_bound(controller)} steps older than the weights that they train, and nothing "
            "corrects for it",
            where="algorithm.correction",
            fix="set algorithm.loss=decoupled_ppo, or +algorithm.correction.tis_token={}, or accept the bias with "
            "controller.uncorrected=true",
        )
    if controller.uncorrected and (corrects(config) or not stale):
        raise UserError(
            "nothing is uncorrected here",
            where="controller.uncorrected",
            fix="leave it out, or leave algorithm.correction out",
        )
