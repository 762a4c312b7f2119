"""Every column of the batch, declared once: name, dtype, shape, meaning, who writes it.

Shapes: [B] one value a sample; [B, j] a jagged column (see ``rlsys.batch.jagged``); ``object`` columns live in
``non_tensor_batch``. Jagged response columns all have the same offsets: prompt and response tokens of a sample are
``prompt_ids`` and ``response_ids``, and every ``[B, j:response]`` column has one value a response token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    # rollout
    Column("sample_index", torch.int64, "[B]", "rollout", "which of the group's samples this is, 0 … n-1"),
    Column("response_ids", torch.int64, "[B, j:response]", "rollout", "tokens after the prompt, sampled or given"),
    Column("response_mask", torch.bool, "[B, j:response]", "rollout", "1 on sampled tokens only"),
    Column("rollout_logprobs", torch.float32, "[B, j:response]", "rollout", "log μ of sampled tokens at the sampling temperature, in nats; 0 elsewhere"),
    Column("weight_version", torch.int64, "[B, j:response]", "rollout", "lineage << 32 | step of the weights that sampled the token; -1 on given ones"),
    Column("finish_reason", None, "[B]", "rollout", "str: 'stop' (end token or stop rule), 'length' (limit reached), 'error'"),
    # reward
    Column("rewards", torch.float32, "[B]", "reward", "weighted sum of the parts"),
    Column("scores", None, "[B]", "reward", "dict: part name -> float, None where its condition did not hold"),
    Column("feedback", None, "[B]", "reward", "str or None: what the environment says about this response"),
    # reference, old log-probs
    Column("ref_logprobs", torch.float32, "[B, j:response]", "reference", "log-probs of the frozen reference at the sampling temperature; 0 off the mask"),
    Column("old_logprobs", torch.float32, "[B, j:response]", "old log-probs", "log π_old: the trainer's own, before its first optimiser step on the batch"),
    # advantage
    Column("advantages", torch.float32, "[B, j:response]", "advantage", "one value a token; 0 off the mask"),
]  # fmt: skip

COLUMNS: dict[str, Column] = {column.name: column for column in _DECLARED}
