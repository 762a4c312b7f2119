from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import make_tokenizer

from rlsys.batch import DataProto, jagged
from rlsys.config.errors import UserError
from rlsys.data.base import LazyRows, Row, user_row
from rlsys.data.permutation import Permutation
from rlsys.data.prompts import PromptEncoder
from rlsys.data.sampler import PromptStream, held_out_batch

_TOKENIZER = make_tokenizer()
LIMIT = 6

sizes = st.integers(1, 12)
steps = st.integers(1, 9)
seeds = st.integers(-(2**70), 2**70)


def rows(count: int, *, long: frozenset[int] = frozenset()) -> LazyRows:
    """Rows "0" … of one to three tokens; those of ``long`` have more than the limit."""

    def make(place: int) -> Row:
        text = "9" * (LIMIT + 1) if place in long else str(place)
        return user_row(str(place), text, {"answer": place}, f"rows.jsonl:{place + 1}")

    return LazyRows(count, make)


def encoder(long_prompts: str = "drop") -> PromptEncoder:
    return PromptEncoder(_TOKENIZER, max_prompt_tokens=LIMIT, long_prompts=long_prompts)


def stream(
    data: LazyRows, per_step: int, seed: int = 0, shuffle: bool = True, long_prompts: str = "drop"
) -> PromptStream:
    return PromptStream(data, encoder(long_prompts), prompts_per_step=per_step, seed=seed, shuffle=shuffle)


def uids(batch: DataProto) -> list[str]:
    return batch.non_tensor_batch["uid"].tolist()


def drawn(prompts: PromptStream, batches: int) -> list[str]:
    return [uid for _ in range(batches) for uid in uids(prompts.next_batch())]


@given(sizes, steps, seeds, st.booleans())
def test_every_row_comes_once_in_every_epoch_and_epochs_follow_each_other(count, per_step, seed, shuffle):
    batches = 3 * count // per_step + 1
    seen = [uid.split("@") for uid in drawn(stream(rows(count), per_step, seed, shuffle), batches)]
    for position, (_, epoch) in enumerate(seen):
        assert int(epoch) == position // count
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(int(row) for row, _ in seen[start : start + count]) == list(range(count))


@given(sizes, steps, seeds, st.integers(0, 12))
def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped(count, per_step, seed, before):
    first = stream(rows(count), per_step, seed)
    drawn(first, before)
    second = stream(rows(count), per_step, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(4):
        left, right = first.next_batch(), second.next_batch()
        assert uids(left) == uids(right)
        assert jagged.equal(left.batch["prompt_ids"], right.batch["prompt_ids"])
    assert first.state_dict() == second.state_dict()


@given(st.integers(2, 12), st.sets(st.integers(0, 11)), steps, seeds)
def test_long_prompts_are_passed_over_and_the_rest_comes_once_an_epoch(count, long, per_step, seed):
    kept = sorted(set(range(count)) - long)
    prompts = stream(rows(count, long=frozenset(long)), per_step, seed)
    if not kept:
        with pytest.raises(UserError) as error:
            prompts.next_batch()
        assert "data.max_prompt_tokens" in str(error.value)
        return
    seen = drawn(prompts, 3 * len(kept) // per_step + 1)
    assert len(set(seen)) == len(seen)
    for epoch in range(len(seen) // len(kept) - 1):
        assert sorted(int(uid.split("@")[0]) for uid in seen if uid.endswith(f"@{epoch}")) == kept


def test_a_batch_has_the_declared_columns():
    data = rows(5)
    batch = stream(data, 4, shuffle=False).next_batch()
    assert uids(batch) == ["0@0", "1@0", "2@0", "3@0"]
    assert batch.batch["prompt_ids"].dtype == torch.int64
    assert [_TOKENIZER.decode(ids) for ids in jagged.to_rows(batch.batch["prompt_ids"])] == ["0", "1", "2", "3"]
    assert [task["answer"] for task in batch.non_tensor_batch["task"]] == [0, 1, 2, 3]
    assert batch.non_tensor_batch["messages"].tolist() == [[{"role": "user", "content": str(i)}] for i in range(4)]


def test_a_step_of_more_prompts_than_rows_goes_through_several_epochs():
    batch = stream(rows(3), 8, shuffle=False).next_batch()
    assert uids(batch) == ["0@0", "1@0", "2@0", "0@1", "1@1", "2@1", "0@2", "1@2"]


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> tuple[str, ...]:
        seen = drawn(stream(rows(40), 40, seed), epoch + 1)
        return tuple(uid.split("@")[0] for uid in seen[40 * epoch :])

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_long_prompt_is_an_error_that_names_the_row():
    with pytest.raises(UserError) as error:
        drawn(stream(rows(5, long=frozenset({3})), 5, long_prompts="error"), 1)
    assert error.value.where == "rows.jsonl:4"


def test_a_state_of_another_data_set_is_refused():
    with pytest.raises(UserError, match="5 rows"):
        stream(rows(5), 2).load_state_dict(stream(rows(6), 2).state_dict())


def test_no_rows_are_an_error():
    with pytest.raises(UserError):
        stream(rows(0), 2)


@given(sizes, st.integers(1, 15))
def test_held_out_problems_are_the_first_in_their_order(count, problems):
    batch = held_out_batch(rows(count), encoder(), problems=problems)
    assert uids(batch) == [f"{i}@eval" for i in range(min(count, problems))]


def test_long_held_out_problems():
    data = rows(5, long=frozenset({0, 2}))
    assert uids(held_out_batch(data, encoder(), problems=2)) == ["1@eval", "3@eval"]
    with pytest.raises(UserError) as error:
        held_out_batch(data, encoder("error"), problems=2)
    assert error.value.where == "rows.jsonl:1"
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens"):
        held_out_batch(rows(2, long=frozenset({0, 1})), encoder(), problems=2)


@given(st.integers(1, 300), st.lists(st.integers() | st.text(max_size=4), max_size=3))
def test_a_permutation_is_a_bijection_with_its_inverse(size, key):
    permutation, places = Permutation(size, *key), np.arange(size)
    values = permutation(places)
    assert sorted(values.tolist()) == places.tolist()
    assert permutation.inverse(values).tolist() == places.tolist()
    assert [int(permutation(np.array([place]))[0]) for place in range(min(size, 5))] == values[:5].tolist()


def test_a_permutation_never_moves():
    """Data order of runs that were written down depends on it."""
    assert Permutation(10, "prompt order", 0, 0)(np.arange(10)).tolist() == [4, 0, 7, 2, 8, 9, 5, 1, 6, 3]


def test_all_values_are_about_equally_likely_in_all_places():
    counts = Counter(
        (place, int(value)) for seed in range(2000) for place, value in enumerate(Permutation(5, seed)(np.arange(5)))
    )
    assert len(counts) == 25
    assert all(300 < count < 500 for count in counts.values())  # 400 ± 18 (one standard deviation)


def test_places_outside_and_empty_orders_are_errors():
    with pytest.raises(IndexError):
        Permutation(5)(np.array([5]))
    with pytest.raises(ValueError, match="0"):
        Permutation(0)
