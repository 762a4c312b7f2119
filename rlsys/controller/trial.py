"""A trial of the configured maths on made-up samples: what plug-ins say about their options they say before anything is
started."""

from __future__ import annotations

import torch

from rlsys.algorithms import advantages as estimators
from rlsys.algorithms.corrections import check_corrections
from rlsys.algorithms.divergences.chunked import Head, TeacherPart, token_divergence
from rlsys.algorithms.filters import check_filters, kept
from rlsys.algorithms.losses import POLICY_LOSSES, aggregation_of, prepare_of
from rlsys.algorithms.objective import ForwardOutput, Objective, ResponseBatch, TeacherOutput
from rlsys.algorithms.requirements import adapts, needs_teacher, objective, penalises_kl, step_weights
from rlsys.batch.columns import COLUMNS
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of
from rlsys.config.schema import RunConfig

_WORDS, _WIDTH = 16, 4
_LENGTHS = torch.tensor([3, 2])


def try_out(config: RunConfig) -> None:
    """Calls estimator, filters, losses and divergence once.

    Raises:
        UserError: an unknown name or option, a value out of range, or parts that do not go together.
    """
    algorithm, samples = config.algorithm, config.rollout.samples_per_prompt
    if not any((algorithm.weight, algorithm.distillation.weight, algorithm.preference.weight)):
        raise UserError(
            "no channel of the loss has a weight",
            where="algorithm.weight",
            fix="set algorithm.weight, algorithm.distillation.weight or algorithm.preference.weight",
        )
    for step in range(1, config.steps + 1):
        if not any(step_weights(config, step).weights.values()):
            raise UserError(
                f"in step {step} no channel of the loss has a weight",
                where="algorithm.schedule",
                fix="let a schedule begin above 0, or give another channel a weight",
            )
    # Where no channel reads advantages, one sample a prompt teaches as well as several.
    compared = samples if algorithm.weight else max(samples, 2)
    estimators.check_estimator(algorithm.advantage, algorithm.advantage_options, compared)
    check_filters(algorithm.filters, samples)
    check_corrections(algorithm.correction, algorithm.old_logprobs == "sampler")
    _estimator_fits(config)
    _loss_fits(config)
    _aggregation_fits(config)
    _teacher_fits(config)
    _control_fits(config)
    estimators.try_out(algorithm.advantage, algorithm.advantage_options)
    kept(algorithm.filters, torch.tensor([0.0, 1.0]), ["a", "a"])
    channels = objective(config)
    _try_channels(channels)
    _try_divergence(channels)


def _loss_fits(config: RunConfig) -> None:
    """A loss that holds π_old against the sampler's μ itself leaves nothing for a correction to do."""
    algorithm = config.algorithm
    loss = POLICY_LOSSES.get(algorithm.loss, where="algorithm.loss")
    if not algorithm.weight:
        return
    if algorithm.loss == "decoupled_ppo" and algorithm.old_logprobs == "sampler":
        raise UserError(
            "decoupled_ppo weighs by π_old/μ, which is 1 where π_old is μ",
            where="algorithm.old_logprobs",
            fix="set algorithm.old_logprobs=trainer, or algorithm.loss=ppo_clip",
        )
    twice = sorted(set(algorithm.correction) & {"tis_token", "tis_sequence", "icepop"})
    if twice and "rollout_logprobs" in reads_of(loss):
        raise UserError(
            f"'{algorithm.loss}' corrects for the sampler itself, and {twice[0]} would count the ratio twice",
            where=f"algorithm.correction.{twice[0]}",
            fix="leave the correction out, or use another loss",
        )
    if algorithm.distillation.hybrid is not None and prepare_of(loss):
        raise UserError(
            f"'{algorithm.loss}' selects tokens by their advantage before the teacher's part of it is known",
            where="algorithm.distillation.hybrid",
            fix="leave it out, or use another loss",
        )


def _estimator_fits(config: RunConfig) -> None:
    """A penalty on the reward is lost on an estimator that takes the reward's parts in its place."""
    algorithm = config.algorithm
    if penalises_kl(config) and "scores" in estimators.estimator_reads(algorithm.advantage):
        raise UserError(
            f"'{algorithm.advantage}' reads the reward's parts, and would not see a KL penalty on the reward",
            where="algorithm.kl.placement",
            fix="set algorithm.kl.placement=loss",
        )


def _aggregation_fits(config: RunConfig) -> None:
    algorithm = config.algorithm
    required = aggregation_of(POLICY_LOSSES.get(algorithm.loss, where="algorithm.loss"))
    if algorithm.weight and required is not None and algorithm.aggregation != required:
        raise UserError(
            f"'{algorithm.loss}' is a mean over sequences, and the aggregation is {algorithm.aggregation}",
            where="algorithm.aggregation",
            fix=f"set algorithm.aggregation={required}",
        )


def _teacher_fits(config: RunConfig) -> None:
    """A second model that never differs from the policy, or a mixture of which one part has no share, costs its memory
    and pass, and is a teacher of another name."""
    if not needs_teacher(config):
        return
    distillation, where = config.algorithm.distillation, "algorithm.distillation"
    if distillation.teacher == "ema" and adapts(config):
        raise UserError(
            "an average of the policy would be a whole second model beside an adapter, and it is not known what an "
            "average of A and one of B stand for together",
            where=f"{where}.teacher",
            fix=f"set {where}.teacher=frozen (the model without its adapter), trust_region or self",
        )
    for teacher, option, value in (
        ("ema", "teacher_rate", distillation.teacher_rate),
        ("trust_region", "teacher_mix", distillation.teacher_mix),
    ):
        same = {0.0: "frozen", 1.0: "self"}.get(value)
        if distillation.teacher == teacher and same:
            raise UserError(
                f"the teacher '{teacher}' with {option}={value:g} is '{same}'",
                where=f"{where}.{option}",
                fix=f"set {where}.teacher={same}, or a value between 0 and 1",
            )


def _control_fits(config: RunConfig) -> None:
    """With permuted rewards nothing may be learnt; a channel that learns from the true ones makes that no control."""
    if not config.reward.permute:
        return
    algorithm, reason = config.algorithm, None
    shown = [source for source in config.hints.source if source in ("sibling", "feedback")]
    if algorithm.preference.weight and config.replay.source == "groups":
        reason, fix = "pairs are made of the groups' true rewards", "set algorithm.preference.weight=0"
    elif needs_teacher(config) and shown:
        reason = f"the teacher is shown what the true rewards say (hints.source: {', '.join(shown)})"
        fix = "set algorithm.distillation.weight=0 and leave algorithm.distillation.hybrid out"
    if reason:
        raise UserError(
            f"permuted rewards are the control that must not learn, and {reason}", where="reward.permute", fix=fix
        )


def _try_channels(channels: Objective) -> None:
    rows = torch.arange(2).repeat_interleave(_LENGTHS)
    columns = {name: _made_up(name, len(rows)) for name in channels.reads}
    batch = ResponseBatch(columns, rows, 2, {"chosen": rows, "rejected": rows})
    tokens = -torch.ones(len(rows)) - torch.arange(len(rows)) / 8
    tokens.requires_grad_()
    pairs = {"chosen": tokens, "rejected": tokens}
    output = ForwardOutput(tokens, -tokens, pairs, TeacherOutput(-tokens, tokens.detach(), -tokens.detach()))
    channels.loss(batch, output, channels.prepare(batch)).loss.backward()


def _try_divergence(channels: Objective) -> None:
    spec = channels.divergence
    if spec is None:
        return
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 2, _WIDTH, generator=generator)
    head = Head(torch.randn(_WORDS, _WIDTH, generator=generator), None)
    token_divergence(
        hidden,
        head,
        [TeacherPart(1.0, other, head)],
        spec.divergence,
        spec.options,
        targets=torch.tensor([1, 2]),
        t=0.5 if spec.t is None and "t" in _reads(spec.divergence) else spec.t,
        top_k=spec.top_k if spec.top_k is None else min(spec.top_k, _WORDS - 1),
        tail=spec.tail,
    )


def _reads(divergence: str) -> tuple[str, ...]:
    from rlsys.algorithms.divergences import DIVERGENCES

    return reads_of(DIVERGENCES.get(divergence, where="algorithm.distillation.divergence"))


def _made_up(name: str, tokens: int) -> torch.Tensor:
    """A column that a channel reads: true masks, log-probs around −1."""
    declared = COLUMNS.get(name)
    dtype = torch.float32 if declared is None or declared.dtype is None else declared.dtype
    size = 2 if declared is not None and "j:" not in declared.shape else tokens
    if dtype == torch.bool:
        return torch.ones(size, dtype=dtype)
    return -torch.ones(size, dtype=dtype) if dtype.is_floating_point else torch.ones(size, dtype=dtype)
