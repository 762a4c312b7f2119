# ruff: noqa: E501 (one column a line)
"""Every column of the batch, declared once: name, dtype, shape, meaning, who writes it.

Shapes: [B] one value a sample; [B, j] a jagged column (see ``rlsys.batch.jagged``); ``object`` columns live in
``non_tensor_batch``. Jagged response columns all have the same offsets: prompt and response tokens of a sample are
``prompt_ids`` and ``response_ids``, and every ``[B, j:response]`` column has one value a response token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlsys.batch import jagged
from rlsys.batch.errors import ColumnError

if TYPE_CHECKING:
    from rlsys.batch.proto import DataProto


@dataclass(frozen=True)
class Column:
    """One declared column. ``dtype`` None: an object column. ``writer``: the stage that writes it."""

    name: str
    dtype: torch.dtype | None
    shape: str
    writer: str
    meaning: str


_DECLARED = [
    # prompts (data/)
    Column("uid", None, "[B]", "prompts", "id of the prompt group, str: 'ROW@EPOCH'; the same for all samples of a prompt"),
    Column("prompt_ids", torch.int64, "[B, j:prompt]", "prompts", "prompt tokens after the chat template"),
    Column("task", None, "[B]", "prompts", "dict: prompt (text), answer, and the row's other fields, for rewards"),
    Column("messages", None, "[B]", "prompts", "list of {role, content}: the row's conversation, before the system prompt of the configuration"),
    # rollout
    Column("sample_index", torch.int64, "[B]", "rollout", "which of the group's samples this is, 0 … n-1"),
    Column("response_ids", torch.int64, "[B, j:response]", "rollout", "tokens after the prompt, sampled or given"),
    Column("response_mask", torch.bool, "[B, j:response]", "rollout", "1 on sampled tokens only"),
    Column("rollout_logprobs", torch.float32, "[B, j:response]", "rollout", "log μ of sampled tokens at the sampling temperature, in nats; 0 elsewhere"),
    Column("weight_version", torch.int64, "[B, j:response]", "rollout", "lineage << 32 | step of the weights that sampled the token; -1 on given ones"),
    Column("finish_reason", None, "[B]", "rollout", "str: 'stop' (end token or stop rule) or 'length' (limit reached)"),
    Column("environment", None, "[B]", "rollout", "dict: feedback (str or None) and info (scalars) of the environment"),
    # reward
    Column("rewards", torch.float32, "[B]", "reward", "weighted sum of the parts"),
    Column("scores", None, "[B]", "reward", "dict: part name -> float, None where its condition did not hold"),
    Column("feedback", None, "[B]", "reward", "str or None: what environment and reward say about this response"),
    # reference, old log-probs
    Column("ref_logprobs", torch.float32, "[B, j:response]", "reference", "log-probs of the frozen reference at the sampling temperature; 0 off the mask"),
    Column("old_logprobs", torch.float32, "[B, j:response]", "old log-probs", "log π_old: the trainer's own, before its first optimiser step on the batch"),
    Column("old_entropy", torch.float32, "[B, j:response]", "old log-probs", "entropy of π_old's distribution at the token, in nats; 0 off the mask"),
    # critic, advantage
    Column("values", torch.float32, "[B, j:response]", "critic", "the critic's value of the state before the token; 0 off the mask"),
    Column("returns", torch.float32, "[B, j:response]", "advantage", "what the critic's value should have been; 0 off the mask"),
    Column("advantages", torch.float32, "[B, j:response]", "advantage", "one value a token; 0 off the mask"),
    # hints: the teacher's sequence is teacher_prompt_ids and response_ids from the first to the last token of teacher_mask
    Column("teacher_prompt_ids", torch.int64, "[B, j:teacher_prompt]", "hints", "what the teacher sees before the first token of teacher_mask; empty where there is no teacher"),
    Column("has_teacher", torch.bool, "[B]", "hints", "1 where the teacher sees more than the policy does"),
    Column("teacher_mask", torch.bool, "[B, j:response]", "hints", "1 on tokens whose divergence counts: the response's sampled ones, or one turn's; 0 where there is no teacher"),
    Column("functional_mask", torch.bool, "[B, j:response]", "hints", "1 on tokens of text that algorithm.functional_tokens matches"),
    # pairs: empty rows where a sample has none
    Column("chosen_ids", torch.int64, "[B, j:chosen]", "pairs", "prompt and response tokens of the pair's better side"),
    Column("chosen_mask", torch.bool, "[B, j:chosen]", "pairs", "1 on response tokens that are scored; 0 on the prompt"),
    Column("chosen_ref_logprobs", torch.float32, "[B, j:chosen]", "pairs", "log-probs of the frozen reference; 0 off the mask"),
    Column("rejected_ids", torch.int64, "[B, j:rejected]", "pairs", "prompt and response tokens of the pair's worse side"),
    Column("rejected_mask", torch.bool, "[B, j:rejected]", "pairs", "1 on response tokens that are scored; 0 on the prompt"),
    Column("rejected_ref_logprobs", torch.float32, "[B, j:rejected]", "pairs", "log-probs of the frozen reference; 0 off the mask"),
    Column("pair_id", None, "[B]", "pairs", "str: which pair; None where the row has none"),
    Column("pair_slot", torch.bool, "[B]", "pairs", "1 on rows that the source of pairs was asked to fill"),
]  # fmt: skip

COLUMNS: dict[str, Column] = {column.name: column for column in _DECLARED}


def check_columns(batch: DataProto, reads: Iterable[str], stage: str) -> None:
    """That a stage finds the columns it reads, as they are declared; a column that is not declared need only be there.

    Jagged columns of one kind (``[B, j:response]``) must have the same row lengths. A batch with neither rows nor
    columns, such as an idle rank's, passes.

    Args:
        stage: who reads, as the error names it.

    Raises:
        ColumnError: names the column, what is wrong, the stage that writes it and the stage that wants it.
    """
    tensors = {} if batch.batch is None else dict(batch.batch.items())
    if not tensors and not batch.non_tensor_batch:
        return
    offsets: dict[str, tuple[str, torch.Tensor]] = {}
    for name in reads:
        column = tensors.get(name)
        declared = COLUMNS.get(name)
        if column is None and name not in batch.non_tensor_batch:
            raise _column_error(name, "is missing", stage)
        if declared is None:
            continue
        if wrong := _ill_typed(declared, column):
            raise _column_error(name, wrong, stage)
        if column is not None and "j:" in declared.shape:
            other, known = offsets.setdefault(declared.shape, (name, jagged.offsets(column)))
            if not torch.equal(known, jagged.offsets(column)):
                row, here, there = _first_difference(jagged.offsets(column), known)
                raise _column_error(
                    name,
                    f"does not have the row lengths of '{other}', its like {declared.shape}: row {row} has {here} "
                    f"values, and there {there}",
                    stage,
                )


def _first_difference(offsets: torch.Tensor, other: torch.Tensor) -> tuple[int, int, int]:
    """The first row with different lengths, and these; offsets: [B + 1] of each."""
    lengths, known = offsets.diff(), other.diff()
    rows = min(len(lengths), len(known))
    unlike = torch.nonzero(lengths[:rows] != known[:rows]).flatten()
    row = int(unlike[0]) if len(unlike) else rows
    here, there = (int(n[row]) if row < len(n) else 0 for n in (lengths, known))
    return row, here, there


def _ill_typed(declared: Column, column: torch.Tensor | None) -> str | None:
    """What is not as declared. ``column`` None: it is an object column."""
    if (column is None) != (declared.dtype is None):
        return (
            "is a tensor, and declared as an object column"
            if column is not None
            else "is an object column, and declared as a tensor"
        )
    if column is None:
        return None
    if column.dtype != declared.dtype:
        return f"is of {column.dtype}, and declared as {declared.dtype}"
    if jagged.is_jagged(column) != ("j:" in declared.shape):
        return f"is {'jagged' if jagged.is_jagged(column) else 'dense'}, and declared as {declared.shape}"
    if not jagged.is_jagged(column) and column.ndim != declared.shape.count(",") + 1:
        return f"has the shape {tuple(column.shape)}, and is declared as {declared.shape}"
    return None


def _column_error(name: str, wrong: str, stage: str) -> ColumnError:
    declared = COLUMNS.get(name)
    written = (
        f"the stage '{declared.writer}' writes it"
        if declared is not None
        else "no stage declares it (rlsys/batch/columns.py)"
    )
    return ColumnError(
        f"column '{name}' {wrong}: the stage '{stage}' wants it, {written}",
        where=f"stage '{stage}'",
        fix=f"run the stage '{declared.writer}' before '{stage}'"
        if declared is not None
        else "write it before, or read another column",
    )
