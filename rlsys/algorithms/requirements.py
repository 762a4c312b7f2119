"""What a configuration asks of the stages: which channels, which extra passes, which actors."""

from __future__ import annotations

from rlsys.algorithms.advantages import estimator_reads, is_token_level
from rlsys.algorithms.channels import Distillation, PolicyGradient, Preference, ValueLoss
from rlsys.algorithms.channels.preference import needs_reference as preference_reads_reference
from rlsys.algorithms.losses import POLICY_LOSSES, prepare_of
from rlsys.algorithms.objective import Channel, Objective, StepSettings
from rlsys.algorithms.schedules import factor
from rlsys.config.plugins import reads_of
from rlsys.config.schema import RunConfig


def objective(config: RunConfig) -> Objective:
    """The channels with a weight: ``policy``, ``distillation``, ``preference``."""
    algorithm, own_pass = config.algorithm, needs_old_logprobs(config)
    column = own_pass or algorithm.old_logprobs == "sampler"
    channels: dict[str, tuple[Channel, float]] = {}
    if algorithm.weight:
        policy = PolicyGradient.from_config(
            algorithm,
            horizon=config.data.max_response_tokens,
            old_logprobs="column" if column else "self",
            mismatch=not own_pass,
        )
        channels["policy"] = (policy, algorithm.weight)
    if algorithm.distillation.weight:
        distillation = Distillation.from_config(
            algorithm.distillation,
            old_logprobs="column" if column else "self",
            entropy=not algorithm.weight,
            mismatch=not own_pass and not algorithm.weight,
        )
        channels["distillation"] = (distillation, algorithm.distillation.weight)
    if algorithm.preference.weight:
        channels["preference"] = (Preference.from_config(algorithm.preference), algorithm.preference.weight)
    return Objective(channels)


def critic_objective(config: RunConfig) -> Objective:
    """The critic's loss."""
    return Objective({"critic": (ValueLoss(config.trainer.critic.value_clip), 1.0)})


def step_weights(config: RunConfig, step: int) -> StepSettings:
    """The channels' weights in a training step, counted from 1."""
    algorithm = config.algorithm
    weights = {
        "policy": (algorithm.weight, algorithm.schedule),
        "distillation": (algorithm.distillation.weight, algorithm.distillation.schedule),
        "preference": (algorithm.preference.weight, algorithm.preference.schedule),
    }
    return StepSettings({name: weight * factor(points, step) for name, (weight, points) in weights.items()})


def needs_reference(config: RunConfig) -> bool:
    """Whether any term reads the reference's log-probs."""
    algorithm = config.algorithm
    loss = reads_of(POLICY_LOSSES.get(algorithm.loss, where="algorithm.loss"))
    return (algorithm.weight > 0 and (algorithm.kl.coef > 0 or "ref_logprobs" in loss)) or (
        algorithm.preference.weight > 0 and preference_reads_reference(algorithm.preference.loss)
    )


def adapts(config: RunConfig) -> bool:
    """Whether an adapter is trained, and the rest of the model is as it was."""
    return config.model.lora is not None


def needs_reference_worker(config: RunConfig) -> bool:
    """Whether the reference takes a copy of the model: without its adapter the trainer's own is the reference."""
    return needs_reference(config) and not adapts(config)


def needs_teacher(config: RunConfig) -> bool:
    """Whether responses are scored behind a teacher's prompt."""
    algorithm = config.algorithm
    return algorithm.distillation.weight > 0 or (algorithm.weight > 0 and algorithm.distillation.hybrid is not None)


def needs_critic(config: RunConfig) -> bool:
    """Whether the estimator reads values."""
    return config.algorithm.weight > 0 and "values" in estimator_reads(config.algorithm.advantage)


def token_level(config: RunConfig) -> bool:
    """Whether the estimator needs tokens and therefore runs in the trainer's ranks."""
    return config.algorithm.weight > 0 and is_token_level(config.algorithm.advantage)


def needs_baselines(config: RunConfig) -> bool:
    """Whether the estimator compares with the reward of a greedy response."""
    return config.algorithm.weight > 0 and "baselines" in estimator_reads(config.algorithm.advantage)


def penalises_kl(config: RunConfig) -> bool:
    """Whether the KL to the reference is a penalty on the reward."""
    algorithm = config.algorithm
    return algorithm.weight > 0 and algorithm.kl.coef > 0 and algorithm.kl.placement == "reward"


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether π_old takes a forward pass of its own, before the first update of a step.

    With one optimiser step a batch the update computes it on the way; with ``old_logprobs=sampler`` the sampler has.
    """
    algorithm = config.algorithm
    if penalises_kl(config) or (algorithm.weight > 0 and algorithm.entropy_quantile):
        return True
    if algorithm.old_logprobs == "sampler":
        return False
    statistics = prepare_of(POLICY_LOSSES.get(algorithm.loss, where="algorithm.loss")) is not None
    return config.trainer.updates_per_step > 1 or (algorithm.weight > 0 and statistics)
