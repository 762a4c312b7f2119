"""RolloutWorker: tickets, and questions that are answered however much is asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from endless_models import make_endless_folder
from model_folders import make_model
from ray.exceptions import ObjectLostError, RayTaskError

from rlsys.batch import DataProto, jagged
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import TorchRollout
from rlsys.engines.sync.shared_memory import Segment
from rlsys.workers.rollout import CONCURRENCY_GROUPS, Cancelled, RolloutSummary, RolloutWorker, SampleRequest
from rlsys.workers.weights import SentWeights

LENGTH = 20_000


def asked(tokens: int) -> SampleRequest:
    return SampleRequest(samples=2, temperature=1.0, max_tokens=tokens, run_seed=0)


LONG, SHORT = asked(LENGTH - 10), asked(5)
CONFIG = TorchRollout(engine="torch", samples_per_prompt=2, max_concurrent=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_endless_folder(tmp_path_factory.mktemp("model"), max_length=LENGTH)


def prompts(n: int) -> DataProto:
    return DataProto.from_dict(
        tensors={"prompt_ids": jagged.from_rows([torch.tensor([5, 6 + i % 30]) for i in range(n)])},
        non_tensors={
            "uid": np.array([f"{i}@0" for i in range(n)], dtype=object),
            "task": np.array([{} for _ in range(n)], dtype=object),
            "messages": np.array([[] for _ in range(n)], dtype=object),
        },
    )


@pytest.fixture
def segment() -> Iterator[Segment]:
    opened = Segment()
    yield opened
    opened.release()


def sent(segment: Segment, seed: int) -> SentWeights:
    for _ in segment.write(make_model(seed=seed, max_length=LENGTH).named_parameters()):
        pass
    return SentWeights("shared_memory", segment.bucket(), "", 0)


def alone(folder: Path, play: Any) -> Any:
    """Calls ``play`` with a worker in this process, started."""

    async def main() -> Any:
        worker = RolloutWorker()
        await worker.start(str(folder), CONFIG, max_length=LENGTH, seed=0, threads=1)
        try:
            return await play(worker)
        finally:
            await worker.close()

    return asyncio.run(main())


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_cancelled_ticket_frees_its_rows_and_others_go_on_unchanged(folder: Path) -> None:
    async def with_others(worker: RolloutWorker) -> list[list[int]]:
        batch: Any = worker._engine._batch
        doomed = [asyncio.ensure_future(worker.generate(prompts(3), i, i + 1, LONG, f"t{i}")) for i in range(3)]
        kept = asyncio.ensure_future(worker.generate(prompts(9), 8, 9, asked(400), "kept"))
        await until(lambda: len(batch) == 8)
        assert (await worker.progress()).tickets == ("kept", "t0", "t1", "t2")
        await worker.cancel(["t0", "t2", "unknown"])
        for call in (doomed[0], doomed[2]):
            with pytest.raises(Cancelled):
                await call
        assert not doomed[1].done()
        await until(lambda: len(batch) == 4)
        assert (await worker.progress()).tickets == ("kept", "t1")
        rows = jagged.to_rows((await kept)[0].batch["response_ids"])
        await worker.cancel(["t1", "t1", "t0", "kept"])
        with pytest.raises(Cancelled):
            await doomed[1]
        await until(lambda: len(batch) == 0)
        assert (await worker.progress()).tickets == ()
        return [row.tolist() for row in rows]

    async def without(worker: RolloutWorker) -> list[list[int]]:
        batch, _ = await worker.generate(prompts(9), 8, 9, asked(400))
        return [row.tolist() for row in jagged.to_rows(batch.batch["response_ids"])]

    assert alone(folder, with_others) == alone(folder, without)


def test_what_was_cancelled_before_it_entered_is_gone_too(folder: Path) -> None:
    async def play(worker: RolloutWorker) -> RolloutSummary:
        waiting = [asyncio.ensure_future(worker.generate(prompts(80), i, i + 1, LONG, "many")) for i in range(80)]
        await until(lambda: len(worker._engine._batch) == 64)  # of 160
        await worker.cancel(["many"])
        for call in waiting:
            with pytest.raises(Cancelled):
                await call
        return (await worker.generate(prompts(1), 0, 1, SHORT, "many"))[1]

    assert alone(folder, play).response_lengths.tolist() == [5, 5]


def test_weights_that_are_gone_with_their_sender_are_a_lost_peer_and_no_error_of_the_sampler(
    folder: Path, segment: Segment
) -> None:
    """So whoever waits for it starts the trainer and this sampler again, and does not end the run. (On one host Ray
    keeps what a dead process has put into its store.)"""

    def gone(_: SentWeights) -> Iterator[Any]:
        raise ObjectLostError("00", None, "")
        yield

    async def take(worker: RolloutWorker) -> None:
        worker._intake.open = gone  # type: ignore[method-assign]
        await worker.update_weights(sent(segment, 1), WeightVersion(0, 1))

    with pytest.raises(ObjectLostError):
        alone(folder, take)


def test_an_answer_knows_the_oldest_version_of_its_tokens(folder: Path, segment: Segment) -> None:
    async def play(worker: RolloutWorker) -> RolloutSummary:
        call = asyncio.ensure_future(worker.generate(prompts(1), 0, 1, asked(2000)))
        for step in (1, 2):
            before = (await worker.progress()).sampled_tokens
            await until(lambda before=before: worker._engine.sampled_tokens() > before + 20)
            await worker.update_weights(sent(segment, step), WeightVersion(0, step), "keep")
        batch, summary = await call
        assert set(jagged.values(batch.batch["weight_version"]).tolist()) == {
            WeightVersion(0, step).packed() for step in range(3)
        }
        return summary

    assert alone(folder, play).oldest_version == WeightVersion(0, 0)


@pytest.mark.ray
def test_questions_are_answered_although_more_calls_wait_than_may_begin(
    folder: Path, segment: Segment, ray_cluster: None
) -> None:
    remote = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(RolloutWorker)
    worker = remote.options(max_concurrency=2, num_cpus=0).remote()
    try:
        ray.get(worker.ping.remote(), timeout=120)
        starting = worker.start.remote(str(folder), CONFIG, max_length=LENGTH, seed=0, threads=1)
        ray.get(worker.progress.remote(), timeout=120)
        ray.get(starting, timeout=120)
        given = ray.put(prompts(1))
        calls = [worker.generate.options(num_returns=2).remote(given, 0, 1, LONG, f"t{i}")[1] for i in range(6)]
        while len((seen := ray.get(worker.progress.remote(), timeout=120)).tickets) < 2 or not seen.sampled_tokens:
            pass
        assert len(seen.tickets) == 2
        ray.get([worker.ping.remote(), worker.take_reading.remote(), worker.clock.remote()], timeout=120)
        ray.get(worker.update_weights.remote(sent(segment, 1), WeightVersion(0, 1), "keep"), timeout=120)
        assert not ray.wait(calls, timeout=0)[0], "none has ended by itself"
        while ray.wait(calls, num_returns=len(calls), timeout=0)[1]:
            ray.get(worker.cancel.remote([f"t{i}" for i in range(6)]), timeout=120)
        for call in calls:
            with pytest.raises(RayTaskError) as caught:
                ray.get(call, timeout=120)
            assert isinstance(caught.value.cause, Cancelled)
        ray.get(worker.close.remote(), timeout=120)
    finally:
        ray.kill(worker)
