"""Environments are driven with seeds that belong to the sample, and their trajectories become rows of the batch."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import COLUMNS
from rlsys.batch.versions import GIVEN, WeightVersion
from rlsys.environments.base import Sample, SamplingClient, SamplingParams, Span, Trajectory
from rlsys.environments.play import SamplingSettings, play_group, sample_seed, trajectories_to_batch
from rlsys.environments.single_turn import SingleTurn

SETTINGS = SamplingSettings(temperature=0.7, max_tokens=10, stop=("x",), stop_token_ids=(4,))
VERSION = WeightVersion(2, 7)


class CountingSampler:
    """A sampler whose every token is its position in the sequence; it keeps what it was asked."""

    def __init__(self, span: int = 3) -> None:
        self.span = span
        self.asked: list[tuple[list[int], SamplingParams]] = []

    async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
        self.asked.append((list(token_ids), params))
        await asyncio.sleep(0)
        n = min(self.span, params.max_tokens)
        tokens = list(range(len(token_ids), len(token_ids) + n))
        return Sample(tokens, [-0.5 * t for t in tokens], [VERSION] * n, "length" if n < self.span else "stop")


class AskTwice:
    """Two turns with two given tokens between them; the second one may be short."""

    async def run(self, prompt_ids: list[int], task: dict[str, Any], client: SamplingClient) -> Trajectory:
        first = await client.sample(prompt_ids)
        between = [100, 101]
        second = await client.sample([*prompt_ids, *first.token_ids, *between], max_tokens=task["second"])
        spans = [
            Span(first.token_ids, True, first.logprobs, first.versions),
            Span(between, False),
            Span(second.token_ids, True, second.logprobs, second.versions),
        ]
        return Trajectory(spans, second.finish_reason)


def play(
    environment: Any, sampler: CountingSampler, prompt: list[int], task: dict[str, Any], **given: Any
) -> list[Trajectory]:
    options = {"uid": "0@0", "samples": 2, "engine": sampler, "settings": SETTINGS, "run_seed": 1} | given
    return asyncio.run(play_group(environment, prompt, task, **options))


def prompts(rows: list[list[int]]) -> DataProto:
    return DataProto.from_dict(
        tensors={"prompt_ids": jagged.from_rows([torch.tensor(row) for row in rows])},
        non_tensors={
            "uid": np.array([f"{i}@0" for i in range(len(rows))], dtype=object),
            "task": np.array([{"answer": str(i)} for i in range(len(rows))], dtype=object),
        },
    )


KEYS = st.tuples(st.integers(0, 2**31), st.text(max_size=8), st.integers(0, 64), st.integers(0, 5), st.integers(0, 9))


@given(keys=st.lists(KEYS, unique=True, max_size=50))
def test_every_sample_has_a_seed_of_its_own(keys: list[tuple[int, str, int, int, int]]) -> None:
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len({seed & 0xFFFFFFFF for seed in seeds}) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_process() -> None:
    assert sample_seed(0, "12@3", 5) == 3388744990849404317


def test_a_group_asks_for_the_prompt_with_each_samples_seed() -> None:
    sampler = CountingSampler()
    play(SingleTurn(), sampler, [7, 8], {}, samples=4, uid="5@1", run_seed=9, attempt=2)
    assert [ids for ids, _ in sampler.asked] == [[7, 8]] * 4
    assert [p.seed for _, p in sampler.asked] == [sample_seed(9, "5@1", i, 2) for i in range(4)]
    assert {(p.temperature, p.max_tokens, p.stop, p.stop_token_ids) for _, p in sampler.asked} == {
        (0.7, 10, ("x",), (4,))
    }


def test_the_response_limit_covers_all_turns_and_given_tokens() -> None:
    sampler = CountingSampler(span=7)
    (trajectory,) = play(AskTwice(), sampler, [1, 2], {"second": 50}, samples=1)
    assert [p.max_tokens for _, p in sampler.asked] == [10, 1]
    assert sum(len(span.token_ids) for span in trajectory.spans) == 10
    assert len({p.seed for _, p in sampler.asked}) == 2


def test_nothing_is_asked_when_the_limit_is_reached() -> None:
    sampler = CountingSampler(span=9)
    (trajectory,) = play(AskTwice(), sampler, [1, 2], {"second": 50}, samples=1)
    assert len(sampler.asked) == 1
    assert trajectory.finish_reason == "length"


def test_the_error_of_one_sample_ends_the_group() -> None:
    class Failing(CountingSampler):
        async def generate(self, token_ids: list[int], params: SamplingParams) -> Sample:
            if self.asked:
                raise OSError("no sampler")
            return await super().generate(token_ids, params)

    with pytest.raises(OSError, match="no sampler"):
        play(SingleTurn(), Failing(), [1], {})


def test_rows_are_whole_groups_in_order_with_the_declared_columns() -> None:
    given = prompts([[1, 2, 3], [4]])
    groups = [play(SingleTurn(), CountingSampler(n + 1), row, {}, samples=n) for n, row in ((2, [1, 2, 3]), (3, [4]))]
    batch = trajectories_to_batch(given, groups)
    assert batch.non_tensor_batch["uid"].tolist() == ["0@0"] * 2 + ["1@0"] * 3
    assert [t["answer"] for t in batch.non_tensor_batch["task"]] == ["0"] * 2 + ["1"] * 3
    assert batch.batch["sample_index"].tolist() == [0, 1, 0, 1, 2]
    assert [r.tolist() for r in jagged.to_rows(batch.batch["prompt_ids"])] == [[1, 2, 3]] * 2 + [[4]] * 3
    assert [r.tolist() for r in jagged.to_rows(batch.batch["response_ids"])] == [[3, 4, 5]] * 2 + [[1, 2, 3, 4]] * 3
    for name in ("sample_index", "response_ids", "response_mask", "rollout_logprobs", "weight_version"):
        assert batch.batch[name].dtype == COLUMNS[name].dtype


def test_given_tokens_are_masked_and_carry_no_logprob_and_no_version() -> None:
    group = play(AskTwice(), CountingSampler(), [1, 2], {"second": 1}, samples=1)
    batch = trajectories_to_batch(prompts([[1, 2]]), [group]).batch
    (ids,), (mask,) = jagged.to_rows(batch["response_ids"]), jagged.to_rows(batch["response_mask"])
    assert ids.tolist() == [2, 3, 4, 100, 101, 7]
    assert mask.tolist() == [True, True, True, False, False, True]
    (logprobs,), (versions,) = jagged.to_rows(batch["rollout_logprobs"]), jagged.to_rows(batch["weight_version"])
    assert logprobs.tolist() == [-1.0, -1.5, -2.0, 0.0, 0.0, -3.5]
    packed = VERSION.packed()
    assert versions.tolist() == [packed, packed, packed, GIVEN, GIVEN, packed]


def test_a_response_without_tokens_is_a_row_too() -> None:
    batch = trajectories_to_batch(prompts([[1], [2]]), [[Trajectory([], "length")], [Trajectory([], "stop")]])
    assert jagged.lengths(batch.batch["response_ids"]).tolist() == [0, 0]
    assert batch.non_tensor_batch["finish_reason"].tolist() == ["length", "stop"]


@pytest.mark.parametrize("span", [Span([1, 2], True, [0.0], [VERSION] * 2), Span([1], True, [0.0], [])])
def test_a_sampled_span_without_a_value_a_token_is_refused(span: Span) -> None:
    with pytest.raises(ValueError, match="sampled span"):
        trajectories_to_batch(prompts([[1]]), [[Trajectory([span], "stop")]])
