"""Between jagged columns and the field's dense form of prompts and responses.

jagged              dense               shape       padding
prompt_ids          prompts             [B, P]      left, with the pad token
response_ids        responses           [B, R]      right, with the pad token
(both)              input_ids           [B, P+R]    prompts and responses side by side
                    attention_mask      [B, P+R]    int64, 1 on tokens
                    position_ids        [B, P+R]    int64, 0 on a row's first token
response_mask       response_mask       [B, R]      int64, right, with 0
rollout_logprobs    rollout_log_probs   [B, R]      right, with 0; so old_log_probs, ref_log_prob, advantages
weight_version      weight_version      [B, R]      right, with -1 (a token that nobody sampled)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from rlsys.batch import jagged
from rlsys.batch.columns import COLUMNS
from rlsys.batch.errors import BatchError
from rlsys.batch.versions import GIVEN

DENSE_NAMES = {
    "rollout_logprobs": "rollout_log_probs",
    "old_logprobs": "old_log_probs",
    "ref_logprobs": "ref_log_prob",
    "prompt_ids": "prompts",
    "response_ids": "responses",
}
_JAGGED_NAMES = {dense: name for name, dense in DENSE_NAMES.items()}
_PADDING = {"weight_version": GIVEN}
_DERIVED = ("input_ids", "attention_mask", "position_ids")


def to_padded(batch: TensorDict | None, pad_token_id: int = 0) -> TensorDict | None:
    """Dense columns of all jagged ones; dense ones stay. Jagged columns that are not declared are padded right with 0.

    Returns:
        A new TensorDict; the derived columns are in it if there are prompts and responses.
    """
    if batch is None:
        return None
    columns: dict[str, Tensor] = {}
    for name, column in batch.items():
        if not jagged.is_jagged(column):
            columns[name] = column
        elif name in ("prompt_ids", "response_ids"):
            side: jagged.Side = "left" if name == "prompt_ids" else "right"
            columns[DENSE_NAMES[name]] = jagged.pad(column, pad_token_id, side=side)
        else:
            dense = jagged.pad(column, _PADDING.get(name, 0))
            columns[DENSE_NAMES.get(name, name)] = dense.long() if name == "response_mask" else dense
    if {"prompt_ids", "response_ids"} <= set(batch.keys()) and {"prompts", "responses"} <= columns.keys():
        prompt_mask = jagged.pad(_ones(batch["prompt_ids"]), 0, side="left")
        mask = torch.cat([prompt_mask, jagged.pad(_ones(batch["response_ids"]), 0)], dim=1)
        columns["input_ids"] = torch.cat([columns["prompts"], columns["responses"]], dim=1)
        columns["attention_mask"] = mask
        columns["position_ids"] = (mask.cumsum(1) - 1).clamp_(min=0)
    return TensorDict(columns, batch_size=batch.batch_size, device=batch.device)


def from_padded(batch: TensorDict | None, response_columns: Sequence[str] = ()) -> TensorDict | None:
    """The reverse: jagged columns by the lengths that ``attention_mask`` tells, other columns as they are.

    Args:
        batch: with ``prompts``, ``responses`` and ``attention_mask``. ``input_ids`` and ``position_ids`` go.
        response_columns: further columns [B, R, …] to cut to the responses, beside those that ``columns.py`` declares.

    Raises:
        BatchError: a column is missing or has another width, or a row's tokens are not next to each other.
    """
    if batch is None:
        return None
    present = set(batch.keys())
    if missing := {"prompts", "responses", "attention_mask"} - present:
        raise BatchError(
            f"a padded batch has the columns prompts, responses and attention_mask; '{min(missing)}' is missing"
        )
    width = batch["prompts"].shape[1], batch["responses"].shape[1]
    mask = batch["attention_mask"].bool()
    if mask.shape[1] != sum(width):
        raise BatchError(f"attention_mask is {mask.shape[1]} wide, prompts and responses {width[0]} and {width[1]}")
    prompts, responses = mask[:, : width[0]], mask[:, width[0] :]
    if bool((prompts[:, :-1] & ~prompts[:, 1:]).any() or (~responses[:, :-1] & responses[:, 1:]).any()):
        raise BatchError("attention_mask has a gap: prompts are padded left, responses right")
    sizes = responses.sum(1)
    columns: dict[str, Tensor] = {}
    for name, column in batch.items():
        target = _JAGGED_NAMES.get(name, name)
        if name in _DERIVED:
            continue
        if name == "prompts":
            columns[target] = jagged.unpad(column, prompts.sum(1), side="left")
        elif name in response_columns or _is_response_column(target):
            if column.ndim < 2 or column.shape[1] != width[1]:
                raise BatchError(f"column '{name}' has shape {tuple(column.shape)}, responses are {width[1]} wide")
            dense = column.bool() if target == "response_mask" else column
            columns[target] = jagged.unpad(dense, sizes)
        else:
            columns[name] = column
    shared = jagged.offsets(columns["response_ids"])
    for name, column in columns.items():
        if jagged.is_jagged(column) and name != "prompt_ids":
            columns[name] = jagged.from_values(jagged.values(column), offsets=shared)
    return TensorDict(columns, batch_size=batch.batch_size, device=batch.device)


def _ones(column: Tensor) -> Tensor:
    flat = jagged.values(column)
    return jagged.from_values(torch.ones_like(flat, dtype=torch.int64), offsets=jagged.offsets(column))


def _is_response_column(name: str) -> bool:
    return name in COLUMNS and COLUMNS[name].shape == "[B, j:response]"
