"""A stage that finds a column missing or ill-typed says which, who should have written it, and who wants it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlsys.batch import ColumnError, DataProto, jagged
from rlsys.batch.columns import COLUMNS, check_columns
from rlsys.config.errors import UserError

READS = ["response_ids", "response_mask", "rollout_logprobs", "rewards", "uid"]


def rollout() -> DataProto:
    ids = jagged.from_rows([torch.tensor([1, 2]), torch.tensor([3])])
    offsets = jagged.offsets(ids)
    return DataProto.from_dict(
        {
            "response_ids": ids,
            "response_mask": jagged.from_values(torch.ones(3, dtype=torch.bool), offsets=offsets),
            "rollout_logprobs": jagged.from_values(torch.zeros(3), offsets=offsets),
            "rewards": torch.zeros(2),
            "extra": torch.zeros(2, 5),
        },
        {"uid": ["0@0", "1@0"]},
    )


def test_declared_columns_pass() -> None:
    check_columns(rollout(), READS, "advantage")
    check_columns(rollout(), ["extra"], "a user's own stage")
    check_columns(DataProto(), READS, "an idle rank")


def test_a_missing_column_names_writer_and_reader() -> None:
    with pytest.raises(ColumnError) as error:
        check_columns(rollout(), [*READS, "ref_logprobs"], "objective")
    assert isinstance(error.value, UserError)
    assert isinstance(error.value, ValueError)
    for word in ("'ref_logprobs' is missing", "'objective'", f"'{COLUMNS['ref_logprobs'].writer}'"):
        assert word in str(error.value)
    with pytest.raises(ColumnError, match="no stage declares it"):
        check_columns(rollout(), ["teacher"], "objective")


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("rewards", torch.zeros(2, dtype=torch.float64), "is of torch.float64, and declared as torch.float32"),
        ("rewards", torch.zeros(2, 1), r"has the shape \(2, 1\), and is declared as \[B\]"),
        ("rewards", jagged.from_rows([torch.zeros(1), torch.zeros(1)]), "is jagged, and declared as"),
        ("response_mask", torch.ones(2, 2, dtype=torch.bool), "is dense, and declared as"),
        ("rollout_logprobs", jagged.from_rows([torch.zeros(1), torch.zeros(2)]), "row lengths of 'response_ids'"),
        ("uid", torch.zeros(2), "is a tensor, and declared as an object column"),
        ("rewards", np.zeros(2), "is an object column, and declared as a tensor"),
    ],
)
def test_an_ill_typed_column_is_told_apart(name: str, column: torch.Tensor | np.ndarray, message: str) -> None:
    data = rollout()
    data.pop([name] if name in set(data.batch.keys()) else [], [name] if name in data.non_tensor_batch else [])
    data.union(DataProto.from_single_dict({name: column}))
    with pytest.raises(ColumnError, match=f"column '{name}' .*{message}"):
        check_columns(data, READS, "advantage")


def test_prompts_and_responses_may_differ_in_length() -> None:
    data = rollout()
    data.batch["prompt_ids"] = jagged.from_rows([torch.tensor([1]), torch.tensor([2, 3, 4])])
    check_columns(data, ["prompt_ids", *READS], "trainer")
