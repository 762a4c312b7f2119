"""Pairs of prompt groups, pairs beside samples in one batch, and what the reference scores of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import make_model
from replay_shards import given_span, said, sampled, shard

from rlsys.batch import DataProto, jagged
from rlsys.batch.columns import COLUMNS, check_columns
from rlsys.config.schema import TrainerConfig
from rlsys.engines.train.model import PolicyModel
from rlsys.engines.train.reference import ReferenceEngine
from rlsys.environments.base import Trajectory
from rlsys.replay.pairs import (
    SIDES,
    Pair,
    join_pairs,
    pair_batch,
    pairs_from_groups,
    reference_view,
    with_reference,
)

PAIR_COLUMNS = ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask", "pair_id", "pair_slot")


def rows(batch: DataProto, name: str) -> list[list[Any]]:
    return [row.tolist() for row in jagged.to_rows(batch.batch[name])]


def groups(sizes: list[int]) -> DataProto:
    """Every response of its own length and tokens; the reference's log-probs count up."""
    texts = iter("0123456789abcdefghijklmnopqrstuvwxyz")
    batch, _ = shard([[said(next(texts) * (1 + i % 3)) for i in range(size)] for size in sizes])
    tokens = len(jagged.values(batch.batch["response_ids"]))
    logprobs = jagged.from_values(-torch.arange(1.0, tokens + 1), offsets=jagged.offsets(batch.batch["response_ids"]))
    return batch.union(DataProto.from_dict({"ref_logprobs": logprobs}))


def test_the_best_is_paired_against_the_worst_in_the_best_ones_row():
    batch = groups([4, 2])
    # equal rewards: the lowest index
    made = pairs_from_groups(batch, np.array([0, 1, 1, 0, 0.5, 0.25], dtype=np.float32), min_gap=0.25)
    check_columns(made, PAIR_COLUMNS, "objective")
    prompt, response, ref = (rows(batch, name) for name in ("prompt_ids", "response_ids", "ref_logprobs"))
    for row in range(6):
        chosen, rejected = {1: (1, 0), 4: (4, 5)}.get(row, (None, None))
        for side, source in (("chosen", chosen), ("rejected", rejected)):
            if source is None:
                assert [rows(made, f"{side}_{part}")[row] for part in ("ids", "mask", "ref_logprobs")] == [[]] * 3
                continue
            size = len(prompt[source])
            assert rows(made, f"{side}_ids")[row] == prompt[source] + response[source]
            assert rows(made, f"{side}_mask")[row] == [False] * size + [True] * len(response[source])
            assert rows(made, f"{side}_ref_logprobs")[row] == [0.0] * size + ref[source]
    assert made.batch["pair_slot"].tolist() == [False, True, False, False, True, False]
    assert made.non_tensor_batch["pair_id"].tolist() == [None, "0@0:1>0", None, None, "1@0:0>1", None]
    assert "chosen_ids" not in batch.batch.keys()  # noqa: SIM118


def test_too_small_a_gap_leaves_the_slot_empty():
    batch = groups([2, 2, 1])
    made = pairs_from_groups(batch, np.array([1, 0.5, 0, 0, 1], dtype=np.float32), min_gap=0.6)
    assert made.batch["pair_slot"].tolist() == [True, False, True, False, True]
    assert not len(jagged.values(made.batch["chosen_ids"]))
    assert made.non_tensor_batch["pair_id"].tolist() == [None] * 5
    just = pairs_from_groups(batch, np.array([1, 0.5, 0, 0, 1], dtype=np.float32), min_gap=0.5)
    assert just.non_tensor_batch["pair_id"].tolist() == ["0@0:0>1", None, None, None, None]


def test_a_pair_is_of_two_different_responses_with_sampled_tokens():
    silent, given_only = Trajectory([], "length"), Trajectory([given_span("1")], "length")
    batch, _ = shard(
        [[silent, said("1"), said("2")], [silent, said("1")], [said("1"), said("1")], [silent, given_only]]
    )
    made = pairs_from_groups(batch, np.array([0, 1, 0.5, 0, 1, 0, 1, 0, 1], dtype=np.float32), min_gap=0.1)
    assert made.non_tensor_batch["pair_id"].tolist() == [None, "0@0:1>2", *[None] * 7]
    assert made.batch["pair_slot"].tolist() == [False, True, False, False, True, False, True, False, True]
    assert "chosen_ref_logprobs" not in made.batch.keys()  # noqa: SIM118


@given(st.data())
def test_pairs_do_not_depend_on_the_order_of_rows(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    batch = groups(sizes)
    rewards = np.array(data.draw(st.lists(st.sampled_from([0, 0.5, 1]), min_size=len(batch), max_size=len(batch))))
    order = data.draw(st.permutations(range(len(batch))))
    made = pairs_from_groups(batch, rewards, min_gap=0.1).select_idxs(order)
    moved = pairs_from_groups(batch.select_idxs(order), rewards[order], min_gap=0.1)
    for name, column in made.batch.items():
        other = moved.batch[name]
        assert jagged.equal(column, other) if jagged.is_jagged(column) else torch.equal(column, other)
    assert made.non_tensor_batch["pair_id"].tolist() == moved.non_tensor_batch["pair_id"].tolist()
    assert int(made.batch["pair_slot"].sum()) == len(sizes)


def test_shapes_that_disagree_and_no_rows():
    batch = groups([2])
    with pytest.raises(ValueError, match=r"2 rows came with rewards of shape \(3,\)"):
        pairs_from_groups(batch, np.zeros(3), min_gap=1.0)
    assert len(pairs_from_groups(DataProto(), np.zeros(0), min_gap=1.0)) == 0
    none = pairs_from_groups(batch.select_idxs([]), np.zeros(0), min_gap=1.0)
    check_columns(none, ("chosen_ids", "chosen_ref_logprobs"), "objective")
    assert "chosen_ids" in none.batch.keys()  # noqa: SIM118


PAIRS = [Pair("pair-1", [5, 6], [7, 1], [8, 9, 1], ""), Pair("pair-2", [5], [7, 7, 1], [1], "")]


def test_pairs_come_after_samples_and_each_is_empty_where_the_other_is_not():
    samples = groups([2]).union(DataProto.from_dict({"rewards": torch.tensor([1.0, 0.0]), "wide": torch.ones(2, 3)}))
    pairs = pair_batch(PAIRS, "0")
    joined = join_pairs(samples, pairs)
    check_columns(joined, ("prompt_ids", "response_ids", "response_mask", "ref_logprobs", "rewards"), "objective")
    check_columns(joined, PAIR_COLUMNS, "objective")
    for part, where, other in ((samples, [0, 1], [2, 3]), (pairs, [2, 3], [0, 1])):
        own, rest = joined.select_idxs(where), joined.select_idxs(other)
        for name, column in part.batch.items():
            assert own.batch[name].dtype == column.dtype
            if jagged.is_jagged(column):
                assert jagged.equal(own.batch[name], column)
                assert not len(jagged.values(rest.batch[name]))
            else:
                assert torch.equal(own.batch[name], column)
                assert not rest.batch[name].any()
        for name, cells in part.non_tensor_batch.items():
            assert own.non_tensor_batch[name].tolist() == cells.tolist()
            if name != "uid":
                assert rest.non_tensor_batch[name].tolist() == [None] * 2
    assert joined.non_tensor_batch["uid"].tolist() == ["0@0", "0@0", "pair-1@0", "pair-2@0"]
    assert len(samples) == len(pairs) == 2


def test_either_side_may_be_empty():
    samples, pairs = groups([2]), pair_batch(PAIRS, "0")
    assert join_pairs(samples, DataProto()) is samples
    alone = join_pairs(DataProto(), pairs)
    for column in COLUMNS.values():
        if column.dtype is not None and column.writer != "pairs":
            check_columns(alone, [column.name], "objective")
    check_columns(alone, ("prompt_ids", "response_ids", "advantages", "teacher_mask"), "objective")
    assert jagged.equal(alone.batch["chosen_ids"], pairs.batch["chosen_ids"])
    for left, right in ((samples.select_idxs([]), pairs), (samples, pairs.select_idxs([]))):
        joined = join_pairs(left, right)
        assert len(joined) == 2
        check_columns(joined, ("prompt_ids", "response_ids", *PAIR_COLUMNS), "objective")
    assert len(join_pairs(DataProto(), DataProto())) == 0


def test_pairs_join_what_has_pairs_already():
    samples = pairs_from_groups(groups([2]), np.array([0.0, 1.0]), min_gap=0.5)
    joined = join_pairs(samples, pair_batch(PAIRS, "0"))
    assert joined.non_tensor_batch["pair_id"].tolist() == [None, "0@0:1>0", "pair-1", "pair-2"]
    assert rows(joined, "rejected_ids")[1:] == [rows(samples, "rejected_ids")[1], [5, 6, 8, 9, 1], [5, 1]]


def test_columns_of_two_kinds_are_refused():
    samples = DataProto.from_dict({"chosen_ids": torch.zeros(2, 3)}, {"uid": ["a", "b"]})
    with pytest.raises(ValueError, match=r"'chosen_ids' is dense \(3,\) .* and jagged \(\) of torch.int64"):
        join_pairs(samples, pair_batch(PAIRS, "0"))


def reference() -> ReferenceEngine:
    policy = PolicyModel(make_model(vocab_size=101), temperature=1.0)
    return ReferenceEngine(policy, TrainerConfig(micro_batch_tokens=64), max_length=128)


def test_the_reference_scores_both_sides():
    turns = Trajectory([sampled("ab"), given_span("(no)"), sampled("cde", end=True)], "stop")
    batch, _ = shard([[turns, said("1")], [said("4")], [said("22"), said("333")]])
    batch.union(reference().forward(batch))
    expected = pairs_from_groups(batch, np.array([1.0, 0.0, 1.0, 0.0, 1.0]), min_gap=0.5)
    bare = expected.select([name for name in expected.batch.keys() if not name.endswith("ref_logprobs")])  # noqa: SIM118
    for side in SIDES:
        view = reference_view(bare, side)
        assert len(view) == 2
        scored = with_reference(bare, side, reference().forward(view))
        name = f"{side}_ref_logprobs"
        check_columns(scored, (f"{side}_ids", f"{side}_mask", name), "objective")
        torch.testing.assert_close(jagged.values(scored.batch[name]), jagged.values(expected.batch[name]))
        assert not jagged.values(scored.batch[name])[~jagged.values(scored.batch[f"{side}_mask"])].any()
        assert name not in bare.batch.keys()  # noqa: SIM118


def test_a_view_of_no_pair():
    pairs = pairs_from_groups(groups([2]), np.zeros(2), min_gap=0.5)
    view = reference_view(pairs, "chosen")
    assert len(view) == 0
    scored = with_reference(pairs, "chosen", reference().forward(view))
    check_columns(scored, ("chosen_ids", "chosen_ref_logprobs"), "objective")
    assert len(reference_view(DataProto(), "chosen")) == 0
    assert len(with_reference(DataProto(), "chosen", DataProto())) == 0


def test_log_probs_of_other_rows_are_refused():
    pairs = pair_batch(PAIRS, "0")
    wrong = DataProto.from_dict({"ref_logprobs": jagged.from_rows([torch.zeros(2), torch.zeros(2)])})
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens got log-probs of \[2, 2\]"):
        with_reference(pairs, "chosen", wrong)
    with pytest.raises(ValueError, match=r"got log-probs of \[\]"):
        with_reference(pairs, "chosen", DataProto())
