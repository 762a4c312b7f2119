"""The composed loss as a free function, for a look at values and gradients without a trainer: the trainer's own
channels, rows and forward pass, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rlsys.algorithms.channels import CrossEntropy, Distillation, Preference
from rlsys.algorithms.divergences import DIVERGENCES, check_divergence
from rlsys.algorithms.objective import Channel, DivergencePass, ForwardOutput, Objective, TeacherOutput
from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.config.errors import UserError
from rlsys.config.plugins import reads_of
from rlsys.engines.train.model import PolicyModel, check_head, context_length
from rlsys.engines.train.rows import MicroBatch, RankRows
from rlsys.engines.train.teacher import Teacher

_RESPONSE = ("prompt_ids", "response_ids", "response_mask")
_TEACHER = ("teacher_prompt_ids", "teacher_mask")
_PAIR = ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
_WHOLE = 1 << 40  # more tokens than any batch has: it is one micro-batch

# Arguments here, by the configuration keys that the parts below name in their errors; the longer ones first.
_ARGUMENTS = {
    "algorithm.distillation.divergence_options.t": "taid_t",
    "algorithm.distillation.divergence_options.h_max": "entropy_opd_h_max",
    "algorithm.distillation.divergence_options": "sdpo_options",
    "algorithm.distillation.divergence": "sdpo_wrapper",
    "algorithm.preference.loss_options": "dpo_options",
    "algorithm.preference.loss": "dpo_variant",
}


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
    sdpo_options: Mapping[str, Any] | None = None,
    taid_t: float | None = None,
    entropy_opd_h_max: float | None = None,
    temperature: float = 1.0,
) -> ComposedLoss:
    """Cross-entropy + α · self-distillation + β · preferences on a model that the caller holds.

    A channel is off where its weight is 0 or one of its columns is missing; a row without a teacher's prompt or without
    a pair adds nothing to that channel. The teacher is the model itself behind ``teacher_prompt_ids``, without
    gradient. The whole batch is one micro-batch, on the model's device; neither it nor the model is changed. A model in
    training mode drops out, which the trainer's never does.

    Args:
        model: a causal language model of transformers, with a linear head.
        batch: columns ``prompt_ids``, ``response_ids``, ``response_mask``; for self-distillation also
            ``teacher_prompt_ids``, ``teacher_mask``; for preferences ``chosen_ids``, ``chosen_mask``, ``rejected_ids``,
            ``rejected_mask`` and, unless the variant does without, ``chosen_ref_logprobs``, ``rejected_ref_logprobs``
            (shapes in ``rlsys.batch.columns``).
        alpha_sdpo, beta_replay: α and β, 0 or above.
        dpo_variant, dpo_options: name or import path of the preference loss, and its options.
        sdpo_wrapper, sdpo_options: name or import path of the divergence, and its options.
        taid_t: interpolation of ``sdpo_wrapper="taid"``, from 0 (the student itself) to 1 (the teacher).
        entropy_opd_h_max: the entropy in nats at which ``sdpo_wrapper="entropy_opd"`` is all forward KL; None: log V.
        temperature: logits are divided by it.

    Raises:
        UserError: the batch has no rows, no channel has its columns, a weight or an option is not what it may be (also
            of a channel that is off), or the model or a row is one that the trainer refuses.
    """
    for name, value in {"alpha_sdpo": alpha_sdpo, "beta_replay": beta_replay}.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"a weight is a number of at least 0, not {value}", where=name)
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"a temperature is above 0, not {temperature}", where="temperature")
    check_head(model, model.name_or_path or type(model).__name__)
    columns = {} if batch.batch is None else {name: column.cpu() for name, column in batch.batch.items()}
    with _own_names():
        spec = _spec(sdpo_wrapper, dict(sdpo_options or {}), taid_t, entropy_opd_h_max)
        preference = Preference(dpo_variant, dict(dpo_options or {}))
        objective = _objective(set(columns), alpha_sdpo, beta_replay, preference, spec)
        if not len(batch):
            raise UserError("the batch has no rows", where="batch")
        columns.setdefault("pair_slot", torch.ones(len(batch), dtype=torch.bool))
        given = DataProto.from_dict(tensors=columns)
        names = _columns(objective)
        check_columns(given, names, "compose_loss")
        _check_ids(given, names, model.get_input_embeddings().num_embeddings)
        rows = RankRows(
            given,
            objective.reads,
            max_length=context_length(model),
            token_budget=_WHOLE,
            sequences=objective.sequences,
            teacher=objective.divergence is not None,
        )
        (micro,) = rows.cut(1, model.get_input_embeddings().weight.device)
        output = _run(PolicyModel(model, temperature=temperature), micro, objective.divergence)
        result = objective.loss(micro.response, output, objective.prepare(rows.whole()), micro.token_index)
    metrics = {name: float(value) for name, value in {**result.totals, **result.maxima}.items()}
    metrics |= {name: float(value) / max(float(count), 1.0) for name, (value, count) in result.sums.items()}
    return ComposedLoss(result.loss, {name: metrics[f"{name}/loss"] for name in objective.channels}, metrics)


def _columns(objective: Objective) -> tuple[str, ...]:
    """Every column that is read, the sequences' own first."""
    response = _RESPONSE if "response" in objective.sequences else ()
    teacher = _TEACHER if objective.divergence is not None else ()
    pairs = _PAIR if "chosen" in objective.sequences else ()
    return tuple(dict.fromkeys((*response, *teacher, *pairs, *objective.reads)))


def _check_ids(batch: DataProto, names: Sequence[str], vocabulary: int) -> None:
    for name in names:
        if name.endswith("_ids"):
            ids = jagged.values(batch.batch[name])
            wrong = torch.nonzero((ids < 0) | (ids >= vocabulary)).flatten()
            if len(wrong):
                row = int(torch.searchsorted(jagged.offsets(batch.batch[name]), wrong[0], right=True)) - 1
                raise UserError(
                    f"row {row} of column '{name}' has the token id {int(ids[wrong[0]])}, and the model has the ids "
                    f"0 to {vocabulary - 1}",
                    where=name,
                    fix="tokenize with the model's own tokenizer",
                )


def _run(policy: PolicyModel, micro: MicroBatch, divergence: DivergencePass | None) -> ForwardOutput:
    """As a rank of the trainer runs a micro-batch."""
    seen, inputs, said = micro.teacher, None, None
    if seen is not None and divergence is not None:
        inputs = Teacher(policy, None, mix=1.0, rate=0.0).look(seen, divergence)
    output = policy(micro.input_ids, micro.positions, micro.targets, False, inputs)
    if seen is not None:
        size = len(micro.token_index)
        said = TeacherOutput(*(v.new_zeros(size).index_copy(0, seen.place, v) for v in output[2:]))
    pairs = {side: micro.spread(output.logprobs, side) for side in micro.scored if side != "response"}
    return ForwardOutput(micro.spread(output.logprobs), micro.spread(output.entropy), pairs, said)


def _spec(wrapper: str, options: dict[str, Any], taid_t: float | None, h_max: float | None) -> DivergencePass:
    function = DIVERGENCES.get(wrapper, where="sdpo_wrapper")
    moves = "t" in reads_of(function)
    for option, argument, value in (("t", "taid_t", taid_t), ("h_max", "entropy_opd_h_max", h_max)):
        if value is not None and option in options:
            raise UserError(f"'{option}' is given twice", where=f"sdpo_options.{option}", fix=f"give {argument} alone")
    if taid_t is not None:
        if not moves:
            raise UserError(f"'{wrapper}' has no interpolation", where="taid_t", fix="use sdpo_wrapper='taid'")
        options["t"] = taid_t
    if h_max is not None:
        if wrapper != "entropy_opd":
            raise UserError(f"'{wrapper}' has no gate", where="entropy_opd_h_max", fix="use sdpo_wrapper='entropy_opd'")
        options["h_max"] = h_max
    if moves and options.get("t") is None:
        raise UserError(f"'{wrapper}' needs its interpolation", where="taid_t", fix="give a number from 0 to 1")
    check_divergence(wrapper, options)
    return DivergencePass(wrapper, options)


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
            "no channel has both a weight and its columns",
            where="batch",
            fix=f"give {', '.join(_RESPONSE)} for cross-entropy; there are {', '.join(sorted(present)) or 'none'}",
        )
    return Objective(channels)


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors of the parts name the arguments of this function in place of configuration keys."""
    try:
        yield
    except UserError as error:
        key = next((key for key in _ARGUMENTS if (error.where or "").startswith(key)), None)
        if key is None or error.where is None:
            raise
        raise UserError(error.what, where=_ARGUMENTS[key] + error.where[len(key) :], fix=error.fix) from error
