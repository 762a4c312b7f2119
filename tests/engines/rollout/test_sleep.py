"""A sampler that sleeps gives memory back, and samples afterwards as if it had not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from model_folders import make_model, make_model_folder

from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import TorchRollout, VllmRollout
from rlsys.engines.rollout import start_engine
from rlsys.engines.sync.buckets import pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.verify import SyncError
from rlsys.environments.base import Sample, SamplingParams
from rlsys.tracking.memory import pss_bytes

MIB = 1 << 20
SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden": 512, "layers": 4, "max_length": 2048}
WEIGHTS = 25 * MIB  # at least


class Sleeping:
    """An engine and the loop that it lives in."""

    def __init__(self, kind: str, folder: Path):
        self.runner, self.kind, self.step = asyncio.Runner(), kind, 0
        more: dict[str, Any] = {"kv_cache_gib": 0.25} if kind == "vllm" else {"max_concurrent": 64}
        config: Any = (VllmRollout if kind == "vllm" else TorchRollout)(engine=kind, samples_per_prompt=1, **more)
        self.engine: Any = self.run(
            start_engine(str(folder), config, max_length=1024, threads=2, sleeps=True),
        )

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def sample(self) -> list[Sample]:
        """The longest gives the torch sampler's cache its size."""

        async def together() -> list[Sample]:
            long = [list(range(6, 900))] * 62 if self.kind == "torch" else []
            prompts = [[3, 4, 5], [9], *long]
            params = [SamplingParams(1.0, 12, seed) for seed in range(len(prompts))]
            return await asyncio.gather(*(self.engine.generate(p, s) for p, s in zip(prompts, params, strict=True)))

        return self.run(together())

    def load(self, seed: int) -> None:
        self.step += 1
        model = make_model(seed=seed, scale=0.05, **SIZES)
        checksum = self.run(self.engine.update_weights(pack(model.named_parameters()), WeightVersion(0, self.step)))
        assert checksum == weights_checksum(model.named_parameters())

    def memory(self) -> int:
        """Of this process and those that vLLM started."""
        return sum(pss_bytes(p.pid) for p in [psutil.Process(), *psutil.Process().children(recursive=True)])


@pytest.fixture(scope="module", params=["torch", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])])
def sampler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sleeping]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    made = Sleeping(request.param, make_model_folder(tmp_path_factory.mktemp("model"), scale=0.05, **SIZES))
    yield made
    made.run(made.engine.close())
    made.runner.close()


def same(one: list[Sample], other: list[Sample]) -> bool:
    return [(s.token_ids, s.logprobs) for s in one] == [(s.token_ids, s.logprobs) for s in other]


@pytest.mark.timeout(300)
def test_memory_falls_and_what_is_sampled_afterwards_is_the_same(sampler: Sleeping) -> None:
    sampler.load(1)
    before = sampler.sample()
    awake = sampler.memory()
    rest = sampler.run(sampler.engine.sleep())
    freed = awake - sampler.memory()
    assert freed > 0.8 * rest.due
    assert rest.before - rest.after > 0.8 * rest.due
    assert rest.due > WEIGHTS + 75 * MIB, "the cache, and the weights"
    sampler.run(sampler.engine.sleep())  # once is enough
    with pytest.raises(SyncError, match="sleep"):
        sampler.sample()
    with pytest.raises(SyncError, match="gave back"):
        sampler.run(sampler.engine.wake())
    sampler.load(1)
    sampler.run(sampler.engine.wake())
    sampler.run(sampler.engine.wake())
    assert same(sampler.sample(), before)


def test_new_weights_are_what_it_samples_with(sampler: Sleeping) -> None:
    sampler.load(2)
    expected = sampler.sample()
    sampler.load(1)
    assert not same(sampler.sample(), expected)
    sampler.run(sampler.engine.sleep())
    sampler.load(2)
    sampler.run(sampler.engine.wake())
    assert same(sampler.sample(), expected)


def test_with_its_weights_it_wakes_without_new_ones(sampler: Sleeping) -> None:
    sampler.load(1)
    before = sampler.sample()
    sampler.run(sampler.engine.sleep(weights=False))
    sampler.run(sampler.engine.wake())
    assert same(sampler.sample(), before)
    sampler.run(sampler.engine.sleep(weights=False))
    sampler.run(sampler.engine.sleep(weights=True))
    with pytest.raises(SyncError, match="gave back"):
        sampler.run(sampler.engine.wake())
    sampler.load(1)
    sampler.run(sampler.engine.wake())
    assert same(sampler.sample(), before)


def test_what_is_under_way_is_given_up(sampler: Sleeping) -> None:
    async def asleep_meanwhile() -> BaseException:
        waiting = asyncio.ensure_future(sampler.engine.generate([3, 4], SamplingParams(1.0, 1000, 0)))
        await asyncio.sleep(0)
        await sampler.engine.sleep(weights=False)
        return (await asyncio.gather(waiting, return_exceptions=True))[0]

    assert isinstance(sampler.run(asleep_meanwhile()), SyncError)
    sampler.run(sampler.engine.wake())
