"""Rows of ``rollouts/step-….jsonl``: what was sampled, what it earned, and what the sampler thought of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlsys.batch.versions import GIVEN, WeightVersion

_DECIMALS = 7  # of a log-prob: float32 has no more


def rollout_row(
    *,
    uid: str,
    sample_index: int,
    prompt: str,
    response: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    response_mask: Sequence[bool],
    logprobs: Sequence[float],
    versions: Sequence[int],
    finish_reason: str,
    reward: float,
    scores: Mapping[str, float | None],
    answer: Any = None,
    feedback: str | None = None,
    info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One sampled response as JSON content.

    Args:
        versions: packed weight version of each response token (column ``weight_version``); written as runs of
            ``{"lineage", "step", "tokens"}``, with null for tokens that nobody sampled.
        logprobs: log μ of each response token.
    """
    return {
        "uid": uid,
        "sample_index": int(sample_index),
        "prompt": prompt,
        "response": response,
        "answer": answer,
        "reward": float(reward),
        "scores": dict(scores),
        "finish_reason": finish_reason,
        "feedback": feedback,
        "info": dict(info or {}),
        "weight_versions": _runs(versions),
        "prompt_ids": [int(token) for token in prompt_ids],
        "response_ids": [int(token) for token in response_ids],
        "response_mask": [int(sampled) for sampled in response_mask],
        "rollout_logprobs": [round(float(value), _DECIMALS) for value in logprobs],
    }


def _runs(versions: Iterable[int]) -> list[dict[str, int | None]]:
    runs: list[dict[str, int | None]] = []
    for packed, tokens in itertools.groupby(versions):
        version = None if packed == GIVEN else WeightVersion.unpack(int(packed))
        lineage, step = (None, None) if version is None else version
        runs.append({"lineage": lineage, "step": step, "tokens": len(list(tokens))})
    return runs
