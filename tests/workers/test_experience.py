"""A step's experience as the driver sees it: how rows are numbered over shards and dealt out to trainer ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch
from experiences import make_experience
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch import DataProto
from rlsys.config.schema import DeadlineConfig
from rlsys.workers.experience import assign, collect
from rlsys.workers.rollout import SampleRequest
from rlsys.workers.waits import Call, StopFlag

group_lists = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=12)


@given(groups=group_lists, ranks=st.integers(1, 5), data=st.data())
def test_every_row_is_assigned_once_whole_groups_in_order(
    groups: list[list[int]], ranks: int, data: st.DataObject
) -> None:
    updates = data.draw(st.integers(1, len(groups)))
    experience = make_experience(groups, shards=data.draw(st.integers(1, len(groups))))
    assignment = assign(experience, ranks=ranks, updates=updates)
    assert [len(rank) for rank in assignment] == [updates] * ranks
    cells = {(r, u): rows for r, rank in enumerate(assignment) for u, rows in enumerate(rank)}
    everything = np.concatenate(list(cells.values()))
    assert sorted(everything.tolist()) == list(range(len(experience)))
    assert all((np.diff(rows) > 0).all() for rows in cells.values()), "ascending, so that slices keep their order"

    group_of = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    homes: dict[int, set[tuple[int, int]]] = {}
    for cell, rows in cells.items():
        for row in rows:
            homes.setdefault(int(group_of[row]), set()).add(cell)
    assert all(len(cell) == 1 for cell in homes.values()), "a group is on one rank, in one update"
    updates_in_order = [next(iter(homes[g]))[1] for g in range(len(groups))]
    assert updates_in_order == sorted(updates_in_order), "the step's first prompts are in its first update"


def test_ranks_are_balanced_by_tokens_not_by_rows() -> None:
    experience = make_experience([[90], [30], [30], [30]])
    assignment = assign(experience, ranks=2, updates=1)
    assert sorted(len(rank[0]) for rank in assignment) == [1, 3]


def test_a_rank_without_a_group_has_no_rows() -> None:
    assignment = assign(make_experience([[5, 5]]), ranks=2, updates=1)
    assert sorted(rows.tolist() for (rows,) in assignment) == [[], [0, 1]]


@given(groups=group_lists, data=st.data())
def test_slices_give_each_shard_its_own_rows_and_columns(groups: list[list[int]], data: st.DataObject) -> None:
    experience = make_experience(groups, shards=data.draw(st.integers(1, len(groups))))
    picked = data.draw(st.sets(st.integers(0, len(experience) - 1), min_size=1))
    rows = np.array(sorted(picked))
    slices = experience.slices(rows, (0, 2))
    starts = {shard.columns[0]: start for shard, start in zip(experience.shards, _starts(experience), strict=True)}
    found = [starts[piece.columns[0]] + row for piece in slices for row in piece.rows]
    assert found == rows.tolist()
    assert all(len(piece.rows) for piece in slices), "a shard that is not needed is not fetched"
    assert all(len(piece.columns) == 2 for piece in slices)


def test_fields_are_joined_over_shards_in_row_order() -> None:
    experience = make_experience([[1, 2], [3], [4]], shards=3, rewards=[0.0, 1.0, 2.0, 3.0])
    assert experience.rewards.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert experience.rollout("uids").tolist() == ["p0@0", "p0@0", "p1@0", "p2@0"]
    assert experience.rollout("response_lengths").tolist() == [1, 2, 3, 4]
    assert experience.tokens.tolist() == pytest.approx([4, 5, 6, 7])
    assert experience.scores("correct").tolist() == [0.0, 1.0, 2.0, 3.0]


def _starts(experience: object) -> list[int]:
    lengths = [len(shard.rollout) for shard in experience.shards]  # type: ignore[attr-defined]
    return np.cumsum([0, *lengths[:-1]]).tolist()


class Played:
    """A rollout, a reward and a reference group that have every answer ready: shards of one prompt and one response."""

    def __init__(self, prompts: int):
        self.shards = make_experience([[n + 1] for n in range(prompts)], shards=prompts).shards
        self.of_column = {shard.columns[0]: shard for shard in self.shards}
        self.asked: list[list[str]] = []

    def __len__(self) -> int:
        return len(self.shards)

    def generate(self, index: int, prompts: ray.ObjectRef, rows: range, _: SampleRequest) -> Call:
        assert 0 <= index < len(self)
        (row,) = rows
        shard = self.shards[int(ray.get(prompts).batch["row"][row])]
        return Call(ray.put(shard.rollout), "sampler", "responses", shard.columns[0], index)

    def score(self, shards: list[str], *, payload: Any, **_: Any) -> tuple[list[str], Call]:
        self.asked.append(shards)
        summaries = [self.of_column[name].reward for name in shards]
        return [self.of_column[name].columns[1] for name in shards], Call(ray.put(summaries), "r", "rewards", payload)

    def logprobs(self, shards: list[str], index: int) -> tuple[list[str], Call]:
        return [self.of_column[name].columns[2] for name in shards], Call(ray.put(0), "r", "log-probs")


@pytest.mark.ray
@pytest.mark.parametrize(("prompts", "calls"), [(3, 3), (64, 64), (150, 50)])
def test_rewards_of_many_shards_are_asked_for_by_few_calls(ray_cluster: None, prompts: int, calls: int) -> None:
    group: Any = Played(prompts)
    rows = DataProto.from_dict(tensors={"row": torch.arange(prompts)})
    request = SampleRequest(1, 1.0, 8, run_seed=0)
    found = collect(rows, request, group, group, group, DeadlineConfig(), StopFlag())
    assert len(group.asked) == calls
    assert sorted(name for names in group.asked for name in names) == sorted(group.of_column), "every shard once"
    assert [shard.columns for shard in found.shards] == [shard.columns for shard in group.shards]
    assert found.rollout("response_lengths").tolist() == list(range(1, prompts + 1))
