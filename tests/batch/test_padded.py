"""Between jagged columns and the dense form with the field's names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch import BatchError, DataProto, jagged
from rlsys.batch.columns import check_columns


def rollout(prompts: list[int], responses: list[int]) -> DataProto:
    """Row i has ``prompts[i]`` tokens 1, 2, … and ``responses[i]`` tokens 100, 101, …"""
    ids = jagged.from_rows([torch.arange(100, 100 + n) for n in responses], dtype=torch.int64)
    flat, offsets = jagged.values(ids), jagged.offsets(ids)
    columns = {
        "response_mask": flat % 2 == 0,
        "rollout_logprobs": -flat.float(),
        "old_logprobs": -flat.float() - 1,
        "ref_logprobs": -flat.float() - 2,
        "advantages": flat.float(),
        "weight_version": flat,
    }
    return DataProto.from_dict(
        {
            "prompt_ids": jagged.from_rows([torch.arange(1, n + 1) for n in prompts], dtype=torch.int64),
            "response_ids": ids,
            **{name: jagged.from_values(column, offsets=offsets) for name, column in columns.items()},
            "rewards": torch.arange(len(prompts)).float(),
        },
        {"uid": [str(i) for i in range(len(prompts))]},
        {"step": 1},
    )


def test_the_dense_form() -> None:
    dense = rollout([2, 1], [1, 3]).to_padded(pad_token_id=9).batch
    assert dense["prompts"].tolist() == [[1, 2], [9, 1]]
    assert dense["responses"].tolist() == [[100, 9, 9], [100, 101, 102]]
    assert dense["input_ids"].tolist() == [[1, 2, 100, 9, 9], [9, 1, 100, 101, 102]]
    assert dense["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert dense["position_ids"].tolist() == [[0, 1, 2, 2, 2], [0, 0, 1, 2, 3]]
    assert dense["response_mask"].tolist() == [[1, 0, 0], [1, 0, 1]]
    assert dense["rollout_log_probs"].tolist() == [[-100, 0, 0], [-100, -101, -102]]
    assert dense["old_log_probs"].shape == dense["ref_log_prob"].shape == dense["advantages"].shape == (2, 3)
    assert dense["weight_version"].tolist() == [[100, -1, -1], [100, 101, 102]]
    assert dense["rewards"].tolist() == [0, 1]
    assert not any(jagged.is_jagged(column) for column in dense.values())


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_the_way_there_and_back(lengths: list[tuple[int, int]]) -> None:
    data = rollout([p for p, _ in lengths], [r for _, r in lengths])
    back = DataProto.from_padded(data.to_padded(pad_token_id=1))
    assert set(back.batch.keys()) == set(data.batch.keys())
    for name, column in data.batch.items():
        if jagged.is_jagged(column):
            assert jagged.equal(back.batch[name], column)
            assert back.batch[name].dtype == column.dtype
        else:
            assert torch.equal(back.batch[name], column)
    assert back.meta_info == data.meta_info
    assert back.non_tensor_batch["uid"].tolist() == data.non_tensor_batch["uid"].tolist()
    check_columns(back, data.batch.keys(), "trainer")


def test_further_columns_are_cut_where_asked() -> None:
    data = rollout([1, 1], [1, 2])
    data.batch["entropy"] = jagged.from_values(torch.ones(3), offsets=jagged.offsets(data.batch["response_ids"]))
    dense = data.to_padded()
    assert dense.batch["entropy"].tolist() == [[1, 0], [1, 1]]
    assert not jagged.is_jagged(DataProto.from_padded(dense).batch["entropy"])
    back = DataProto.from_padded(dense, response_columns=["entropy"])
    assert jagged.values(back.batch["entropy"] * back.batch["response_mask"]).tolist() == [1, 1, 0]


def test_responses_alone_have_no_derived_columns() -> None:
    dense = rollout([1], [2]).select(["response_ids", "advantages"]).to_padded()
    assert set(dense.batch.keys()) == {"responses", "advantages"}


def test_what_is_no_padded_batch_is_refused() -> None:
    dense = rollout([1, 2], [2, 1]).to_padded()
    for name in ("prompts", "responses", "attention_mask"):
        with pytest.raises(BatchError, match=f"'{name}' is missing"):
            DataProto.from_padded(dense.select([key for key in dense.batch.keys() if key != name]))  # noqa: SIM118
    narrow = DataProto(dense.batch.copy())
    narrow.batch["attention_mask"] = dense.batch["attention_mask"][:, :-1]
    with pytest.raises(BatchError, match="3 wide"):
        DataProto.from_padded(narrow)
    gap = DataProto(dense.batch.copy())
    gap.batch["attention_mask"] = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])
    with pytest.raises(BatchError, match="gap"):
        DataProto.from_padded(gap)
    wide = DataProto(dense.batch.copy())
    wide.batch["advantages"] = torch.zeros(2, 5)
    with pytest.raises(BatchError, match="'advantages' has shape"):
        DataProto.from_padded(wide)
