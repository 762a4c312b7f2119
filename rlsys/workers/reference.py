"""ReferenceWorker: the actor around the frozen reference policy."""

from __future__ import annotations

import ray

from rlsys.batch import DataProto
from rlsys.batch.columns import check_columns
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train.reference import ReferenceEngine
from rlsys.tracking.meter import Metered


class ReferenceWorker(Metered, verbs=("logprobs",)):
    def start(
        self,
        model: ModelConfig,
        trainer: TrainerConfig,
        *,
        temperature: float,
        threads: int,
        longest: int | None = None,
    ) -> None:
        self._engine = ReferenceEngine.load(model, trainer, temperature=temperature, threads=threads, longest=longest)

    def logprobs(self, *shards: DataProto) -> tuple[DataProto | int, ...]:
        """The column ``ref_logprobs`` of each shard with rollout columns, and the number of all rows, for who only
        waits."""
        for shard in shards:
            check_columns(shard, ("prompt_ids", "response_ids", "response_mask"), "reference")
        return *(self._engine.forward(shard) for shard in shards), sum(map(len, shards))

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answered at once, from a thread of its own."""

    def close(self) -> None:
        """Nothing outlives the process."""
