"""A batch crosses process borders as a small message and raw buffers, and arrives as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from rlsys.batch import DataProto, jagged
from rlsys.batch.equality import deep_equal
from rlsys.batch.proto import (
    deserialize_single_tensor,
    deserialize_tensordict,
    serialize_single_tensor,
    serialize_tensordict,
)

DTYPES = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool, torch.complex64]


def mixed_batch(count: int = 3) -> DataProto:
    lengths = torch.arange(count)
    total = int(lengths.sum())
    ids = jagged.from_values(torch.arange(total), lengths)
    return DataProto.from_dict(
        {
            "ids": ids,
            "logprobs": jagged.from_values(torch.linspace(-1, 0, total), offsets=jagged.offsets(ids)),
            "hidden": jagged.from_values(torch.ones(2 * count, 4), torch.full((count,), 2)),
            "reward": torch.arange(count).float(),
            "scalar": torch.tensor(2.5).expand(count),
        },
        {"task": [{"answer": [i, None]} for i in range(count)], "number": np.arange(count)},
        {"step": 7},
    )


def assert_equal(left: DataProto, right: DataProto) -> None:
    assert deep_equal(dict(left.batch.items()), dict(right.batch.items()))
    assert deep_equal(left.non_tensor_batch, right.non_tensor_batch)
    assert left.meta_info == right.meta_info
    assert len(left) == len(right)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_keeps_everything(protocol: int) -> None:
    data = mixed_batch()
    back = pickle.loads(pickle.dumps(data, protocol=protocol))  # noqa: S301
    assert_equal(back, data)
    assert back.batch.device is None


@pytest.mark.parametrize(
    "data",
    [
        DataProto(),
        DataProto.from_dict(non_tensors={"label": ["a", "b"]}),
        DataProto(batch=TensorDict({}, batch_size=[4])),
        mixed_batch(0),
        mixed_batch(4)[::2],
        mixed_batch(4)[1:2],
    ],
)
def test_small_and_cut_batches_cross_too(data: DataProto) -> None:
    back = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert len(back) == len(data)
    assert (back.batch is None) == (data.batch is None)
    if data.batch is not None:
        assert_equal(back, data)


def test_columns_travel_out_of_band() -> None:
    data = DataProto.from_dict(
        {"dense": torch.zeros(100, 1000), "jagged": jagged.from_values(torch.zeros(50_000), torch.full((100,), 500))},
        {"number": np.zeros((100, 10))},
    )
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    assert len(message) < 2000
    assert sum(len(buffer.raw()) for buffer in buffers) == 100 * 1000 * 4 + 50_000 * 4 + 101 * 8 + 100 * 10 * 8
    assert data.nbytes == 100 * 1000 * 4 + 50_000 * 4 + 100 * 10 * 8
    back = pickle.loads(message, buffers=buffers)  # noqa: S301
    assert back.batch["dense"].data_ptr() == data.batch["dense"].data_ptr()
    assert jagged.values(back.batch["jagged"]).data_ptr() == jagged.values(data.batch["jagged"]).data_ptr()


def test_a_part_does_not_take_the_whole_along() -> None:
    part = DataProto.from_dict({"a": torch.zeros(1000, 100)}).chunk(100)[3]
    assert len(pickle.dumps(part)) < 10 * 100 * 4 + 1000


def test_read_only_buffers_are_shared_without_a_warning() -> None:
    data = mixed_batch()
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    frozen = [bytes(buffer.raw()) for buffer in buffers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = pickle.loads(message, buffers=frozen)  # noqa: S301
    assert_equal(back, data)


def test_a_deep_copy_may_be_written_to() -> None:
    data = mixed_batch()
    own = copy.deepcopy(data)
    own.batch["reward"] += 1
    jagged.values(own.batch["ids"]).add_(1)
    own.non_tensor_batch["task"][0]["answer"] = "new"
    assert_equal(data, mixed_batch())


def test_columns_that_share_offsets_still_do() -> None:
    back = pickle.loads(pickle.dumps(mixed_batch()))  # noqa: S301
    combined = back.batch["ids"] + back.batch["logprobs"]
    assert jagged.lengths(combined).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
def test_tensors_of_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    back = deserialize_single_tensor(serialize_single_tensor(tensor))
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.to(torch.complex64), tensor.to(torch.complex64))


def test_views_with_odd_strides_are_serialised() -> None:
    for tensor in (torch.arange(9).view(3, 3).T, torch.arange(6)[::2], torch.arange(1)[::2], torch.zeros(1).expand(4)):
        assert torch.equal(deserialize_single_tensor(serialize_single_tensor(tensor)), tensor)


def test_a_deserialised_tensor_has_memory_of_its_own() -> None:
    tensor = torch.zeros(3)
    back = deserialize_single_tensor(serialize_single_tensor(tensor))
    back += 1
    assert tensor.tolist() == [0, 0, 0]


def test_nested_tensors_of_every_layout() -> None:
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    ragged_last = torch.nested.nested_tensor_from_jagged(torch.randn(4, 7), torch.tensor([0, 2, 7]), jagged_dim=2)
    batch = TensorDict(
        {
            "strided": torch.nested.as_nested_tensor([rows[0], rows[1].T]),
            "jagged": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
            "ragged_last": ragged_last,
            "inner": TensorDict({"a": torch.zeros(2, 1)}, batch_size=[2]),
        },
        batch_size=[2],
    )
    back = deserialize_tensordict(serialize_tensordict(batch))
    for key in ("strided", "jagged", "ragged_last"):
        assert back[key].layout == batch[key].layout
        for left, right in zip(back[key].unbind(), batch[key].unbind(), strict=True):
            assert torch.equal(left, right)
    assert torch.equal(back["inner", "a"], batch["inner", "a"])


def test_a_foreign_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or 3 parts"):
        deserialize_tensordict(((1,), None, {"a": ("int64",)}))
    with pytest.raises(TypeError, match="dtype"):
        deserialize_single_tensor(("nn", (1,), b"\0"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rays_object_store_shares_the_memory() -> None:
    ray = pytest.importorskip("ray")
    data = mixed_batch(64)
    data.batch["large"] = torch.randn(64, 4096)
    reference = ray.put(data)
    first, second = ray.get(reference), ray.get(reference)
    assert_equal(first, data)
    assert first.batch["large"].data_ptr() == second.batch["large"].data_ptr()
    assert jagged.values(first.batch["logprobs"]).data_ptr() == jagged.values(second.batch["logprobs"]).data_ptr()

    @ray.remote
    def rows(batch: DataProto) -> Any:
        return batch.select_idxs([5, 1])

    assert_equal(ray.get(rows.remote(reference)), data.select_idxs([5, 1]))
