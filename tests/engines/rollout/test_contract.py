"""What every rollout engine promises, checked on each against a plain float32 forward pass of the same weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from in_flight import assert_sampled_by, starts
from model_folders import EOS, make_model, make_model_folder, make_tokenizer

from rlsys.batch.versions import WeightVersion
from rlsys.config.errors import UserError
from rlsys.config.schema import TorchRollout, VllmRollout
from rlsys.engines.rollout import RolloutEngine, start_engine
from rlsys.engines.rollout.base import InFlight
from rlsys.engines.sync.buckets import Bucket, pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.verify import SyncError
from rlsys.environments.base import Sample, SamplingParams

MAX_LENGTH = 128
SECOND_END = 20  # named in generation_config.json only
FIRST = WeightVersion(0, 0)


@dataclass
class Sampler:
    """An engine, the loop it lives in, and the folder that it was started from."""

    engine: RolloutEngine
    runner: asyncio.Runner
    folder: Path

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Sample]:
        async def all_at_once() -> list[Sample]:
            return await asyncio.gather(*(self.engine.generate(p, s) for p, s in zip(prompts, params, strict=True)))

        return self.run(all_at_once())

    def one(self, prompt: list[int], **params: Any) -> Sample:
        return self.generate([prompt], [settings(**params)])[0]

    def load(self, model: torch.nn.Module, version: WeightVersion) -> str:
        return self.run(self.engine.update_weights(pack(model.named_parameters(), 1 << 16), version))


def settings(**given: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 8, "seed": 0} | given)


@pytest.fixture(
    scope="module",
    params=["torch", pytest.param("vllm", marks=pytest.mark.vllm)],
)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    folder = make_model_folder(tmp_path_factory.mktemp("contract"))
    truncating = {"top_p": 0.1, "top_k": 2, "temperature": 0.3, "repetition_penalty": 2.0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, SECOND_END], **truncating}))
    if request.param == "vllm":
        pytest.importorskip("vllm")
        # Small blocks, so that even these prompts are cached; 16 rows, so that calls wait for one.
        args = {"block_size": 32}
        config: Any = VllmRollout(
            engine="vllm", samples_per_prompt=2, kv_cache_gib=0.1, max_concurrent=16, engine_args=args
        )
    else:
        config = TorchRollout(engine="torch", samples_per_prompt=2, max_concurrent=16)
    with asyncio.Runner() as runner:
        engine = runner.run(start_engine(str(folder), config, max_length=MAX_LENGTH, threads=1))
        yield Sampler(engine, runner, folder)
        runner.run(engine.close())


@pytest.fixture
def sampler(started: Sampler) -> Sampler:
    """With the weights that the folder holds."""
    if started.engine.version != FIRST:
        started.load(make_model(), FIRST)
    return started


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, prompt: list[int], sample: Sample, temperature: float) -> torch.Tensor:
    """[T] log-probs of the sampled tokens."""
    logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]


@torch.no_grad()
def reference_greedy(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens and not {EOS, SECOND_END} & set(tokens):
        tokens.append(int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
    return tokens


PROMPTS = [[3, 4, 5], [9], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40], [6, 6]] * 5
MODEL = make_model()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_whole_tempered_distribution(sampler: Sampler, temperature: float) -> None:
    params = [settings(temperature=temperature, seed=i, max_tokens=12) for i in range(len(PROMPTS))]
    for prompt, sample in zip(PROMPTS, sampler.generate(PROMPTS, params), strict=True):
        expected = reference_logprobs(MODEL, prompt, sample, temperature)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)
        assert len(sample.token_ids) == len(sample.logprobs) == len(sample.versions)


def test_the_folders_sampling_defaults_are_not_used(sampler: Sampler) -> None:
    first = [s.token_ids[0] for s in sampler.generate([[3]] * 60, [settings(seed=i, max_tokens=1) for i in range(60)])]
    assert len(set(first)) > 5  # its top_k is 2


def test_samples_follow_the_distribution(sampler: Sampler) -> None:
    n = 2000
    drawn = sampler.generate([[7, 8]] * n, [settings(seed=1_000_003 * i, max_tokens=1) for i in range(n)])
    with torch.no_grad():
        expected = MODEL(torch.tensor([[7, 8]])).logits[0, -1].softmax(-1) * n
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in drawn]), minlength=len(expected))
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_seed_alone_decides(sampler: Sampler) -> None:
    params = [settings(seed=i, max_tokens=10) for i in range(len(PROMPTS))]
    together = [s.token_ids for s in sampler.generate(PROMPTS, params)]
    assert [s.token_ids for s in sampler.generate(PROMPTS, params)] == together
    assert [sampler.generate([p], [s])[0].token_ids for p, s in zip(PROMPTS[:4], params[:4], strict=True)] == together[
        :4
    ]
    assert len({tuple(sampler.one([3], seed=i, max_tokens=10).token_ids) for i in (0, 1, 2**31, 2**63 - 1)}) == 4


def test_greedy_is_argmax_with_untempered_logprobs(sampler: Sampler) -> None:
    params = [settings(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=9) for i in range(len(PROMPTS))]
    for i, sample in enumerate(sampler.generate(PROMPTS, params)):
        if i % 2:
            assert sample.token_ids == reference_greedy(MODEL, PROMPTS[i], 9)
        expected = reference_logprobs(MODEL, PROMPTS[i], sample, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def test_a_response_ends_at_its_own_limit_or_end_token(sampler: Sampler) -> None:
    limits = [1 + i % 7 for i in range(60)]
    samples = sampler.generate([[5, 6]] * 60, [settings(seed=i, max_tokens=n) for i, n in enumerate(limits)])
    for sample, limit in zip(samples, limits, strict=True):
        *inner, last = sample.token_ids
        assert not {EOS, SECOND_END} & set(inner)
        if sample.finish_reason == "length":
            assert len(sample.token_ids) == limit
        else:
            assert sample.finish_reason == "stop"
            assert last in (EOS, SECOND_END)


@pytest.mark.parametrize("end", [EOS, SECOND_END])
def test_every_end_token_of_the_folder_ends_a_response(sampler: Sampler, end: int) -> None:
    samples = sampler.generate([[5, 6]] * 200, [settings(seed=i, max_tokens=40) for i in range(200)])
    assert any(s.token_ids[-1] == end and s.finish_reason == "stop" for s in samples)


def test_stop_token_ids_end_a_response_and_are_part_of_it(sampler: Sampler) -> None:
    free = sampler.one([3], seed=4, max_tokens=12)
    cut = sampler.one([3], seed=4, max_tokens=12, stop_token_ids=(free.token_ids[3],))
    at = free.token_ids.index(free.token_ids[3])
    assert cut.token_ids == free.token_ids[: at + 1]
    assert cut.finish_reason == "stop"


def test_stop_texts_end_a_response_after_the_token_that_completes_them(sampler: Sampler) -> None:
    tokenizer = make_tokenizer()
    seeds = list(range(300))
    free = sampler.generate([[3]] * len(seeds), [settings(seed=seed, max_tokens=6) for seed in seeds])
    of_characters = [
        i for i, s in enumerate(free) if len(s.token_ids) == 6 and 2 < min(s.token_ids) <= max(s.token_ids) < 48
    ]
    assert of_characters
    for i in of_characters:
        text = tokenizer.decode(free[i].token_ids)
        stop = text[2:4]
        cut = sampler.one([3], seed=seeds[i], max_tokens=6, stop=(stop, "nowhere"))
        assert tokenizer.decode(cut.token_ids) == text[: text.index(stop) + 2]
        assert cut.finish_reason == "stop"
        assert len(cut.logprobs) == len(cut.versions) == len(cut.token_ids)


def test_a_sequence_ends_where_the_engine_does(sampler: Sampler) -> None:
    prompt = [4] * (MAX_LENGTH - 3)
    samples = sampler.generate([prompt] * 8, [settings(seed=i, max_tokens=50) for i in range(8)])
    assert {len(s.token_ids) for s in samples if s.finish_reason == "length"} == {3}


@pytest.mark.parametrize("prompt", [[], [4] * MAX_LENGTH])
def test_a_prompt_without_room_or_tokens_is_refused(sampler: Sampler, prompt: list[int]) -> None:
    with pytest.raises(UserError):
        sampler.one(prompt)


def test_new_weights_change_samples_logprobs_versions_and_checksum(sampler: Sampler) -> None:
    before = sampler.one([3, 4, 5], seed=1)
    assert sampler.run(sampler.engine.checksum()) == weights_checksum(MODEL.named_parameters())
    for step in (1, 2):
        model, version = make_model(seed=step), WeightVersion(3, step)
        assert sampler.load(model, version) == weights_checksum(model.named_parameters())
        assert sampler.engine.version == version
        after = sampler.one([3, 4, 5], seed=1)
        assert after.token_ids != before.token_ids
        assert set(after.versions) == {version}
        expected = reference_logprobs(model, [3, 4, 5], after, 1.0)
        torch.testing.assert_close(torch.tensor(after.logprobs), expected, atol=1e-4, rtol=0)
    sampler.load(MODEL, FIRST)
    assert sampler.one([3, 4, 5], seed=1).token_ids == before.token_ids


def test_no_cached_prefix_of_the_old_weights_is_served(sampler: Sampler) -> None:
    prompt = list(range(3, 53))
    sampler.one(prompt, max_tokens=2)
    model = make_model(seed=5)
    sampler.load(model, WeightVersion(0, 5))
    sample = sampler.one(prompt, max_tokens=6, seed=2)
    expected = reference_logprobs(model, prompt, sample, 1.0)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def test_no_sequence_is_sampled_with_two_sets_of_weights(sampler: Sampler) -> None:
    model = make_model(seed=6)

    async def overlap() -> list[Sample]:
        calls = [
            asyncio.ensure_future(sampler.engine.generate([3, i], settings(seed=i, max_tokens=40)))
            for i in range(3, 20)
        ]
        await asyncio.sleep(0)
        update = asyncio.ensure_future(
            sampler.engine.update_weights(pack(model.named_parameters()), WeightVersion(0, 6))
        )
        await asyncio.sleep(0)
        calls += [
            asyncio.ensure_future(sampler.engine.generate([3, i], settings(seed=i, max_tokens=40)))
            for i in range(3, 20)
        ]
        await update
        return await asyncio.gather(*calls)

    weights = {FIRST: MODEL, WeightVersion(0, 6): model}
    for i, sample in enumerate(sampler.run(overlap())):
        (version,) = set(sample.versions)
        expected = reference_logprobs(weights[version], [3, 3 + i % 17], sample, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_sequences_under_way_go_on_with_new_weights(sampler: Sampler, in_flight: InFlight) -> None:
    """And no sequence that begins later, whether it had been asked for before or not, is served their prompts' cache:
    keys and values of the old weights would show in its log-probs."""
    engine, models = sampler.engine, {FIRST: MODEL}
    prompts = [list(range(3, 51)), list(range(20, 60))]

    def calls(seed: int, n: int) -> list[asyncio.Future[Sample]]:
        params = [settings(seed=seed + i, max_tokens=70) for i in range(n)]
        return [asyncio.ensure_future(engine.generate(prompts[i % 2], p)) for i, p in enumerate(params)]

    async def play() -> tuple[list[Sample], list[Sample]]:
        began = calls(0, 24)  # of which 16 are under way
        late = []
        for step in (1, 2):
            target = engine.sampled_tokens() + 100
            while engine.sampled_tokens() < target and not all(call.done() for call in began):
                await asyncio.sleep(0)
            version = WeightVersion(4, step)
            models[version] = make_model(seed=step)
            parcels = pack(models[version].named_parameters())
            update = asyncio.ensure_future(engine.update_weights(parcels, version, in_flight))
            await asyncio.sleep(0)
            late += calls(100 * step, 6)
            assert await update == weights_checksum(models[version].named_parameters())
            late += calls(100 * step + 50, 6)
        return await asyncio.gather(*began), await asyncio.gather(*late)

    began, late = sampler.run(play())
    for i, sample in enumerate([*began, *late]):
        assert_sampled_by(models, prompts[i % 2], sample, in_flight)
    assert max(len(starts(sample)) for sample in began) == 3
    assert sum(len(starts(sample)) > 1 for sample in began) > 3
    assert all(FIRST not in sample.versions for sample in late)
    after = [s for s in (*began, *late) if s.versions[0] != FIRST and len(starts(s)) == 1]
    assert len(after) > 6


def test_what_is_cancelled_takes_no_room(sampler: Sampler) -> None:
    """More calls than rows are given up, also while new weights come; the next ones have their place."""

    async def play() -> list[Sample]:
        for seed in (0, 100):
            params = [settings(seed=seed + i, max_tokens=100) for i in range(40)]
            doomed = [asyncio.ensure_future(sampler.engine.generate([3, 4], p)) for p in params]
            target = sampler.engine.sampled_tokens() + 50
            while sampler.engine.sampled_tokens() < target:
                await asyncio.sleep(0)
            if seed:
                weights = pack(make_model(seed=3).named_parameters())
                update = asyncio.ensure_future(sampler.engine.update_weights(weights, WeightVersion(5, 1), "keep"))
                await asyncio.sleep(0)
            for call in doomed:
                call.cancel()
            await asyncio.gather(*doomed, return_exceptions=True)
        await update
        params = [settings(seed=i, max_tokens=6) for i in range(20)]
        return await asyncio.gather(*(sampler.engine.generate([3, 4], p) for p in params))

    model = make_model(seed=3)
    for sample in sampler.run(play()):
        assert set(sample.versions) == {WeightVersion(5, 1)}
        expected = reference_logprobs(model, [3, 4], sample, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)
    before = sampler.engine.sampled_tokens()
    tokens = len(sampler.one([3], seed=2).token_ids)
    assert sampler.engine.sampled_tokens() == before + tokens


def test_a_cancelled_call_disturbs_no_other(sampler: Sampler) -> None:
    async def cancel_one() -> Sample:
        doomed = asyncio.ensure_future(sampler.engine.generate([3], settings(max_tokens=50)))
        other = asyncio.ensure_future(sampler.engine.generate([4], settings(seed=9)))
        await asyncio.sleep(0)
        doomed.cancel()
        return await other

    assert sampler.run(cancel_one()).token_ids == sampler.one([4], seed=9).token_ids


def test_an_update_that_breaks_off_leaves_an_engine_that_refuses_to_sample(
    started: Sampler,
) -> None:
    """Last in the module: the engine is of no use afterwards."""

    def broken() -> Iterator[Bucket]:
        yield next(pack(MODEL.named_parameters(), 1 << 12))
        raise OSError("the sender is gone")

    with pytest.raises(SyncError, match="half-way"):
        started.run(started.engine.update_weights(broken(), WeightVersion(9, 9)))
    assert started.engine.version != WeightVersion(9, 9)
    with pytest.raises(SyncError, match="half-way"):
        started.one([3])
    with pytest.raises(SyncError, match="half-way"):
        started.load(MODEL, WeightVersion(9, 10))
