"""New weights between two tokens, in the torch engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from endless_models import make_endless_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_flight import assert_sampled_by, recomputed, starts
from model_folders import make_model

from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import TorchRollout
from rlsys.engines.rollout import Sample, SamplingParams
from rlsys.engines.rollout.base import InFlight
from rlsys.engines.rollout.torch import TorchEngine
from rlsys.engines.sync.buckets import Bucket, pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.verify import SyncError

LENGTH = 512
MODELS = [make_model(seed=seed, max_length=LENGTH) for seed in range(4)]
MODES: list[InFlight] = ["keep", "recompute"]
LONG, SHORT = list(range(3, 40)), [30]


class Sampler:
    """An engine, its event loop, and the weights of each version that it was given."""

    def __init__(self, folder: Path, rows: int = 16):
        self.runner = asyncio.Runner()
        config = TorchRollout(engine="torch", samples_per_prompt=1, max_concurrent=rows)
        self.engine = TorchEngine(str(folder), config, max_length=LENGTH, threads=1)
        self.models = {WeightVersion(0, 0): MODELS[0]}

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()

    async def update(self, in_flight: InFlight) -> WeightVersion:
        version = WeightVersion(0, len(self.models))
        model = self.models[version] = MODELS[version.step % len(MODELS)]
        held = await self.engine.update_weights(pack(model.named_parameters()), version, in_flight)
        assert held == weights_checksum(model.named_parameters())
        return version

    def call(self, prompt: list[int], tokens: int, seed: int) -> asyncio.Future[Sample]:
        return asyncio.ensure_future(self.engine.generate(prompt, SamplingParams(1.0, tokens, seed)))

    async def more(self, tokens: int) -> None:
        """Returns when so many more have been sampled, or nothing is under way."""
        await asyncio.sleep(0)  # calls that were just made begin
        target = self.engine.sampled_tokens() + tokens
        while self.engine.sampled_tokens() < target and not self.engine._runner.done():
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless_folder(tmp_path_factory.mktemp("model"), max_length=LENGTH)


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[Sampler]:
    sampler = Sampler(folder)
    yield sampler
    sampler.close()


@pytest.mark.parametrize("in_flight", MODES)
def test_each_token_is_of_the_weights_that_its_version_names(started: Sampler, in_flight: InFlight) -> None:
    prompts = [LONG, LONG, SHORT, LONG[:9], [40, 41]]

    async def play() -> tuple[list[Sample], Sample]:
        calls = [started.call(prompt, 300 - 20 * i, i) for i, prompt in enumerate(prompts)]
        versions = []
        for _ in range(3):
            await started.more(60)
            versions.append(await started.update(in_flight))
        late = started.call(LONG, 20, 99)
        samples = await asyncio.gather(*calls)
        assert all(sample.versions[-1] == versions[-1] for sample in samples)
        return samples, await late

    samples, late = started.runner.run(play())
    for prompt, sample in zip(prompts, samples, strict=True):
        assert len(starts(sample)) == 4, "it changes once with each update"
        assert_sampled_by(started.models, prompt, sample, in_flight)
    assert set(late.versions) == {started.engine.version}
    assert_sampled_by(started.models, LONG, late, "recompute")


def test_a_kept_cache_is_not_a_recomputed_one(started: Sampler) -> None:
    """So that the tests around this one can tell them apart."""

    async def play() -> Sample:
        call = started.call(LONG, 300, 5)
        await started.more(20)
        await started.update("keep")
        return await call

    sample = started.runner.run(play())
    other = recomputed(started.models, LONG, sample)
    assert (torch.tensor(sample.logprobs) - other).abs().max() > 0.1


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 80)), min_size=1, max_size=24),
    waits=st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["finish", "keep", "recompute"])), max_size=4),
    data=st.data(),
)
def test_any_updates_at_any_time(
    started: Sampler, calls: list[tuple[int, int]], waits: list[tuple[int, InFlight]], data: st.DataObject
) -> None:
    """More calls than rows, some of them cancelled."""
    mode = data.draw(st.sampled_from(MODES))
    doomed = data.draw(st.sets(st.integers(0, len(calls) - 1), max_size=4))
    tokens = [[3 + (7 * i + k) % 60 for k in range(prompt)] for i, (prompt, _) in enumerate(calls)]

    async def play() -> list[Any]:
        answers = [started.call(tokens[i], limit, i) for i, (_, limit) in enumerate(calls)]
        for i, (wait, kind) in enumerate(waits):
            await asyncio.sleep(0)
            await started.more(wait)
            if i == 0:
                for gone in doomed:
                    answers[gone].cancel()
            await started.update("finish" if kind == "finish" else mode)
        samples = await asyncio.gather(*answers, return_exceptions=True)
        await asyncio.wait({started.engine._runner}, timeout=60)  # it comes to drop who was cancelled last
        return samples

    for i, sample in enumerate(started.runner.run(play())):
        if i in doomed and isinstance(sample, asyncio.CancelledError):
            continue
        assert len(sample.token_ids) == calls[i][1]
        assert_sampled_by(started.models, tokens[i], sample, mode)
    assert not len(started.engine._batch)
    assert not started.engine._under_way


@pytest.mark.parametrize("in_flight", MODES)
def test_an_update_with_nothing_under_way(started: Sampler, in_flight: InFlight) -> None:
    for _ in range(2):
        started.runner.run(started.update(in_flight))
        sample = started.runner.run(started.engine.generate(LONG, SamplingParams(1.0, 12, 3)))
        assert set(sample.versions) == {started.engine.version}
        assert_sampled_by(started.models, LONG, sample, "recompute")


def test_cancelled_rows_leave_at_once(started: Sampler) -> None:
    async def play() -> None:
        calls = [started.call(LONG, 450, i) for i in range(6)]
        await started.more(60)
        for call in calls[1:]:
            call.cancel()
        while len(started.engine._batch) > 1:
            await asyncio.sleep(0)
        assert not calls[0].done()
        assert len(started.engine._batch._cache._starts) == 1
        await calls[0]

    started.runner.run(play())


def test_an_update_that_breaks_off_ends_what_is_under_way(folder: Path) -> None:
    sampler = Sampler(folder)

    def broken() -> Iterator[Bucket]:
        yield next(pack(MODELS[1].named_parameters(), 1 << 12))
        raise OSError("the sender is gone")

    async def play() -> list[Any]:
        calls = [sampler.call(LONG, 450, i) for i in range(3)]
        await sampler.more(30)
        with pytest.raises(SyncError, match="half-way"):
            await sampler.engine.update_weights(broken(), WeightVersion(0, 1), "keep")
        return await asyncio.gather(*calls, sampler.call(SHORT, 3, 0), return_exceptions=True)

    try:
        answers = sampler.runner.run(play())
        assert len(answers) == 4
        for answer in answers:
            assert isinstance(answer, SyncError)
            assert "half-way" in str(answer)
        assert sampler.engine.version == WeightVersion(0, 0)
    finally:
        sampler.close()


def test_whole_batches_finish_and_say_so_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rlsys.engines.rollout.torch.unsupported", lambda model: "a reason")
    sampler = Sampler(folder)
    caplog.clear()

    async def play() -> list[Sample]:
        calls = [sampler.call(SHORT, 40, i) for i in range(2)]
        await sampler.more(10)
        for _ in range(2):
            await sampler.update("keep")
        return await asyncio.gather(*calls)

    try:
        for sample in sampler.runner.run(play()):
            assert set(sample.versions) == {WeightVersion(0, 0)}
        assert sampler.engine.sampled_tokens() == 80
        assert ["cannot pause" in record.getMessage() for record in caplog.records] == [True]
    finally:
        sampler.close()
