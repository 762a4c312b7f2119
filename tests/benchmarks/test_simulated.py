"""The simulated sampler batches as it says, and a slope is told from noise."""

import asyncio
import random
import statistics

import pytest

from benchmarks.async_speed import MEAN_TOKENS, mean_tokens
from benchmarks.simulated import CAP, SimulatedEngine, Timing, response_tokens
from benchmarks.soak import Look, slope
from rlsys.batch.versions import WeightVersion
from rlsys.environments.base import SamplingParams

TIMING = Timing(slots=4, mean_tokens=8, token_s=0.001, update_s=0.002)


def params(seed: int) -> SamplingParams:
    return SamplingParams(1.0, 10_000, seed, (), ())


def test_lengths_have_their_mean_and_are_cut():
    found = [response_tokens(seed, MEAN_TOKENS) for seed in range(5000)]
    assert max(found) == CAP * MEAN_TOKENS
    assert statistics.fmean(found) == pytest.approx(mean_tokens(), rel=0.1)
    assert statistics.fmean(found) < MEAN_TOKENS


async def play(engine: SimulatedEngine, seeds: list[int], in_flight: str | None = None) -> list:
    calls = [asyncio.create_task(engine.generate([1], params(seed))) for seed in seeds]
    if in_flight is not None:
        await asyncio.sleep(0.02)
        await engine.update_weights([], WeightVersion(0, 1), in_flight)
    return await asyncio.gather(*calls)


def test_no_more_sequences_run_than_there_are_slots_and_their_seconds_add_up():
    async def run() -> tuple[SimulatedEngine, list, float]:
        engine = SimulatedEngine(TIMING)
        began = asyncio.get_running_loop().time()
        samples = await play(engine, list(range(40)))
        return engine, samples, asyncio.get_running_loop().time() - began

    engine, samples, seconds = asyncio.run(run())
    tokens = sum(len(sample.token_ids) for sample in samples)
    assert tokens == sum(response_tokens(seed, TIMING.mean_tokens) for seed in range(40))
    assert engine.slot_s <= TIMING.slots * seconds
    # A sequence's tokens take between three quarters of token_s and all of it.
    assert 0.75 * tokens * TIMING.token_s <= engine.slot_s
    assert abs(engine.sampled_tokens() - tokens) < 0.2 * tokens


@pytest.mark.parametrize("in_flight", ["keep", "finish"])
def test_tokens_know_the_version_that_sampled_them(in_flight: str):
    async def run() -> list:
        return await play(SimulatedEngine(TIMING), list(range(40)), in_flight)

    samples = asyncio.run(run())
    versions = [[version.step for version in sample.versions] for sample in samples]
    assert all(found == sorted(found) for found in versions)
    assert versions[0][0] == 0
    assert versions[-1][-1] == 1
    if in_flight == "finish":
        assert all(len(set(found)) == 1 for found in versions)


def test_a_sequence_that_is_given_up_leaves_its_slot():
    async def run() -> None:
        engine = SimulatedEngine(Timing(1, 8, 10.0, 0.0))
        slow = asyncio.create_task(engine.generate([1], params(0)))
        await asyncio.sleep(0.01)
        slow.cancel()
        engine._timing = TIMING
        await asyncio.wait_for(engine.generate([1], params(1)), 5)

    asyncio.run(run())


def looks(memory: list[int]) -> list[Look]:
    return [Look(float(i), i, value, 0, 0, 0, 0) for i, value in enumerate(memory)]


def test_a_leak_is_told_from_noise():
    rng = random.Random(0)
    still = [1000 + rng.randint(-100, 100) for _ in range(200)]
    assert not slope(looks(still), "memory").leaks
    growing = slope(looks([value + 2 * i for i, value in enumerate(still)]), "memory")
    assert growing.leaks
    assert growing.growth == pytest.approx(2 * 150 / 1250, rel=0.2)
    filling = slope(looks([value + min(i, 40) * 10 for i, value in enumerate(still)]), "memory")
    assert not filling.leaks
