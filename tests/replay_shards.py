"""Shards of played prompt groups, made of texts by a real tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlsys.batch import DataProto, jagged
from rlsys.batch.versions import WeightVersion
from rlsys.config.assets import bundled_model
from rlsys.data.prompts import load_tokenizer
from rlsys.environments.base import Span, Trajectory
from rlsys.environments.play import trajectories_to_batch

TOKENIZER: PreTrainedTokenizerBase = load_tokenizer(bundled_model("bundled:arithmetic"))
END = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def sampled(text: str, *, end: bool = False) -> Span:
    tokens = [*ids(text), *([END] if end else [])]
    return Span(tokens, True, [-1.0] * len(tokens), [WeightVersion(0, 0)] * len(tokens))


def given_span(text: str) -> Span:
    return Span(ids(text), False)


def said(text: str, **info: Any) -> Trajectory:
    """A single turn that ends."""
    return Trajectory([sampled(text, end=True)], "stop", info=info)


def shard(
    groups: Sequence[Sequence[Trajectory]],
    *,
    tasks: Sequence[dict[str, Any]] | None = None,
    messages: Sequence[list[dict[str, str]]] | None = None,
) -> tuple[DataProto, list[str]]:
    """The rows and the texts of their responses. Prompt i is ``i+i=`` under the uid ``i@0``."""
    tasks = tasks or [{} for _ in groups]
    texts = [f"{place}+{place}=" for place in range(len(groups))]
    tasks = [{"prompt": text, "answer": "", **task} for text, task in zip(texts, tasks, strict=True)]
    prompts = DataProto.from_dict(
        {
            "prompt_ids": jagged.from_rows(
                [torch.tensor(ids(f"<|user|>{text}<|assistant|>")) for text in texts], dtype=torch.int64
            )
        },
        {"uid": [f"{place}@0" for place in range(len(groups))], "task": tasks},
    )
    batch = trajectories_to_batch(prompts, groups)
    if messages is not None:
        told = [conversation for conversation, group in zip(messages, groups, strict=True) for _ in group]
        column = batch.non_tensor_batch["uid"].copy()
        for row, conversation in enumerate(told):
            column[row] = conversation
        batch.non_tensor_batch["messages"] = column
    rows = [row.tolist() for row in jagged.to_rows(batch.batch["response_ids"])]
    return batch, TOKENIZER.batch_decode(rows, skip_special_tokens=True)
