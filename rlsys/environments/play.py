"""Plays prompts in an environment and lays the trajectories out as rows of the batch."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlsys.batch import DataProto, jagged
from rlsys.batch.versions import GIVEN
from rlsys.environments.base import Environment, Sample, Sampler, SamplingParams, Span, Trajectory


@dataclass(frozen=True)
class SamplingSettings:
    """What all samples of a shard have in common.

    temperature: of the policy; 0: greedy.
    max_tokens: longest response, all turns and the tokens given between them together.
    stop, stop_token_ids: what ends a sampled span, besides the model's end-of-sequence ids.
    """

    temperature: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


def sample_seed(run_seed: int, uid: str, sample_index: int, attempt: int = 0, turn: int = 0) -> int:
    """The seed of one sample, 0 … 2⁶³-1: the same wherever and whenever it is sampled.

    Args:
        run_seed: of the run.
        uid: of the prompt group.
        sample_index: which of the group's samples.
        attempt: how often this sample was asked for before.
        turn: how often the trajectory has sampled before.
    """
    key = f"{run_seed}\0{uid}\0{sample_index}\0{attempt}\0{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class BoundClient:
    """The :class:`rlsys.environments.base.SamplingClient` of one sample of one prompt."""

    def __init__(
        self,
        engine: Sampler,
        settings: SamplingSettings,
        *,
        prompt_tokens: int,
        run_seed: int,
        uid: str,
        sample_index: int,
        attempt: int,
    ):
        self._engine = engine
        self._settings = settings
        self._limit = prompt_tokens + settings.max_tokens
        self._seed_parts = (run_seed, uid, sample_index, attempt)
        self._turn = 0

    async def sample(self, token_ids: list[int], *, max_tokens: int | None = None) -> Sample:
        """Continues ``token_ids`` within what is left of the response limit; nothing left: empty, ``length``."""
        left = self._limit - len(token_ids)
        if max_tokens is not None:
            left = min(left, max_tokens)
        if left <= 0:
            return Sample([], [], [], "length")
        seed = sample_seed(*self._seed_parts, turn=self._turn)
        self._turn += 1
        settings = self._settings
        params = SamplingParams(settings.temperature, left, seed, settings.stop, settings.stop_token_ids)
        return await self._engine.generate(token_ids, params)


async def play_group(
    environment: Environment,
    prompt_ids: list[int],
    task: dict[str, Any],
    *,
    uid: str,
    samples: int,
    engine: Sampler,
    settings: SamplingSettings,
    run_seed: int,
    attempt: int = 0,
) -> list[Trajectory]:
    """Plays ``samples`` samples of one prompt at once, in order of their index. A failing sample cancels the others."""

    async def play(index: int) -> Trajectory:
        client = BoundClient(
            engine,
            settings,
            prompt_tokens=len(prompt_ids),
            run_seed=run_seed,
            uid=uid,
            sample_index=index,
            attempt=attempt,
        )
        return await environment.run(list(prompt_ids), task, client)

    plays = [asyncio.create_task(play(index)) for index in range(samples)]
    try:
        return await asyncio.gather(*plays)
    finally:
        for unfinished in plays:
            unfinished.cancel()


def trajectories_to_batch(prompts: DataProto, groups: Sequence[Sequence[Trajectory]]) -> DataProto:
    """One row a trajectory, whole groups in the order of the prompts.

    Args:
        prompts: columns uid, prompt_ids, task; one row a prompt.
        groups: each prompt's trajectories, by sample index.

    Returns:
        Those columns, repeated, and sample_index, response_ids, response_mask, rollout_logprobs, weight_version,
        finish_reason, environment as ``rlsys.batch.columns`` declares them.

    Raises:
        ValueError: a span's log-probs or versions are not one a token.
    """
    rows = [trajectory for group in groups for trajectory in group]
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    source = torch.arange(len(prompts)).repeat_interleave(sizes)
    columns = [_columns(trajectory) for trajectory in rows]
    lengths = torch.tensor([len(ids) for ids, *_ in columns], dtype=torch.int64)

    def column(index: int, dtype: torch.dtype) -> torch.Tensor:
        flat = [value for row in columns for value in row[index]]
        return jagged.from_values(torch.tensor(flat, dtype=dtype), lengths)

    batch = prompts.select(batch_keys=["prompt_ids"], non_tensor_batch_keys=["uid", "task", "messages"]).select_idxs(
        source
    )
    return batch.union(
        DataProto.from_dict(
            tensors={
                "sample_index": torch.cat([torch.arange(len(group)) for group in groups]),
                "response_ids": column(0, torch.int64),
                "response_mask": column(1, torch.bool),
                "rollout_logprobs": column(2, torch.float32),
                "weight_version": column(3, torch.int64),
            },
            non_tensors={
                "finish_reason": np.array([row.finish_reason for row in rows], dtype=object),
                "environment": np.array([{"feedback": row.feedback, "info": row.info} for row in rows], dtype=object),
            },
        )
    )


def _columns(trajectory: Trajectory) -> tuple[list[int], list[bool], list[float], list[int]]:
    """Tokens, mask, log-probs and packed versions of one trajectory's response."""
    token_ids: list[int] = []
    mask: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for span in trajectory.spans:
        n = len(span.token_ids)
        token_ids += span.token_ids
        mask += [span.sampled] * n
        logprobs += _one_a_token(span.logprobs, "log-probs", span) if span.sampled else [0.0] * n
        versions += [v.packed() for v in _one_a_token(span.versions, "versions", span)] if span.sampled else [GIVEN] * n
    return token_ids, mask, logprobs, versions


def _one_a_token(values: list[Any], what: str, span: Span) -> list[Any]:
    if len(values) != len(span.token_ids):
        raise ValueError(f"a sampled span of {len(span.token_ids)} tokens came with {len(values)} {what}")
    return values
