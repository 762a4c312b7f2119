"""ReferenceWorker: the actor around the frozen reference policy."""

from __future__ import annotations

from rlsys.batch import DataProto
from rlsys.config.schema import ModelConfig, TrainerConfig
from rlsys.engines.train.reference import ReferenceEngine


class ReferenceWorker:
    def start(self, model: ModelConfig, trainer: TrainerConfig, *, temperature: float, threads: int) -> None:
        self._engine = ReferenceEngine.load(model, trainer, temperature=temperature, threads=threads)

    def logprobs(self, batch: DataProto) -> DataProto:
        """The column ``ref_logprobs`` of a shard with rollout columns."""
        return self._engine.forward(batch)

    def close(self) -> None:
        """Nothing outlives the process."""
