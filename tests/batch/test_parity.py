"""On dense columns DataProto does what verl's does: the same operations on both, the same columns after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.batch import proto as ours

theirs = pytest.importorskip("verl.protocol")

Step = tuple[str, list[int]]  # an operation's name, and numbers from which its arguments follow


def make(module: Any, count: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return module.DataProto.from_dict(
        tensors={
            "ids": torch.arange(count),
            "obs": torch.randn(count, 4, generator=generator),
            "half": torch.randn(count, 2, 2, generator=generator).bfloat16(),
        },
        non_tensors={
            "label": [f"row {i}" for i in range(count)],
            "task": [{"answer": i, "turns": [i]} for i in range(count)],
            "number": np.arange(count, dtype=np.int32),
        },
        meta_info={"step": 3, "metrics": {"loss": 0.5}},
    )


def assert_same(left: Any, right: Any) -> None:
    assert len(left) == len(right)
    assert list(left.batch.keys()) == list(right.batch.keys())
    assert left.batch.batch_size == right.batch.batch_size
    for key in right.batch.keys():  # noqa: SIM118 (a TensorDict iterates over rows)
        assert left.batch[key].dtype == right.batch[key].dtype
        torch.testing.assert_close(left.batch[key], right.batch[key], rtol=0, atol=0)
    assert left.non_tensor_batch.keys() == right.non_tensor_batch.keys()
    for key, array in right.non_tensor_batch.items():
        assert left.non_tensor_batch[key].dtype == array.dtype
        np.testing.assert_array_equal(left.non_tensor_batch[key], array)
    assert left.meta_info == right.meta_info


def _rows(data: Any, dice: list[int]) -> list[int]:
    return [value % (2 * len(data)) - len(data) for value in dice[: 1 + dice[0] % 7]]


def _mask(data: Any, dice: list[int]) -> list[bool]:
    return [bool((dice[i % 8] >> i % 5) & 1) or i == 0 for i in range(len(data))]


def _permutation(data: Any, dice: list[int]) -> torch.Tensor:
    return torch.randperm(len(data), generator=torch.Generator().manual_seed(dice[0]))


def _divisor(data: Any, dice: list[int]) -> int:
    divisors = [n for n in range(1, len(data) + 1) if len(data) % n == 0]
    return divisors[dice[0] % len(divisors)]


def _union(module: Any, data: Any, dice: list[int]) -> Any:
    other = module.DataProto.from_dict(
        {"ids": data.batch["ids"].clone(), f"more{dice[0]}": torch.zeros(len(data))},
        {"label": data.non_tensor_batch["label"].copy()},
        {f"fact{dice[1]}": [1.0]},
    )
    return data.union(other)


def _pop_and_return(module: Any, data: Any, dice: list[int]) -> Any:
    popped = data.pop(batch_keys=["obs"], non_tensor_batch_keys=["task"], meta_info_keys=["step"])
    return data.union(popped)


def _fold(module: Any, data: Any, dice: list[int]) -> Any:
    folded = module.fold_batch_dim(data, _divisor(data, dice))
    folded.reorder(_permutation(folded, dice))
    return module.unfold_batch_dim(folded, 2)


def _concat_chunks(module: Any, data: Any, dice: list[int]) -> Any:
    data = data.select(meta_info_keys=["step"])
    return module.DataProto.concat(data.chunk(_divisor(data, dice))[::-1])


def _pad(module: Any, data: Any, dice: list[int]) -> Any:
    data = data.select(meta_info_keys=["step"])
    padded, size = module.pad_dataproto_to_divisor(data, 1 + dice[0] % 9)
    return padded if dice[1] % 2 else module.unpad_dataproto(padded, size)


def _padding(module: Any, data: Any, dice: list[int]) -> Any:
    data = data.select(meta_info_keys=["step"])
    data.padding(dice[0] % 4, ["first", "last", ""][dice[1] % 3])
    return data


def _reorder(module: Any, data: Any, dice: list[int]) -> Any:
    data.reorder(_permutation(data, dice))
    return data


def _through_pickle(module: Any, data: Any, dice: list[int]) -> Any:
    state = data.__getstate__()
    copy = module.DataProto.__new__(module.DataProto)
    copy.__setstate__(state)
    return copy


def _iterate(module: Any, data: Any, dice: list[int]) -> Any:
    # verl collates cells into object arrays, and lists of one length into more dimensions: look at plain columns
    data = data.select(non_tensor_batch_keys=["label"], meta_info_keys=["step"])
    loader = data.make_iterator(_divisor(data, dice), 2, seed=dice[1], dataloader_kwargs={"shuffle": bool(dice[2] % 2)})
    return module.DataProto.concat(list(loader))


_OPERATIONS: dict[str, Callable[[Any, Any, list[int]], Any]] = {
    "select_idxs list": lambda m, d, dice: d.select_idxs(_rows(d, dice)),
    "select_idxs numpy": lambda m, d, dice: d[np.array(_rows(d, dice))],
    "select_idxs torch": lambda m, d, dice: d[torch.tensor(_rows(d, dice))],
    "select_idxs mask": lambda m, d, dice: d[_mask(d, dice)],
    "slice": lambda m, d, dice: d[: 1 + dice[0] % len(d)],
    "slice with a step": lambda m, d, dice: d[dice[0] % len(d) :: 1 + dice[1] % 3],
    "chunk": lambda m, d, dice: d.chunk(_divisor(d, dice))[0],
    "split": lambda m, d, dice: d.split(1 + dice[0] % len(d))[-1],
    "concat": _concat_chunks,
    "concat metrics": lambda m, d, dice: m.DataProto.concat([d[:1], d]),
    "repeat": lambda m, d, dice: d.repeat(1 + dice[0] % 2, interleave=bool(dice[1] % 2)),
    "sample_level_repeat": lambda m, d, dice: d.sample_level_repeat([1 + dice[i % 8] % 2 for i in range(len(d))]),
    "unfold_column_chunks": lambda m, d, dice: (
        d.unfold_column_chunks(2, split_keys=["obs"]).select().repeat(1) if d.batch["obs"].shape[1] == 4 else d
    ),
    "select": lambda m, d, dice: d.select(
        ["ids", "obs", "half"], ["label", "task"], ["step"], deepcopy=bool(dice[0] % 2)
    ),
    "rename": lambda m, d, dice: d.rename("half", "tmp").rename(["tmp"], ["half"]),
    "union": _union,
    "pop": _pop_and_return,
    "fold": _fold,
    "pad to a divisor": _pad,
    "padding": _padding,
    "reorder": _reorder,
    "state": _through_pickle,
    "make_iterator": _iterate,
    "to": lambda m, d, dice: d.to("cpu"),
}


def _outcome(module: Any, steps: list[Step], count: int, seed: int) -> Any:
    data = make(module, count, seed)
    for name, dice in steps:
        if len(data) > 200:
            break
        try:
            data = _OPERATIONS[name](module, data, dice)
            if data.batch is not None:
                data.batch.unlock_()  # verl's copy of a received batch stays locked, and cannot be changed
        except (AssertionError, KeyError) as error:
            return type(error).__mro__[-3:]
    return data


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_OPERATIONS)), st.lists(st.integers(0, 1000), min_size=8, max_size=8)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_sequences_of_operations_agree(steps: list[Step], count: int, seed: int) -> None:
    expected = _outcome(theirs, steps, count, seed)
    result = _outcome(ours, steps, count, seed)
    if isinstance(expected, tuple):
        assert isinstance(result, tuple), f"verl refuses this: {expected}"
        return
    assert not isinstance(result, tuple), f"verl does this, and here it is refused: {result}"
    assert_same(result, expected)


@pytest.mark.parametrize("name", sorted(_OPERATIONS))
def test_each_operation_agrees(name: str) -> None:
    dice = [5, 3, 1, 4, 2, 6, 9, 8]
    assert_same(_OPERATIONS[name](ours, make(ours, 6, 0), dice), _OPERATIONS[name](theirs, make(theirs, 6, 0), dice))


@pytest.mark.parametrize("count", [5, 6, 7])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_auto_padded_chunks_agree(count: int, chunks: int) -> None:
    columns = {"a": torch.arange(count)}
    result = ours.DataProto.from_dict(columns, auto_padding=True).chunk(chunks)
    expected = theirs.DataProto.from_dict(columns, auto_padding=True).batch.chunk(chunks)
    assert [len(part) for part in result][: len(expected)] == [part.batch_size[0] for part in expected]
    assert sum(len(part) for part in result) == count
    assert len(result) == chunks


def test_tensordicts_are_exchanged_with_verl() -> None:
    data = make(ours, 4, 1)
    back = theirs.DataProto.from_tensordict(data.to_tensordict())
    assert_same(ours.DataProto.from_tensordict(make(theirs, 4, 1).to_tensordict()), back)


def test_every_public_operation_of_verl_is_there() -> None:
    operations = {name for name in vars(theirs.DataProto) if not name.startswith("_")}
    assert operations <= set(dir(ours.DataProto))


def test_data_info_reads_the_same() -> None:
    info = {"a": [1, "x"], "b": {"k": (1, 2.0)}, "c": np.zeros(2), "d": {}, "e": []}
    left, right = make(ours, 3, 0), make(theirs, 3, 0)
    left.meta_info, right.meta_info = info | {"a": [1]}, info | {"a": [1]}
    assert left.get_data_info() == right.get_data_info()
