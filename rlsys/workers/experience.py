"""A step's experience as the driver sees it: references of columns, and a few numbers a row."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray

from rlsys.algorithms.advantages import group_index
from rlsys.batch import DataProto
from rlsys.batch.balance import balanced_partitions
from rlsys.config.schema import DeadlineConfig
from rlsys.workers.dispatch import Dispatch, Pool, Unwatched, answers
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import RolloutSummary, SampleRequest
from rlsys.workers.trainer import Slice
from rlsys.workers.waits import Call, StopFlag

SHARDS_PER_WORKER = 4  # so that rewards of the first are computed while the last is still sampled
# Beyond, several shards of one worker gain nothing: the workers themselves end at different times. Rewards are asked
# for by at most so many calls too, each about shards that ended one after another: calls are what the driver pays for.
_MANY_SHARDS = 64
_AT_ONCE = 4  # calls under way at the reward actor, and at the reference: more would wait in its memory


@dataclass(frozen=True)
class Shard:
    """columns: references of DataProtos with the same rows: rollout, rewards and, where one runs, reference."""

    columns: tuple[ray.ObjectRef, ...]
    rollout: RolloutSummary
    reward: RewardSummary


@dataclass(frozen=True)
class Experience:
    """Whole prompt groups, in the order of the prompts.

    seconds: how long the last shard of each stage took after the last of the stage before.
    kept: rows that are trained on, as numbers over all shards, ascending; None: all. B counts these alone.
    """

    shards: list[Shard]
    seconds: dict[str, float]
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return self.generated if self.kept is None else len(self.kept)

    @property
    def generated(self) -> int:
        """Rows of all shards."""
        return sum(len(shard.rollout) for shard in self.shards)

    def rollout(self, name: str) -> np.ndarray:
        """[B] one field of the rollout summaries."""
        return self._kept(np.concatenate([getattr(shard.rollout, name) for shard in self.shards]))

    @property
    def rewards(self) -> np.ndarray:
        """[B] float32"""
        return self._kept(np.concatenate([shard.reward.rewards for shard in self.shards]))

    def scores(self, part: str) -> np.ndarray:
        """[B] float64, NaN where the part's condition did not hold."""
        return self._kept(np.concatenate([shard.reward.scores[part] for shard in self.shards]))

    def keep(self, rows: np.ndarray) -> Experience:
        """These of the B rows alone (mask [B])."""
        return replace(self, kept=self._kept(np.arange(self.generated))[rows])

    @property
    def everything(self) -> Experience:
        """All rows that were generated, also those that filters dropped."""
        return replace(self, kept=None)

    def first(self, rows: int) -> Experience:
        """The first of all rows are trained on, whatever was dropped; the others were generated all the same."""
        return replace(self, kept=np.arange(rows))

    def followed_by(self, other: Experience) -> Experience:
        """Rows of both."""
        kept = [e._kept(np.arange(e.generated)) for e in (self, other)]
        stages = dict.fromkeys((*self.seconds, *other.seconds))
        return Experience(
            [*self.shards, *other.shards],
            {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages},
            np.concatenate([kept[0], kept[1] + self.generated]),
        )

    def _kept(self, values: np.ndarray) -> np.ndarray:
        return values if self.kept is None else values[self.kept]

    @property
    def tokens(self) -> np.ndarray:
        """[B] prompt and response tokens of a row."""
        return self.rollout("prompt_lengths") + self.rollout("response_lengths")

    def staleness(self, step: int) -> int:
        """Steps between the trainer's weights (of ``step``) and the oldest that sampled a token."""
        oldest = [s.rollout.oldest_version.step for s in self.shards if s.rollout.oldest_version is not None]
        return step - min(oldest, default=step)

    def by_sample(self, values: np.ndarray) -> dict[tuple[str, int], float]:
        """values: [B]. By uid and sample index: groups come whole and in the order of their samples."""
        seen: Counter[str] = Counter()
        result = {}
        for uid, value in zip(self.rollout("uids"), values, strict=True):
            result[uid, seen[uid]] = float(value)
            seen[uid] += 1
        return result

    def failures(self) -> list[dict]:
        return [failure for shard in self.shards for failure in shard.reward.failures]

    def slices(self, rows: np.ndarray, columns: Sequence[int]) -> list[Slice]:
        """These of the B rows (ascending) as slices of their shards, with the columns at these positions."""
        rows = rows if self.kept is None else self.kept[rows]
        starts = np.cumsum([0, *(len(shard.rollout) for shard in self.shards)])
        edges = np.searchsorted(rows, starts)
        return [
            Slice(tuple(shard.columns[c] for c in columns), rows[first:last] - start)
            for shard, start, first, last in zip(self.shards, starts[:-1], edges[:-1], edges[1:], strict=True)
            if last > first
        ]


def collect(
    prompts: DataProto,
    request: SampleRequest,
    rollout: RolloutGroup,
    reward: RewardGroup,
    reference: ReferenceGroup | None,
    deadlines: DeadlineConfig,
    stop: StopFlag,
    *,
    record_rows: int = 0,
    shards_per_worker: int = SHARDS_PER_WORKER,
    train: bool = True,
    fleets: Fleets | None = None,
) -> Experience:
    """prompts → rollout → reward and reference, each of which starts on a shard as soon as it has been sampled.

    What an actor had that is lost, or late by its deadline, is done by another, or by the one that takes its place;
    each sample is that of its seed, whoever draws it.

    Args:
        record_rows: so many rows, from the first, come back in full for people to read.
        shards_per_worker: fewer where there are many workers. 1 keeps the composition of the sampler's batches the same
            from run to run: a worker has one shard at a time.
        train: whether what the loss needs beside rewards is written too.
        fleets: keep the actors alive; None: a lost one ends the wait.

    Raises:
        ActorLost, DeadlineExceeded: an actor was lost or late more often than it may be.
        ActorFailed, UserError, StopRequested: as ``waits.as_completed`` raises them.
    """
    workers = len(rollout)
    pieces = _cut(len(prompts), max(workers, min(workers * shards_per_worker, _MANY_SHARDS)))
    rows_before = np.cumsum([0, *(len(piece) * request.samples for piece in pieces)])
    shared = ray.put(prompts)  # copied once

    def score(index: int, members: list[int]) -> Call:
        wanted = [int(np.clip(record_rows - rows_before[i], 0, len(sampled[i]))) for i in members]
        shards, rows = [played[i] for i in members], int(rows_before[-1])
        columns, call = reward.score(shards, record_rows=wanted, step_rows=rows, payload=None, train=train, index=index)
        return replace(call, payload=columns)

    def refer(index: int, members: list[int]) -> Call:
        assert reference is not None
        columns, call = reference.logprobs([played[i] for i in members], index)
        return replace(call, payload=columns)

    def pool(name: str, group: RolloutGroup | RewardGroup | ReferenceGroup | None) -> Pool:
        kept = getattr(fleets, name, None)
        return kept if kept is not None else Unwatched(len(group) if group is not None else 0)

    sampling = Dispatch[int](
        "rollout",
        deadlines.rollout,
        pool("rollout", rollout),
        lambda index, piece: rollout.generate(index, shared, pieces[piece], request),
        limit=1 if shards_per_worker == 1 and fleets is not None else None,
    )
    scoring = Dispatch[list[int]]("reward", deadlines.reward, pool("reward", reward), score, limit=_AT_ONCE)
    referring = Dispatch[list[int]](
        "reference", deadlines.reference, pool("reference", reference), refer, limit=_AT_ONCE
    )
    for piece in range(len(pieces)):
        sampling.put(piece)
    sampled: dict[int, RolloutSummary] = {}
    played: dict[int, ray.ObjectRef] = {}
    scores: dict[int, tuple[ray.ObjectRef, RewardSummary]] = {}
    logprobs: dict[int, ray.ObjectRef] = {}
    untold: list[int] = []  # shards that nobody has been told about yet
    together = math.ceil(len(pieces) / _MANY_SHARDS)
    began, last = time.monotonic(), dict[str, float]()
    for stage, work, call, answer in answers([sampling, scoring, referring], fleets, stop, samplers=sampling):
        last[stage.phase] = time.monotonic()
        if stage is scoring:
            scores |= {i: found for i, *found in zip(work, call.payload, answer, strict=True)}
        elif stage is referring:
            logprobs |= dict(zip(work, call.payload, strict=True))
        else:
            sampled[work], played[work] = answer, call.payload
            untold.append(work)
            if len(untold) >= together or len(sampled) == len(pieces):
                scoring.put(untold)
                if reference is not None:
                    referring.put(untold)
                untold = []
    shards = []
    for i in range(len(pieces)):
        columns, summary = scores[i]
        shards.append(Shard((played[i], columns, *([logprobs[i]] if i in logprobs else [])), sampled[i], summary))
    return Experience(shards, _stage_seconds(began, last))


def _stage_seconds(began: float, last: dict[str, float]) -> dict[str, float]:
    """How long the last answer of each stage came after the last of the stages before. last: when that was."""
    seconds: dict[str, float] = {}
    before = began
    for stage in ("rollout", "reward", "reference"):
        if stage in last:
            seconds[stage] = max(last[stage] - before, 0.0)
            before = max(last[stage], before)
    return seconds


def _cut(prompts: int, shards: int) -> list[range]:
    """At most ``shards`` nearly equal runs of consecutive prompts."""
    edges = [piece[0] for piece in np.array_split(np.arange(prompts), min(shards, prompts))]
    return [range(int(first), int(last)) for first, last in zip(edges, [*edges[1:], prompts], strict=True)]


def assign(experience: Experience, *, ranks: int, updates: int) -> list[list[np.ndarray]]:
    """Divides whole prompt groups over optimiser steps (in order) and, within each, over ranks (balanced by tokens).

    Returns:
        [rank][update] → global rows, ascending. A rank may have none.
    """
    groups, tokens = group_index(list(experience.rollout("uids"))).numpy(), experience.tokens
    rows_of = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    result: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for members in np.array_split(np.arange(len(rows_of)), updates):
        sizes = [int(tokens[rows_of[g]].sum()) for g in members]
        for rank, part in enumerate(balanced_partitions(sizes, ranks)):
            rows = [rows_of[members[p]] for p in part]
            result[rank].append(np.sort(np.concatenate(rows)) if rows else np.empty(0, dtype=np.int64))
    return result
