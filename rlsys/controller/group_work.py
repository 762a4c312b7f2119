"""One prompt group on its way through a stream, and who is given the next one."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice

import ray

from rlsys.data.sampler import Place
from rlsys.workers.experience import Shard
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import RolloutSummary

_BYTES_A_TOKEN = 32  # of a group's columns: ids, mask, log-probs, versions, and as much again for what is added


@dataclass
class Work:
    """One group on its way. worker: who samples it, -1: nobody yet; shunned: who had it before and did not bring it;
    late: how often its sampling has passed its deadline."""

    place: Place
    prompts: ray.ObjectRef
    row: int
    worker: int = -1
    shunned: int = -1
    late: int = 0
    columns: ray.ObjectRef | None = None
    summary: RolloutSummary | None = None
    reward: tuple[ray.ObjectRef, RewardSummary] | None = None
    reference: ray.ObjectRef | None = None

    def sampled(self) -> tuple[ray.ObjectRef, RolloutSummary]:
        assert self.columns is not None
        assert self.summary is not None
        return self.columns, self.summary

    @property
    def under_way(self) -> bool:
        """Whether a sampler is at it."""
        return self.worker >= 0 and self.summary is None

    @property
    def unread_bytes(self) -> int:
        """Of the samples that it has."""
        if self.summary is None:
            return 0
        return int((self.summary.prompt_lengths + self.summary.response_lengths).sum()) * _BYTES_A_TOKEN

    def shard(self) -> Shard:
        columns, summary = self.sampled()
        assert self.reward is not None
        rewards, scored = self.reward
        return Shard((columns, rewards, *([self.reference] if self.reference is not None else [])), summary, scored)


def ticket_of(key: str, attempt: int) -> str:
    return f"{key}.{attempt}"


def first_of(waiting: dict[str, None], count: int) -> list[str]:
    """Takes out the first ones."""
    keys = list(islice(waiting, count))
    for key in keys:
        del waiting[key]
    return keys


def least_busy(free: list[tuple[int, int]], shunned: int, most: int) -> int:
    """Who is given the next group: anybody but ``shunned``, if there is anybody else.

    Args:
        free: a heap of (groups under way, worker), of workers that may have more; kept so.
        most: groups that one may have.
    """
    aside = heapq.heappop(free) if len(free) > 1 and free[0][1] == shunned else None
    load, worker = heapq.heappop(free)
    if load + 1 < most:
        heapq.heappush(free, (load + 1, worker))
    if aside is not None:
        heapq.heappush(free, aside)
    return worker
