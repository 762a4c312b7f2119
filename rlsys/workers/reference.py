"""ReferenceWorker: the actor around the frozen reference policy."""

from __future__ import annotations

from rlsys.batch import DataProto
from rlsys.batch.columns import check_columns
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train.reference import ReferenceEngine
from rlsys.tracking.meter import Metered


class ReferenceWorker(Metered, verbs=("logprobs",)):
    def start(self, model: ModelConfig, trainer: TrainerConfig, *, temperature: float, threads: int) -> None:
        self._engine = ReferenceEngine.load(model, trainer, temperature=temperature, threads=threads)

    def logprobs(self, batch: DataProto) -> tuple[DataProto, int]:
        """The column ``ref_logprobs`` of a shard with rollout columns, and its number of rows, for who only waits."""
        check_columns(batch, ("prompt_ids", "response_ids", "response_mask"), "reference")
        return self._engine.forward(batch), len(batch)

    def close(self) -> None:
        """Nothing outlives the process."""
