"""DataProto: every operation on jagged columns, on batches without tensors, and on input that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from rlsys.batch import (
    BatchError,
    DataProto,
    DataProtoConfig,
    DataProtoItem,
    collate_fn,
    fold_batch_dim,
    jagged,
    pad_dataproto_to_divisor,
    unfold_batch_dim,
    unpad_dataproto,
)

Row = tuple[int, list[int], list[float], list[list[int]], str]


def make(lengths: list[int], *, tensors: bool = True) -> DataProto:
    """A batch whose every row is told apart by all of its columns."""
    count = len(lengths)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    ids = jagged.from_values(torch.arange(sum(lengths)), sizes)
    columns = {
        "index": torch.arange(count),
        "ids": ids,
        "logprobs": jagged.from_values(-jagged.values(ids).float(), offsets=jagged.offsets(ids)),
        "pairs": jagged.from_values(torch.arange(4 * count).view(-1, 2), torch.full((count,), 2)),
    }
    return DataProto.from_dict(columns if tensors else None, {"name": [f"row {i}" for i in range(count)]}, {"step": 1})


def rows_of(data: DataProto) -> list[Row]:
    batch = data.batch
    columns = ([row.tolist() for row in jagged.to_rows(batch[key])] for key in ("ids", "logprobs", "pairs"))
    return list(zip(batch["index"].tolist(), *columns, data.non_tensor_batch["name"].tolist(), strict=True))


LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(LENGTHS, st.data())
def test_rows_are_taken_together_over_all_columns(lengths: list[int], data: st.DataObject) -> None:
    batch, rows, count = make(lengths), rows_of(make(lengths)), len(lengths)
    chosen = data.draw(st.lists(st.integers(-count, count - 1), max_size=8))
    for form in (list, np.array, torch.tensor):
        if chosen:
            assert rows_of(batch[form(chosen)]) == [rows[i] for i in chosen]
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    assert rows_of(batch[np.array(mask)]) == [row for row, wanted in zip(rows, mask, strict=True) if wanted]
    where = data.draw(st.slices(count))
    assert rows_of(batch[where]) == rows[where]
    times = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    assert rows_of(batch.sample_level_repeat(times)) == [r for r, n in zip(rows, times, strict=True) for _ in range(n)]
    order = data.draw(st.permutations(range(count)))
    batch.reorder(torch.tensor(order))
    assert rows_of(batch) == [rows[i] for i in order]


@given(LENGTHS, st.integers(1, 7))
def test_cutting_and_joining(lengths: list[int], size: int) -> None:
    batch, rows = make(lengths), rows_of(make(lengths))
    assert rows_of(DataProto.concat(batch.split(size))) == rows
    assert [rows_of(part) for part in batch.split(size)] == [rows[i : i + size] for i in range(0, len(rows), size)]
    padded, missing = pad_dataproto_to_divisor(batch, size)
    assert len(padded) % size == 0
    assert rows_of(padded) == [rows[i % len(rows)] for i in range(len(rows) + missing)]
    assert rows_of(unpad_dataproto(padded, missing)) == rows
    assert rows_of(DataProto.concat(padded.chunk(size))) == rows_of(padded)
    assert rows_of(batch.repeat(2)) == [row for row in rows for _ in range(2)]
    assert rows_of(batch.repeat(2, interleave=False)) == rows * 2


@settings(max_examples=20)
@given(LENGTHS)
def test_single_rows_collate_into_the_batch(lengths: list[int]) -> None:
    batch = make(lengths)
    items = [batch[i] for i in range(len(lengths))]
    assert all(isinstance(item, DataProtoItem) for item in items)
    assert items[-1].batch["ids"].tolist() == rows_of(batch)[-1][1]
    assert rows_of(collate_fn(items)) == rows_of(batch)
    assert rows_of(collate_fn(list(batch))) == rows_of(batch)


@pytest.mark.parametrize("shuffle", [False, True])
def test_mini_batches_cover_each_epoch(shuffle: bool) -> None:
    batch = make([1, 0, 3, 2, 4, 1])
    mini_batches = list(batch.make_iterator(2, epochs=2, seed=3, dataloader_kwargs={"shuffle": shuffle}))
    assert len(mini_batches) == 6
    assert all(mini_batch.meta_info == {"step": 1} for mini_batch in mini_batches)
    for epoch in (mini_batches[:3], mini_batches[3:]):
        assert sorted(rows_of(DataProto.concat(epoch))) == sorted(rows_of(batch))


def test_columns_of_equal_lengths_share_offsets_after_every_operation() -> None:
    batch = make([2, 0, 3, 1])
    for part in (batch[[3, 0]], batch[1:3], batch[::2], batch.repeat(2), DataProto.concat([batch, batch])):
        total = part.batch["ids"] + part.batch["logprobs"]  # torch refuses this for other offsets
        assert jagged.values(total).abs().sum() == 0


def test_jagged_columns_unfold_into_equal_parts() -> None:
    ids = jagged.from_rows([torch.arange(4), torch.arange(2)])
    data = DataProto.from_dict({"ids": ids, "k": torch.arange(2)}, {"n": ["a", "b"]})
    unfolded = data.unfold_column_chunks(2, split_keys=["ids"])
    assert [row.tolist() for row in jagged.to_rows(unfolded.batch["ids"])] == [[0, 1], [2, 3], [0], [1]]
    assert unfolded.batch["k"].tolist() == [0, 0, 1, 1]
    assert unfolded.non_tensor_batch["n"].tolist() == ["a", "a", "b", "b"]
    assert list(unfolded.batch.keys()) == ["ids", "k"]
    with pytest.raises(BatchError, match="do not divide"):
        data.unfold_column_chunks(4, split_keys=["ids"])


def test_columns_move_with_jagged_ones_among_them() -> None:
    batch = make([1, 2])
    popped = batch.pop(["ids"], ["name"])
    assert set(batch.batch.keys()) == {"index", "logprobs", "pairs"}
    assert len(batch) == 2
    batch.union(popped)
    assert rows_of(batch) == rows_of(make([1, 2]))
    assert rows_of(batch.union(make([1, 2]))) == rows_of(make([1, 2]))
    batch.rename(["ids", "index"], ["index", "ids"])
    assert jagged.is_jagged(batch.batch["index"])
    assert list(batch.select(["ids"], []).batch.keys()) == ["ids"]
    with pytest.raises(AssertionError, match="ids"):
        make([1, 2]).union(make([2, 1]))


def test_nested_tensors_of_other_layouts_follow_their_rows() -> None:
    parts = [torch.full((2, i + 1), float(i)) for i in range(3)]
    ragged_last = torch.nested.nested_tensor_from_jagged(torch.cat(parts, 1), torch.tensor([0, 1, 3, 6]), jagged_dim=2)
    data = DataProto.from_dict({"last": ragged_last, "strided": torch.nested.as_nested_tensor(parts)})
    for part in (data[[2, 0]], data[::2][[1, 0]], DataProto.concat([data[2:], data[:1]])):
        for key in ("last", "strided"):
            assert part.batch[key].layout == data.batch[key].layout
            assert [row.tolist() for row in part.batch[key].unbind()] == [parts[2].tolist(), parts[0].tolist()]


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        (lambda d: d[[2, 0]], [2, 0]),
        (lambda d: d[np.array([True, False, True])], [0, 2]),
        (lambda d: d[1:], [1, 2]),
        (lambda d: d.repeat(2), [0, 0, 1, 1, 2, 2]),
        (lambda d: d.sample_level_repeat((0, 1, 2)), [1, 2, 2]),
        (lambda d: DataProto.concat(d.chunk(3)), [0, 1, 2]),
        (lambda d: DataProto.concat(d.split(2)), [0, 1, 2]),
        (lambda d: d.select(), [0, 1, 2]),
        (lambda d: d.to("cpu"), [0, 1, 2]),
        (lambda d: d.union(DataProto(meta_info={"x": 1})), [0, 1, 2]),
        (lambda d: d.pop(non_tensor_batch_keys=["name"]), [0, 1, 2]),
        (lambda d: d.unfold_column_chunks(2), [0, 0, 1, 1, 2, 2]),
        (lambda d: pad_dataproto_to_divisor(d, 2)[0], [0, 1, 2, 0]),
        (lambda d: unfold_batch_dim(fold_batch_dim(d, 3)), [0, 1, 2]),
        (lambda d: next(d.make_iterator(3, 1)), [0, 1, 2]),
        (lambda d: collate_fn([d[2], d[1]]), [2, 1]),
        (lambda d: DataProto.from_tensordict(d.to_tensordict()), [0, 1, 2]),
        (lambda d: d.to_padded(), [0, 1, 2]),
    ],
)
def test_batches_without_tensors(operation: Callable[[DataProto], DataProto], names: list[int]) -> None:
    result = operation(make([1, 2, 3], tensors=False))
    assert result.batch is None
    assert result.non_tensor_batch["name"].tolist() == [f"row {i}" for i in names]
    assert len(result) == len(names)


def test_in_place_operations_without_tensors() -> None:
    data = make([1, 2], tensors=False)
    data.padding(2, "first")
    data.reorder([3, 1, 0, 2])
    assert data.non_tensor_batch["name"].tolist() == ["row 0", "row 1", "row 0", "row 0"]
    assert "name: ndarray(4,)" in data.get_data_info()
    assert len(data.union(DataProto.from_dict({"a": torch.zeros(4)})).batch["a"]) == 4


def test_a_batch_without_rows_goes_through_everything() -> None:
    empty = make([1, 2])[:0]
    for result in (
        empty.repeat(3),
        empty[[]],
        empty.select_idxs(torch.tensor([], dtype=torch.int64)),
        empty.chunk(2)[1],
    ):
        assert rows_of(result) == []
    assert empty.split(4) == []
    assert rows_of(DataProto.concat([empty, make([2]), empty])) == rows_of(make([2]))
    assert pad_dataproto_to_divisor(empty, 4) == (empty, 0)
    assert len(DataProto()) == len(DataProto.concat([])) == len(DataProto.concat([DataProto(), DataProto()])) == 0
    idle = DataProto(meta_info={"rank": 1})
    joined = DataProto.concat([idle, make([2]), idle])
    assert rows_of(joined) == rows_of(make([2]))
    assert joined.meta_info == {"rank": 1, "step": 1}


def test_object_cells_may_be_lists_and_dicts() -> None:
    data = DataProto.from_dict(non_tensors={"turns": [[], [0.5], [0.8, 0.9]], "task": [{"a": [1]}, {"a": [2]}, {}]})
    joined = DataProto.concat([data[[1]], data[[2, 0]]])
    assert joined.non_tensor_batch["turns"].tolist() == [[0.5], [0.8, 0.9], []]
    assert joined.non_tensor_batch["task"].tolist() == [{"a": [2]}, {}, {"a": [1]}]


def test_lists_that_happen_to_be_of_one_length_still_join_others() -> None:
    even = DataProto.from_dict(non_tensors={"turns": [[1, 2], [3, 4]]})
    uneven = DataProto.from_dict(non_tensors={"turns": [[5], [6, 7]]})
    assert DataProto.concat([even, uneven]).non_tensor_batch["turns"].tolist() == [[1, 2], [3, 4], [5], [6, 7]]
    arrays = DataProto.from_dict(non_tensors={"image": [np.zeros((2, 3)), np.zeros((2, 4))]})
    assert [cell.shape for cell in arrays.non_tensor_batch["image"]] == [(2, 3), (2, 4)]
    with pytest.raises(BatchError, match="different shapes"):
        DataProto.concat([DataProto.from_dict(non_tensors={"x": np.zeros(shape)}) for shape in ((1, 2), (1, 3))])


def test_metrics_of_several_workers_become_lists() -> None:
    infos: list[dict[str, Any]] = [
        {"metrics": [{"loss": 1.0}, {"loss": 2.0}], "step": 1},
        {"step": 1},
        {"metrics": {"loss": 3.0}},
    ]
    parts = [DataProto.from_dict({"a": torch.zeros(1)}, meta_info=info) for info in infos]
    assert DataProto.concat(parts).meta_info == {"step": 1, "metrics": {"loss": [1.0, 2.0, 3.0]}}
    parts[2].meta_info["metrics"] = {"entropy": 1.0}
    with pytest.raises(BatchError, match="entropy"):
        DataProto.concat(parts)


def test_facts_may_be_arrays() -> None:
    fact = {"table": np.array([1.0, np.nan])}
    parts = [DataProto.from_dict({"a": torch.zeros(1)}, meta_info={"table": fact["table"].copy()}) for _ in range(2)]
    np.testing.assert_array_equal(DataProto.concat(parts).meta_info["table"], fact["table"])
    parts[0].union(DataProto(meta_info=fact))
    with pytest.raises(AssertionError, match="Conflicting values for meta_info key 'table'"):
        DataProto.concat([parts[0], DataProto.from_dict({"a": torch.zeros(1)}, meta_info={"table": np.zeros(2)})])


def _refused(call: Callable[[], Any], *errors: type[Exception], match: str) -> None:
    with pytest.raises(errors, match=match):
        call()


def test_what_does_not_fit_is_refused() -> None:
    data = make([1, 2])
    _refused(lambda: DataProto.from_dict({"a": torch.zeros(2), "b": torch.zeros(3)}), AssertionError, match="'b' has")
    _refused(lambda: DataProto.from_dict({"a": torch.zeros(2)}, {"n": ["x"]}), AssertionError, match="column 'n'")
    _refused(lambda: DataProto(non_tensor_batch={"n": [1]}), AssertionError, match="no NumPy array")
    _refused(lambda: DataProto(non_tensor_batch={"n": np.zeros(2), "m": np.zeros(3)}), AssertionError, match="'m'")
    _refused(lambda: DataProto(TensorDict({}, [2, 2])), AssertionError, match="one batch dimension")
    _refused(lambda: DataProto.from_single_dict({"a": [1]}), ValueError, match="column 'a'")
    _refused(lambda: DataProto.from_dict({}, num_batch_dims=0), AssertionError, match="num_batch_dims")
    _refused(lambda: DataProto.from_dict({}, {"n": ["x"]}, num_batch_dims=2), AssertionError, match="num_batch_dims")
    _refused(lambda: data.chunk(3), AssertionError, match="2 rows do not divide into 3")
    _refused(lambda: data["ids"], TypeError, match="by a str")
    _refused(lambda: data[2], IndexError, match="row 2 of 2")
    _refused(lambda: data[[0, 2]], IndexError, match="row 2")
    _refused(lambda: data[np.array([True])], IndexError, match="mask")
    _refused(lambda: DataProto()[0], IndexError, match="row 0 of 0")
    _refused(lambda: data.select(["nothing"]), KeyError, match="nothing")
    _refused(lambda: DataProto().select(["nothing"]), KeyError, match="nothing")
    _refused(lambda: data.rename("nothing", "x"), KeyError, match="nothing")
    _refused(lambda: data.rename(["ids"], ["x", "y"]), ValueError, match="1 columns cannot have 2")
    _refused(lambda: data.rename(("ids",), ["x"]), TypeError, match="by a tuple")
    _refused(lambda: data.sample_level_repeat([1]), AssertionError, match="has shape")
    _refused(lambda: data.sample_level_repeat(2), AssertionError, match="not a int")
    _refused(lambda: data.make_iterator(3, 1), AssertionError, match="2 % 3")
    _refused(lambda: fold_batch_dim(data, 2), AssertionError, match="jagged")
    _refused(lambda: fold_batch_dim(data, 3), AssertionError, match="do not fold")
    _refused(lambda: DataProto.concat([data, data.select(["ids"])]), AssertionError, match="not in all")
    _refused(lambda: DataProto.concat([data, data.select(None, [])]), AssertionError, match="object column 'name'")
    _refused(lambda: DataProto.concat([data, make([1], tensors=False)]), AssertionError, match="some have none")
    _refused(lambda: pad_dataproto_to_divisor([1], 2), AssertionError, match="DataProto")


def test_a_column_cannot_be_jagged_here_and_dense_there() -> None:
    jagged_one = DataProto.from_dict({"a": jagged.from_rows([torch.zeros(2)])})
    with pytest.raises(BatchError, match="'a' is jagged in one batch and dense in another"):
        DataProto.concat([jagged_one, DataProto.from_dict({"a": torch.zeros(1, 2)})])


def test_what_fails_changes_nothing() -> None:
    data = make([1, 2])
    with pytest.raises(BatchError):
        data.pop(["ids"], ["name"], ["nothing"])
    with pytest.raises(BatchError, match="2 rows cannot take columns of 3"):
        data.union(make([1, 2, 3]))
    other = DataProto.from_dict({"new": torch.zeros(2)}, {"name": ["other", "row 1"]}, {"fact": 1})
    with pytest.raises(BatchError, match="`name`"):
        data.union(other)
    assert rows_of(data) == rows_of(make([1, 2]))
    assert "new" not in data.batch.keys()  # noqa: SIM118 (a TensorDict iterates over rows)
    assert data.meta_info == {"step": 1}


def test_the_input_is_left_alone() -> None:
    names = {"name": ["a", "b"]}
    DataProto.from_dict(non_tensors=names)
    assert names == {"name": ["a", "b"]}
    data = DataProto.from_dict({"a": torch.arange(4)}, {"n": ["a", "b", "c", "d"]})
    unfold_batch_dim(fold_batch_dim(data, 2))
    assert data.non_tensor_batch["n"].shape == (4,)
    assert data.batch.batch_size == (4,)


def test_auto_padding_is_asked_of_the_batch_and_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataProto.from_dict({"a": torch.arange(5)}, {"n": list("abcde")})
    assert not data.is_padding_enabled()
    monkeypatch.setattr(DataProtoConfig, "auto_padding", True)
    parts = data.chunk(4)
    assert [len(part) for part in parts] == [2, 2, 1, 0]
    assert [len(part.non_tensor_batch["n"]) for part in parts] == [2, 2, 1, 0]
    monkeypatch.setattr(DataProtoConfig, "auto_padding", False)
    assert DataProto.from_single_dict({"a": torch.zeros(3)}, auto_padding=True).is_padding_enabled()


def test_sizes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    data = make([1, 3])
    assert data.nbytes == 2 * 8 + 4 * 8 + 4 * 4 + 8 * 8 + 2 * 8
    data.print_size(prefix="rollout")
    assert capsys.readouterr().out.startswith("rollout, tensor columns: 0.000000 GiB")
    assert "ids: (2, j" in data.get_data_info()


def test_a_tensordict_holds_all_and_gives_it_back() -> None:
    data = make([1, 0, 2])
    back = DataProto.from_tensordict(data.to_tensordict())
    assert rows_of(back) == rows_of(data)
    assert back.meta_info == data.meta_info
    with pytest.raises(AssertionError, match="'ids'"):
        DataProto.from_dict({"ids": torch.zeros(1)}, meta_info={"ids": 1}).to_tensordict()
    assert len(DataProto.from_tensordict(data[:0].to_tensordict())) == 0


def test_subclasses_stay_what_they_are() -> None:
    class Experience(DataProto):
        pass

    data = Experience.from_dict({"a": torch.arange(4)})
    for part in (data[:2], data[[0]], data.select(), data.repeat(2), data.pop(["a"]), Experience.concat([data, data])):
        assert type(part) is Experience
