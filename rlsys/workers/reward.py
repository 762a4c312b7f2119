"""RewardWorker: the actor around the reward functions' process pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import check_columns
from rlsys.config.schema import HintsConfig, RewardConfig
from rlsys.data.prompts import load_tokenizer
from rlsys.replay.functional import functional_mask
from rlsys.replay.hints import HintCounts, TeacherContexts
from rlsys.rewards.budget import FailureBudget, failure_rows
from rlsys.rewards.compose import ScoredSample
from rlsys.rewards.pool import RewardPool
from rlsys.tracking.meter import Metered
from rlsys.tracking.rollouts import rollout_row


@dataclass(frozen=True)
class RewardSummary:
    """What the driver sees of a scored shard, one entry a row.

    rewards [B] float32; scores: part name -> [B] float64, NaN where the part's condition did not hold;
    failures: rows whose reward raised, timed out or crashed, as records for ``failures.jsonl``;
    records: the first rows in full (text, tokens, log-probs, …), for people to read.
    hints: what was found for teachers; None: nothing was asked for.
    """

    rewards: np.ndarray
    scores: dict[str, np.ndarray]
    failures: list[dict[str, Any]]
    records: list[dict[str, Any]]
    hints: HintCounts | None = None


@dataclass(frozen=True)
class ContextSettings:
    """What is written beside rewards, for the loss.

    hints: of teacher contexts; None: no channel has a teacher.
    functional_tokens: a regular expression; None: all tokens count.
    chat_template, system_prompt: of the prompts.
    """

    hints: HintsConfig | None = None
    functional_tokens: str | None = None
    chat_template: str | None = None
    system_prompt: str | None = None


_READS = (
    "uid",
    "task",
    "sample_index",
    "prompt_ids",
    "response_ids",
    "response_mask",
    "rollout_logprobs",
    "weight_version",
    "finish_reason",
    "environment",
)


class RewardWorker(Metered, verbs=("score",)):
    """Scores shards. The functions run in processes of their own, each call under its time limit."""

    def start(self, model_path: str, config: RewardConfig, settings: ContextSettings | None = None) -> None:
        self._settings = settings or ContextSettings()
        self._tokenizer = load_tokenizer(model_path)
        self._contexts = None
        if self._settings.hints is not None:
            self._contexts = TeacherContexts(
                self._tokenizer,
                self._settings.hints,
                chat_template_path=self._settings.chat_template,
                system_prompt=self._settings.system_prompt,
            )
        self._parts = list(config.parts)
        self._pool = RewardPool.from_config(config)
        self._budget = FailureBudget(config.max_failure_rate)

    def score(
        self, record_rows: Sequence[int], step_rows: int, train: bool, *shards: DataProto
    ) -> tuple[DataProto | list[RewardSummary], ...]:
        """Writes rewards, scores and feedback of shards with rollout columns; for training also teacher contexts and
        the mask of functional tokens, where they are wanted.

        Args:
            record_rows: by shard, so many of the first rows come back in full in the summary.
            step_rows: of the whole step, which the failure budget is a fraction of.

        Returns:
            The columns of each shard, and at the end the summaries of all.

        Raises:
            RewardBudgetExceeded: a shard's failures alone are more than the step may have.
        """
        scored = [self._score(shard, rows, step_rows, train) for shard, rows in zip(shards, record_rows, strict=True)]
        return *(columns for columns, _ in scored), [summary for _, summary in scored]

    def _score(
        self, batch: DataProto, record_rows: int, step_rows: int, train: bool
    ) -> tuple[DataProto, RewardSummary]:
        check_columns(batch, _READS, "reward")
        texts = self._tokenizer.batch_decode(
            [row.tolist() for row in jagged.to_rows(batch.batch["response_ids"])], skip_special_tokens=True
        )
        tasks = batch.non_tensor_batch["task"]
        lengths = jagged.lengths(batch.batch["response_ids"]).tolist()
        reasons = batch.non_tensor_batch["finish_reason"]
        items = [
            (text, {**task, "response_tokens": length, "finish_reason": reason})
            for text, task, length, reason in zip(texts, tasks, lengths, reasons, strict=True)
        ]
        scored = self._pool.score(items, budget=self._budget, total=step_rows)
        played = batch.non_tensor_batch["environment"]
        rewards = np.asarray([s.reward for s in scored], dtype=np.float32)
        columns = DataProto.from_dict(
            tensors={"rewards": torch.from_numpy(rewards)},
            non_tensors={
                "scores": _objects([s.scores for s in scored]),
                "feedback": _objects([_feedback(e, s) for e, s in zip(played, scored, strict=True)]),
            },
        )
        scores = {
            part: np.asarray([np.nan if (v := s.scores.get(part)) is None else v for s in scored], dtype=np.float64)
            for part in self._parts
        }
        uids = batch.non_tensor_batch["uid"]
        failures = [{"uid": uids[failure["row"]], **failure} for failure in failure_rows(items, scored)]
        records = [_record(batch, i, texts[i], scored[i]) for i in range(min(record_rows, len(batch)))]
        found = self._contexts_of(batch, texts, rewards, columns) if train else None
        return columns, RewardSummary(rewards, scores, failures, records, found)

    def _contexts_of(
        self, batch: DataProto, texts: list[str], rewards: np.ndarray, columns: DataProto
    ) -> HintCounts | None:
        """Joins the columns that the loss wants to ``columns``."""
        pattern = self._settings.functional_tokens
        if pattern is not None:
            mask = functional_mask(self._tokenizer, batch.batch["response_ids"], pattern)
            columns.batch["functional_mask"] = mask
        if self._contexts is None:
            return None
        feedback = list(columns.non_tensor_batch["feedback"])
        made, counts = self._contexts.build(batch, texts, rewards, feedback)
        columns.union(made)
        return counts

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answered at once, from a thread of its own."""

    def close(self) -> None:
        self._pool.close()


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _feedback(played: dict[str, Any], scored: ScoredSample) -> str | None:
    """What the environment and the reward say about a response, a line each."""
    return "\n".join(filter(None, (played["feedback"], scored.feedback))) or None


def _record(batch: DataProto, row: int, text: str, scored: ScoredSample) -> dict[str, Any]:
    """One sample as a line of ``rollouts/step-….jsonl``."""
    columns, objects = batch.batch, batch.non_tensor_batch
    task = objects["task"][row]

    def tokens(name: str) -> list[Any]:
        return jagged.to_rows(columns[name])[row].tolist()

    return rollout_row(
        uid=objects["uid"][row],
        sample_index=int(columns["sample_index"][row]),
        prompt=task.get("prompt", ""),
        response=text,
        answer=task.get("answer"),
        prompt_ids=tokens("prompt_ids"),
        response_ids=tokens("response_ids"),
        response_mask=tokens("response_mask"),
        logprobs=tokens("rollout_logprobs"),
        versions=tokens("weight_version"),
        finish_reason=objects["finish_reason"][row],
        reward=scored.reward,
        scores=scored.scores,
        feedback=_feedback(objects["environment"][row], scored),
        info={**objects["environment"][row]["info"], **scored.info},
    )
