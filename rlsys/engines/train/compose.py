"""The composed loss as a free function, for a look at values and gradients without a trainer: the trainer's own
channels, rows and forward pass, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rlsys.algorithms.channels import CrossEntropy, Distillation, Preference
from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.algorithms.objective import Channel, DivergencePass, ForwardOutput, Objective, TeacherOutput
from rlsys.batch import DataProto
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of
from rlsys.engines.train.model import PolicyModel, context_length
from rlsys.engines.train.rows import RankRows
from rlsys.engines.train.teacher import Teacher

_RESPONSE = ("prompt_ids", "response_ids", "response_mask")
_TEACHER = ("teacher_prompt_ids", "teacher_mask")
_PAIR = ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
_CHUNK = 4096  # tokens whose logits exist at once


@dataclass(frozen=True)
class ComposedLoss:
    """loss: scalar with gradient; channels: value of each channel that was computed, without its weight; metrics: what
    the trainer would log of this batch."""

    loss: torch.Tensor
    channels: dict[str, float]
    metrics: dict[str, float]


def compose_loss(
    model: PreTrainedModel,
    batch: DataProto,
    *,
    alpha_sdpo: float = 0.1,
    beta_replay: float = 0.05,
    dpo_variant: str = "dpo",
    dpo_options: Mapping[str, Any] | None = None,
    sdpo_wrapper: str = "jsd",
    taid_t: float | None = None,
    entropy_opd_h_max: float | None = None,
    temperature: float = 1.0,
) -> ComposedLoss:
    """Cross-entropy + α · self-distillation + β · preferences on a model that the caller holds.

    A channel is off where its weight is 0 or one of its columns is missing. The teacher is the model itself behind
    ``teacher_prompt_ids``, without gradient.

    Args:
        model: a causal language model of transformers, with a linear head.
        batch: columns ``prompt_ids``, ``response_ids``, ``response_mask``; for self-distillation also
            ``teacher_prompt_ids``, ``teacher_mask``; for preferences ``chosen_ids``, ``chosen_mask``, ``rejected_ids``,
            ``rejected_mask`` and, unless the variant does without, ``chosen_ref_logprobs``, ``rejected_ref_logprobs``.
        dpo_variant, dpo_options: name of the preference loss, and its options.
        sdpo_wrapper: name of the divergence.
        taid_t: interpolation of ``sdpo_wrapper="taid"``, from 0 to 1.
        entropy_opd_h_max: the entropy in nats at which ``sdpo_wrapper="entropy_opd"`` is all forward KL.
        temperature: logits are divided by it.

    Raises:
        UserError: no channel has both a weight and its columns, or an option does not belong to the chosen wrapper.
    """
    objective = _objective(
        _present(batch),
        alpha_sdpo,
        beta_replay,
        Preference(dpo_variant, dict(dpo_options or {})),
        _spec(sdpo_wrapper, taid_t, entropy_opd_h_max),
    )
    policy = PolicyModel(model, temperature=temperature, chunk=_CHUNK)
    device = model.get_input_embeddings().weight.device
    if "preference" in objective.channels and "pair_slot" not in _present(batch):
        everywhere = DataProto.from_dict(tensors={"pair_slot": torch.ones(len(batch), dtype=torch.bool)})
        batch = batch.select().union(everywhere)
    rows = RankRows(
        batch,
        objective.reads,
        max_length=context_length(model),
        token_budget=1 << 40,  # the whole batch at once
        sequences=objective.sequences,
        teacher=objective.divergence is not None,
    )
    (micro,) = rows.cut(len(rows.plan), device)
    inputs = None
    if objective.divergence is not None and micro.teacher is not None:
        inputs = Teacher(policy, None, mix=1.0, rate=0.0).look(micro.teacher, objective.divergence)
    output = policy(micro.input_ids, micro.positions, micro.targets, False, inputs)
    teacher = None
    if micro.teacher is not None and inputs is not None:
        spots, size = micro.teacher.place, len(micro.token_index)
        teacher = TeacherOutput(*(v.new_zeros(size).index_copy(0, spots, v) for v in output[2:]))
    pairs = {side: micro.spread(output.logprobs, side) for side in micro.scored if side != "response"}
    forward = ForwardOutput(micro.spread(output.logprobs), micro.spread(output.entropy), pairs, teacher)
    result = objective.loss(micro.response, forward, objective.prepare(rows.whole()), micro.token_index)
    metrics = {name: float(value) for name, value in result.totals.items()}
    metrics |= {name: float(value) / max(float(count), 1.0) for name, (value, count) in result.sums.items()}
    return ComposedLoss(result.loss, {name: metrics[f"{name}/loss"] for name in objective.channels}, metrics)


def _present(batch: DataProto) -> set[str]:
    return set() if batch.batch is None else set(batch.batch.keys())


def _spec(wrapper: str, taid_t: float | None, h_max: float | None) -> DivergencePass:
    wanted = reads_of(DIVERGENCES.get(wrapper, where="sdpo_wrapper"))
    if taid_t is not None and "t" not in wanted:
        raise UserError(f"'{wrapper}' has no interpolation", where="taid_t", fix="use sdpo_wrapper='taid'")
    if h_max is not None and wrapper != "entropy_opd":
        raise UserError(f"'{wrapper}' has no gate", where="entropy_opd_h_max", fix="use sdpo_wrapper='entropy_opd'")
    if "t" in wanted and taid_t is None:
        raise UserError(f"'{wrapper}' needs its interpolation", where="taid_t", fix="give a number from 0 to 1")
    return DivergencePass(wrapper, {} if h_max is None else {"h_max": h_max}, t=taid_t)


def _objective(present: set[str], alpha: float, beta: float, preference: Preference, spec: DivergencePass) -> Objective:
    """The channels that have a weight and their columns."""
    channels: dict[str, tuple[Channel, float]] = {}
    if present.issuperset(_RESPONSE):
        channels["cross_entropy"] = (CrossEntropy(), 1.0)
        if alpha and present.issuperset(_TEACHER):
            channels["distillation"] = (Distillation(spec, ratio_cap=None, old_logprobs="self"), alpha)
    reference = ("chosen_ref_logprobs", "rejected_ref_logprobs") if preference.needs_reference else ()
    if beta and present.issuperset((*_PAIR, *reference)):
        channels["preference"] = (preference, beta)
    if not channels:
        raise UserError(
            "no channel has its columns",
            where="batch",
            fix=f"give {', '.join(_RESPONSE)} for cross-entropy; there are {', '.join(sorted(present)) or 'none'}",
        )
    return Objective(channels)
