"""What only the torch engine can get wrong: its own forward pass, rows that come and go, whole batches as a way out."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import FAMILIES, make_model, make_model_folder

from rlsys.config.schema import TorchRollout
from rlsys.engines.rollout import Sample, SamplingParams, kv_cache
from rlsys.engines.rollout.batching import Continuation, ContinuousBatch, Finished
from rlsys.engines.rollout.decoder import Decoder, unsupported
from rlsys.engines.rollout.torch import TorchEngine

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11], [30]
ENDS = (1, 20, 21, 22, 23)


def sequence(prompt: list[int], seed: int, limit: int = 20, temperature: float = 1.0, **more: Any) -> Continuation:
    return Continuation(prompt, SamplingParams(temperature, limit, seed, **more), limit, key=seed)


def batch_of(model: Any, rows: int = 64) -> ContinuousBatch:
    return ContinuousBatch(Decoder(model, 128), model.config.vocab_size, rows, ENDS, lambda ids: "".join(map(str, ids)))


def play(batch: ContinuousBatch, waves: list[list[Continuation]]) -> dict[Any, Finished]:
    """Adds a wave after each time that rows ended, and runs to the end."""
    finished: list[Finished] = []
    for wave in waves:
        finished += batch.add(wave)
        finished += batch.run()
    while len(batch):
        finished += batch.run()
    return {response.sequence.key: response for response in finished}


@torch.no_grad()
def reference(model: Any, response: Finished) -> torch.Tensor:
    prompt, tokens = response.sequence.prompt, response.token_ids
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    logits = logits / (response.sequence.params.temperature or 1.0)
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_computes_what_the_model_does(family: Any, tied: bool) -> None:
    model = make_model(family, tied=tied)
    plain = make_model(family, tied=tied)
    prompts = [LONG, SHORT, SHORT, LONG[:4], [40, 41]]
    found = play(batch_of(model), [[sequence(prompt, seed) for seed, prompt in enumerate(prompts)]])
    assert len(found) == len(prompts)
    for response in found.values():
        torch.testing.assert_close(torch.tensor(response.logprobs), reference(plain, response), atol=2e-5, rtol=0)
    for (name, own), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(own, other), name


def test_in_bfloat16_it_is_as_near_to_float32_as_the_model_is() -> None:
    model, plain = make_model(scale=0.1).bfloat16(), make_model(scale=0.1).bfloat16()
    exact = make_model(scale=0.1)
    found = play(batch_of(model), [[sequence(prompt, i) for i, prompt in enumerate([LONG, SHORT, LONG[:3]])]])
    own, theirs = 0.0, 0.0
    for response in found.values():
        truth = reference(exact, response)
        own = max(own, float((torch.tensor(response.logprobs) - truth).abs().max()))
        theirs = max(theirs, float((reference(plain, response) - truth).abs().max()))
    assert own < 2 * theirs


def test_what_memory_held_before_does_not_reach_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    waves = [[sequence(SHORT, s, limit=2 + 3 * s) for s in range(5)], [sequence(LONG, 9), sequence(SHORT, 10)]]
    clean = play(batch_of(model), waves)
    dirty = batch_of(model)
    lay_out = dirty._cache._lay_out

    def with_nan(*args: int) -> None:
        lay_out(*args)
        dirty._cache._buffer.fill_(float("nan"))

    monkeypatch.setattr(dirty._cache, "_lay_out", with_nan)
    assert play(dirty, waves) == clean


def test_rows_that_enter_late_are_what_they_are_alone() -> None:
    model = make_model()
    waves = [
        [sequence(LONG, seed, limit=3 + 5 * seed) for seed in range(4)],
        [sequence(SHORT, seed, limit=40) for seed in range(10, 14)],
        [sequence(list(range(3, 33)), seed, limit=9) for seed in range(20, 23)],  # longer than all that is cached
        [sequence([9, 9], seed, limit=60, temperature=0.5) for seed in range(30, 36)],
    ]
    together = play(batch_of(model), waves)
    for wave in waves:
        for one in wave:
            alone = play(batch_of(model), [[one]])[one.key]
            assert together[one.key].token_ids == alone.token_ids
            assert together[one.key].stopped == alone.stopped
            torch.testing.assert_close(
                torch.tensor(together[one.key].logprobs), reference(model, alone), atol=2e-5, rtol=0
            )


def test_the_same_calls_are_the_same_bits_in_a_batch_that_was_used_before() -> None:
    model = make_model()
    waves = [[sequence(LONG, s) for s in range(6)], [sequence(SHORT, s, limit=30) for s in range(10, 13)]]
    used = batch_of(model)
    play(used, [[sequence(list(range(3, 40)), s, limit=70) for s in range(100, 140)]])
    assert play(used, waves) == play(batch_of(model), waves) == play(used, waves)


def test_a_cache_that_is_made_step_by_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    wave = [sequence(prompt, seed, limit=90) for seed, prompt in enumerate([LONG, SHORT] * 6)]
    whole = play(batch_of(model), [wave])
    monkeypatch.setattr(kv_cache, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(kv_cache, "_FIRST_COLUMNS", 4)
    grown = play(batch_of(model), [wave])
    assert {key: r.token_ids for key, r in grown.items()} == {key: r.token_ids for key, r in whole.items()}


def test_a_shared_prompt_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    batch = batch_of(model)
    seen: list[tuple[int, ...]] = []
    prefill = batch._decoder.prefill

    def counted(token_ids: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.append(tuple(token_ids.shape))
        return prefill(token_ids, *args, **more)

    monkeypatch.setattr(batch._decoder, "prefill", counted)
    play(batch, [[sequence(prompt, 10 * i + s) for i, prompt in enumerate([SHORT, LONG]) for s in range(8)]])
    assert seen == [(2, len(LONG))]


def test_a_row_that_nobody_waits_for_leaves() -> None:
    model = make_model()
    wave = [sequence(LONG, seed, limit=60) for seed in range(6)]
    batch = batch_of(model)
    early = batch.add(wave)
    batch.drop(lambda s: s.key in (0, 4))
    found = {r.sequence.key: r for r in early} | play(batch, [])
    alone = play(batch_of(model), [wave])
    assert set(found) - {r.sequence.key for r in early} <= {1, 2, 3, 5}
    assert all(found[key].token_ids == alone[key].token_ids for key in found)


def engine_at(folder: Path, **changes: Any) -> TorchEngine:
    return TorchEngine(str(folder), TorchRollout(engine="torch", samples_per_prompt=2, **changes), max_length=64)


async def sampled(engine: TorchEngine, calls: list[tuple[list[int], SamplingParams]]) -> list[Sample]:
    return await asyncio.gather(*(engine.generate(prompt, params) for prompt, params in calls))


CALLS = [(prompt, SamplingParams(1.0, 5 + i % 17, i, stop=("7",) if i % 3 else ())) for i, prompt in
         enumerate([LONG, SHORT, [9, 9], LONG[:5]] * 8)]  # fmt: skip


def test_fewer_rows_than_calls_sample_the_same(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)

    async def run(rows: int, calls: list[Any]) -> list[Sample]:
        engine = engine_at(folder, max_concurrent=rows)
        found = await sampled(engine, calls)
        await engine.close()
        return found

    together, few = asyncio.run(run(256, CALLS)), asyncio.run(run(5, CALLS))
    assert [s.token_ids for s in few] == [s.token_ids for s in together]
    assert asyncio.run(run(5, CALLS)) == few
    assert asyncio.run(run(5, CALLS[::-1]))[::-1] == few  # in whatever order they are called


def test_answers_that_call_again_are_repeatable_to_the_bit(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)

    async def conversation(engine: TorchEngine, i: int) -> list[Sample]:
        turns, prompt = [], LONG[: 1 + i % 5]
        for turn in range(3):
            turns.append(await engine.generate(prompt, SamplingParams(1.0, 1 + (i + turn) % 9, 100 * i + turn)))
            prompt = [*prompt, *turns[-1].token_ids, 3]
        return turns

    async def run() -> list[list[Sample]]:
        engine = engine_at(folder, max_concurrent=8)
        found = await asyncio.gather(*(conversation(engine, i) for i in range(20)))
        await engine.close()
        return found

    first = asyncio.run(run())
    assert all(math.isfinite(value) for turns in first for sample in turns for value in sample.logprobs)
    assert asyncio.run(run()) == first


def test_a_model_that_the_decoder_does_not_know_is_sampled_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model_folder(tmp_path)

    async def run() -> list[Sample]:
        engine = engine_at(folder)
        found = await sampled(engine, CALLS)
        await engine.close()
        return found

    own = asyncio.run(run())
    assert not caplog.records
    monkeypatch.setattr("rlsys.engines.rollout.torch.unsupported", lambda model: "a reason")
    whole = asyncio.run(run())
    assert [(s.token_ids, s.finish_reason) for s in whole] == [(s.token_ids, s.finish_reason) for s in own]
    for ours, theirs in zip(own, whole, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=2e-5, rtol=0)
    assert ["a reason" in record.getMessage() for record in caplog.records] == [True]


def test_what_the_decoder_does_not_know_is_named() -> None:
    model = make_model()
    assert unsupported(model) is None
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert "sliding" in str(unsupported(model))
    other = make_model("llama")
    other.base_model.rotary_emb.rope_type = "dynamic"
    assert "dynamic" in str(unsupported(other))
