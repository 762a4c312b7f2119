"""RewardWorker: the actor around the reward functions' process pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlsys.batch import DataProto, jagged
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import RewardConfig
from rlsys.data.prompts import load_tokenizer
from rlsys.rewards.pool import RewardPool


@dataclass(frozen=True)
class RewardSummary:
    """What the driver sees of a scored shard, one entry a row.

    rewards [B] float32; scores: part name -> [B] float64, NaN where the part's condition did not hold;
    failures: rows whose reward raised, timed out or crashed, as records for ``failures.jsonl``;
    records: the first rows in full (text, tokens, log-probs, …), for people to read.
    """

    rewards: np.ndarray
    scores: dict[str, np.ndarray]
    failures: list[dict[str, Any]]
    records: list[dict[str, Any]]


class RewardWorker:
    """Scores shards. The functions run in processes of their own, each call under its time limit."""

    def start(self, model_path: str, config: RewardConfig) -> None:
        self._tokenizer = load_tokenizer(model_path)
        self._parts = list(config.parts)
        self._pool = RewardPool(config)

    def score(self, batch: DataProto, record_rows: int) -> tuple[DataProto, RewardSummary]:
        """Writes rewards, scores and feedback of a shard with rollout columns.

        Args:
            record_rows: so many of the first rows come back in full in the summary.
        """
        texts = self._tokenizer.batch_decode(
            [row.tolist() for row in jagged.to_rows(batch.batch["response_ids"])], skip_special_tokens=True
        )
        tasks = batch.non_tensor_batch["task"]
        scored = self._pool.score(list(zip(texts, tasks, strict=True)))
        rewards = np.asarray([s.reward for s in scored], dtype=np.float32)
        columns = DataProto.from_dict(
            tensors={"rewards": torch.from_numpy(rewards)},
            non_tensors={
                "scores": _objects([s.scores for s in scored]),
                "feedback": _objects([s.feedback for s in scored]),
            },
        )
        scores = {
            part: np.asarray([np.nan if (v := s.scores.get(part)) is None else v for s in scored], dtype=np.float64)
            for part in self._parts
        }
        failures = [
            {"uid": batch.non_tensor_batch["uid"][i], **failure.record(texts[i], tasks[i])}
            for i, s in enumerate(scored)
            for failure in s.failures
        ]
        records = [_record(batch, i, texts[i], scored[i]) for i in range(min(record_rows, len(batch)))]
        return columns, RewardSummary(rewards, scores, failures, records)

    def close(self) -> None:
        self._pool.close()


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _record(batch: DataProto, row: int, text: str, scored: Any) -> dict[str, Any]:
    """One sample as a line of ``rollouts/step-….jsonl``."""
    columns, objects = batch.batch, batch.non_tensor_batch
    versions = jagged.to_rows(columns["weight_version"])[row].tolist()
    return {
        "uid": objects["uid"][row],
        "sample_index": int(columns["sample_index"][row]),
        "prompt": objects["task"][row].get("prompt"),
        "response": text,
        "answer": objects["task"][row].get("answer"),
        "reward": float(scored.reward),
        "scores": scored.scores,
        "feedback": scored.feedback,
        "finish_reason": objects["finish_reason"][row],
        "prompt_ids": jagged.to_rows(columns["prompt_ids"])[row].tolist(),
        "response_ids": jagged.to_rows(columns["response_ids"])[row].tolist(),
        "response_mask": jagged.to_rows(columns["response_mask"])[row].int().tolist(),
        "rollout_logprobs": [round(x, 6) for x in jagged.to_rows(columns["rollout_logprobs"])[row].tolist()],
        "weight_versions": [list(WeightVersion.unpack(v)) for v in sorted(set(versions)) if v >= 0],
    }
