"""Batches on disk: what is written is read, and nothing else is taken for a batch."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from rlsys.batch import DataProto, jagged
from rlsys.batch.equality import deep_equal
from rlsys.config.errors import UserError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
OBJECTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.just("#"), inner, max_size=3)
        | st.dictionaries(st.integers() | st.booleans(), inner, max_size=2)
    ),
    max_leaves=6,
)


def cells(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def batch() -> DataProto:
    ids = jagged.from_rows([torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])])
    return DataProto.from_dict(
        {
            "ids": ids,
            "mask": jagged.from_values(torch.tensor([True, False, True]), offsets=jagged.offsets(ids)),
            "obs": torch.randn(3, 4).bfloat16(),
            "obs.values": torch.randn(6, 2)[::2],
        },
        {
            "task": cells([{"q": "37+05"}, None, ["x", 1.5]]),
            "n": np.arange(3, dtype=np.int16),
            "s": np.array(["a", "ü", ""]),
        },
        {"step": 3, "shape": (1, 2), "table": np.eye(2), "last": np.float32(1.5)},
    )


def assert_equal(left: DataProto, right: DataProto) -> None:
    assert deep_equal(dict(left.batch.items()), dict(right.batch.items()))
    assert deep_equal(left.non_tensor_batch, right.non_tensor_batch)
    assert deep_equal(left.meta_info, right.meta_info)


def test_a_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = batch()
    data.save_to_disk(tmp_path / "batch.safetensors")
    back = DataProto.load_from_disk(tmp_path / "batch.safetensors")
    assert_equal(back, data)
    assert type(back.meta_info["last"]) is np.float32
    assert jagged.lengths(back.batch["ids"] * back.batch["mask"]).tolist() == [2, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["batch.safetensors"]


@pytest.mark.parametrize(
    "data", [DataProto(), DataProto.from_dict(non_tensors={"a": ["x"]}), batch()[:0], DataProto(TensorDict({}, [5]))]
)
def test_batches_without_columns_or_rows(tmp_path: Path, data: DataProto) -> None:
    data.save(str(tmp_path / "b"))
    back = DataProto.load(str(tmp_path / "b"))
    assert len(back) == len(data)
    assert (back.batch is None) == (data.batch is None)
    assert deep_equal(back.non_tensor_batch, data.non_tensor_batch)


def test_parts_that_share_memory_are_written_once_each(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(6, 2)
    data = DataProto.from_dict({"a": whole[:3], "b": whole[3:], "c": whole[:3]})
    data.save(tmp_path / "b")
    assert_equal(DataProto.load(tmp_path / "b"), data)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OBJECTS, min_size=1, max_size=4))
def test_objects_come_back_with_their_types(tmp_path: Path, values: list[Any]) -> None:
    data = DataProto(non_tensor_batch={"x": cells(values)}, meta_info={"values": values})
    data.save(tmp_path / "b")
    back = DataProto.load(tmp_path / "b")
    assert deep_equal(back.non_tensor_batch["x"], data.non_tensor_batch["x"])
    assert deep_equal(back.meta_info, data.meta_info)


def test_arrays_within_objects(tmp_path: Path) -> None:
    values = [
        np.arange(3, dtype=np.uint8),
        np.float64(math.nan),
        cells([np.zeros((2, 0)), "x"]),
        np.array("s"),
        np.True_,
    ]
    DataProto(non_tensor_batch={"x": cells(values)}).save(tmp_path / "b")
    assert deep_equal(DataProto.load(tmp_path / "b").non_tensor_batch["x"], cells(values))


def test_every_buffer_is_readable_by_other_tools(tmp_path: Path) -> None:
    batch().save(tmp_path / "b.safetensors")
    buffers = load_file(tmp_path / "b.safetensors")
    assert buffers["values/ids"].tolist() == [1, 2, 3]
    assert buffers["offsets/0"].tolist() == [0, 2, 2, 3]
    assert buffers["dense/obs"].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", torch.zeros(1), [lambda: None], {"a": {"b": 1j}}])
def test_what_is_not_like_json_is_refused_by_column_and_row(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(UserError) as error:
        DataProto(non_tensor_batch={"task": cells(["fine", bad])}).save(tmp_path / "b")
    assert error.value.where == "column 'task', row 1"
    with pytest.raises(UserError) as error:
        DataProto(meta_info={"extra": bad}).save(tmp_path / "b")
    assert error.value.where == "meta_info 'extra'"
    assert not list(tmp_path.iterdir())


def test_an_object_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UserError, match="contains itself"):
        DataProto(non_tensor_batch={"x": cells([loop])}).save(tmp_path / "b")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    data = batch()
    data.save(tmp_path / "b")
    with pytest.raises(UserError):
        DataProto(meta_info={"x": object()}).save(tmp_path / "b")
    assert_equal(DataProto.load(tmp_path / "b"), data)
    with pytest.raises(UserError, match="could not be written"):
        data.save(tmp_path / "missing" / "b")


def test_every_truncation_and_every_edit_is_noticed(tmp_path: Path) -> None:
    batch().save(tmp_path / "b")
    content = (tmp_path / "b").read_bytes()
    damaged = tmp_path / "damaged"
    for cut in [0, 1, 7, 8, 50, len(content) // 2, len(content) - 1]:
        damaged.write_bytes(content[:cut])
        with pytest.raises(UserError) as error:
            DataProto.load(damaged)
        assert str(damaged) in str(error.value)
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 7):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            DataProto.load(damaged)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(pickle.dumps({"batch": 1}))
    with pytest.raises(UserError, match="no batch at all"):
        DataProto.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a batch"):
        DataProto.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"format": "rlsys.DataProto", "version": "99"})
    with pytest.raises(UserError, match="version 99"):
        DataProto.load(path)
    save_file({"weight": torch.zeros(2)}, path, {"format": "rlsys.DataProto", "version": "1"})
    with pytest.raises(UserError, match="does not fit"):
        DataProto.load(path)
    with pytest.raises(UserError, match="could not be read"):
        DataProto.load(tmp_path / "nowhere")
    with pytest.raises(UserError):
        DataProto.load(tmp_path)
