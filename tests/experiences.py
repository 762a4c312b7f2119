"""Experience as the driver sees it, made of a few numbers a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlsys.batch.versions import WeightVersion
from rlsys.workers.experience import Experience, Shard
from rlsys.workers.reward import RewardSummary
from rlsys.workers.rollout import RolloutSummary

PROMPT_TOKENS = 3


def make_experience(
    groups: Sequence[Sequence[int]], *, shards: int = 1, rewards: Sequence[float] | None = None
) -> Experience:
    """Prompt groups with these response lengths, cut into shards of whole groups. A reward is 0 unless given; the
    shards' columns are names (``0/rollout``) where a run has object references."""
    total = sum(len(group) for group in groups)
    values = np.asarray(rewards if rewards is not None else np.zeros(total), dtype=np.float32)
    made, start = [], 0
    for index, members in enumerate(np.array_split(np.arange(len(groups)), shards)):
        lengths = np.array([n for g in members for n in groups[g]], dtype=np.int64)
        uids = [f"p{g}@0" for g in members for _ in groups[g]]
        made.append(_shard(index, uids, lengths, values[start : start + len(lengths)]))
        start += len(lengths)
    return Experience(made, {"rollout": 1.0, "reward": 0.0, "reference": 0.0})


def _shard(index: int, uids: list[str], lengths: np.ndarray, rewards: np.ndarray) -> Shard:
    rollout = RolloutSummary(
        uids=np.array(uids, dtype=object),
        prompt_lengths=np.full(len(uids), PROMPT_TOKENS),
        response_lengths=lengths,
        sampled_tokens=lengths,
        finish_reasons=np.array(["length" if n >= 50 else "stop" for n in lengths], dtype=object),
        oldest_version=WeightVersion(0, 0),
        repetition=np.zeros(len(uids), dtype=np.float32),
    )
    reward = RewardSummary(rewards, {"correct": rewards.astype(np.float64)}, [], [])
    names = ("rollout", "reward", "reference")
    return Shard(tuple(f"{index}/{name}" for name in names), rollout, reward)
