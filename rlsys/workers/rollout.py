"""RolloutWorker: the actor around a rollout engine and its environments."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsys.algorithms.collapse import repetition
from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import LoraConfig, RolloutConfig
from rlsys.engines.rollout import RolloutEngine, start_engine
from rlsys.engines.rollout.base import Rest
from rlsys.engines.sync.broadcast import Meeting
from rlsys.engines.sync.cuda_ipc import IpcBucket, close_mapping
from rlsys.environments.base import ENVIRONMENTS, Environment
from rlsys.environments.play import SamplingSettings, play_group, trajectories_to_batch
from rlsys.tracking.meter import Metered
from rlsys.workers.weights import Host, SentWeights, TakenWeights, WeightIntake


@dataclass(frozen=True)
class SampleRequest:
    """What to do with a shard of prompts.

    samples: responses a prompt; temperature 0 is greedy; run_seed and attempt: parts of each sample's seed;
    max_tokens: longest response.
    """

    samples: int
    temperature: float
    max_tokens: int
    run_seed: int
    attempt: int = 0


@dataclass(frozen=True)
class RolloutSummary:
    """What the driver sees of a shard: one entry a row, no tokens.

    uids [B] str; prompt_lengths, response_lengths, sampled_tokens [B] int64; finish_reasons [B] str;
    oldest_version: of all sampled tokens; None: there are none.
    repetition [B] float32: share of a response's 4-grams of sampled tokens that occurred in it before.
    """

    uids: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    sampled_tokens: np.ndarray
    finish_reasons: np.ndarray
    oldest_version: WeightVersion | None
    repetition: np.ndarray

    def __len__(self) -> int:
        return len(self.uids)


class RolloutWorker(Metered, verbs=("generate", "update_weights", "sleep", "wake")):
    """One sampler. All methods are coroutines of one event loop, so shards and environments overlap."""

    async def start(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        threads: int,
        adapter: LoraConfig | None = None,
        sleeps: bool = False,
    ) -> None:
        """Loads the sampler. adapter: it will be sent; None: whole weights. sleeps: it takes turns with the trainer,
        whose turn is first."""
        self._config = config
        self._engine: RolloutEngine = await start_engine(
            model_path, config, max_length=max_length, seed=seed, threads=threads, adapter=adapter, sleeps=sleeps
        )
        self._intake = WeightIntake()
        if sleeps:
            await self._engine.sleep()
        self._environment: Environment = ENVIRONMENTS.get(config.environment, where="rollout.environment")()

    async def generate(
        self, prompts: DataProto, first: int, last: int, request: SampleRequest
    ) -> tuple[DataProto, RolloutSummary]:
        """Plays ``request.samples`` samples of every prompt from row ``first`` up to ``last``, which is not played.

        Args:
            prompts: columns uid, prompt_ids, task; one row a prompt.

        Returns:
            The rollout columns, whole groups in the order of the prompts, and what the driver needs to know of them.
        """
        prompts = prompts.slice(first, last)
        check_columns(prompts, ("uid", "prompt_ids", "task"), "rollout")
        settings = SamplingSettings(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            stop=tuple(self._config.stop),
            stop_token_ids=tuple(self._config.stop_token_ids),
        )
        prompt_rows = [row.tolist() for row in jagged.to_rows(prompts.batch["prompt_ids"])]
        groups = await asyncio.gather(
            *(
                play_group(
                    self._environment,
                    prompt_ids,
                    prompts.non_tensor_batch["task"][i],
                    uid=prompts.non_tensor_batch["uid"][i],
                    samples=request.samples,
                    engine=self._engine,
                    settings=settings,
                    run_seed=request.run_seed,
                    attempt=request.attempt,
                )
                for i, prompt_ids in enumerate(prompt_rows)
            )
        )
        batch = trajectories_to_batch(prompts, groups)
        return batch, summarize(batch)

    async def offer_weights(self, bucket: IpcBucket | None) -> None:
        """Hands over one bucket of the update under way, and returns when it has been read; None: that was all."""
        await asyncio.wrap_future(self._intake.offer(bucket))

    async def host(self) -> Host:
        return Host.here(await self._engine.gpus())

    async def update_weights(self, sent: SentWeights, version: WeightVersion) -> TakenWeights:
        """Takes new weights."""
        try:
            checksum = await self._engine.update_weights(self._intake.open(sent), version)
        except BaseException as error:
            self._intake.abandon(error)
            raise
        finally:
            close_mapping()
        return TakenWeights(checksum, dict(getattr(self._engine, "last_update_s", {})))

    async def sleep(self, *, weights: bool) -> Rest:
        return await self._engine.sleep(weights=weights)

    async def wake(self) -> Rest:
        return await self._engine.wake()

    async def join_trainer(self, meeting: Meeting) -> None:
        """Meets trainer rank 0 for broadcasts of weights between GPUs."""
        await self._engine.join_trainer(meeting)  # type: ignore[attr-defined]

    async def close(self) -> None:
        await self._engine.close()


def summarize(batch: DataProto) -> RolloutSummary:
    """The driver's view of a shard with the rollout columns."""
    columns: Any = batch.batch
    mask = columns["response_mask"]
    chosen = jagged.values(mask)
    versions = jagged.values(columns["weight_version"])[chosen]
    sampled = jagged.segment_sum(mask)
    return RolloutSummary(
        uids=batch.non_tensor_batch["uid"],
        prompt_lengths=jagged.lengths(columns["prompt_ids"]).numpy(),
        response_lengths=jagged.lengths(mask).numpy(),
        sampled_tokens=sampled.numpy(),
        finish_reasons=batch.non_tensor_batch["finish_reason"],
        oldest_version=WeightVersion.unpack(int(versions.min())) if len(versions) else None,
        repetition=repetition(jagged.values(columns["response_ids"])[chosen], sampled).numpy(),
    )
