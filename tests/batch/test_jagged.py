"""Jagged columns behave as lists of rows do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batch import jagged

LENGTHS = st.lists(st.integers(0, 5), max_size=7)


def column_of(lengths: list[int], *, width: int | None = None) -> torch.Tensor:
    count = sum(lengths) * (width or 1)
    values = torch.arange(count, dtype=torch.int64)
    return jagged.from_values(
        values if width is None else values.view(-1, width), torch.tensor(lengths, dtype=torch.int64)
    )


def rows_of(column: torch.Tensor) -> list[list]:
    return [row.tolist() for row in jagged.to_rows(column)]


@given(LENGTHS)
def test_rows_survive_the_way_in_and_out(lengths: list[int]) -> None:
    rows = [torch.full((n,), i) for i, n in enumerate(lengths)]
    column = jagged.from_rows(rows, dtype=torch.int64)
    assert jagged.is_jagged(column)
    assert column.dtype == torch.int64
    assert jagged.lengths(column).tolist() == lengths
    assert jagged.num_rows(column) == len(lengths)
    assert rows_of(column) == [row.tolist() for row in rows]


@given(LENGTHS, st.data())
def test_selection_is_that_of_the_list_of_rows(lengths: list[int], data: st.DataObject) -> None:
    column, count = column_of(lengths, width=data.draw(st.sampled_from([None, 2]))), len(lengths)
    indices = data.draw(st.lists(st.integers(-count, count - 1), max_size=9) if count else st.just([]))
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    rows = rows_of(column)
    assert rows_of(jagged.select_rows(column, indices)) == [rows[i] for i in indices]
    assert rows_of(jagged.select_rows(column, torch.tensor(mask, dtype=torch.bool))) == [
        row for row, wanted in zip(rows, mask, strict=True) if wanted
    ]


@given(LENGTHS, st.integers(0, 7), st.integers(0, 7))
def test_a_slice_is_a_view_of_the_same_rows(lengths: list[int], start: int, stop: int) -> None:
    column = column_of(lengths)
    start, stop = min(start, len(lengths)), min(stop, len(lengths))
    part = jagged.slice_rows(column, start, max(start, stop))
    assert rows_of(part) == rows_of(column)[start : max(start, stop)]
    assert jagged.values(part).untyped_storage().data_ptr() == jagged.values(column).untyped_storage().data_ptr()


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_concatenation_joins_the_lists(parts: list[list[int]]) -> None:
    columns = [column_of(lengths) for lengths in parts]
    assert rows_of(jagged.concat(columns)) == [row for column in columns for row in rows_of(column)]


@given(LENGTHS, st.integers(0, 3), st.booleans())
def test_repeat(lengths: list[int], times: int, interleave: bool) -> None:
    rows = rows_of(column_of(lengths))
    expected = [row for row in rows for _ in range(times)] if interleave else rows * times
    assert rows_of(jagged.repeat(column_of(lengths), times, interleave=interleave)) == expected


@given(LENGTHS, st.integers(0, 2), st.sampled_from(["left", "right"]), st.sampled_from([None, 3]))
def test_padding_is_undone_by_the_lengths(lengths: list[int], spare: int, side: jagged.Side, width: int | None) -> None:
    column = column_of(lengths, width=width)
    dense = jagged.pad(column, -7, length=max(lengths, default=0) + spare, side=side)
    assert dense.shape[:2] == (len(lengths), max(lengths, default=0) + spare)
    assert int((dense == -7).sum()) == dense.numel() - jagged.values(column).numel()
    assert jagged.equal(jagged.unpad(dense, jagged.lengths(column), side=side), column)


@given(LENGTHS)
def test_segment_sums(lengths: list[int]) -> None:
    column = column_of(lengths)
    assert jagged.segment_sum(column).tolist() == [sum(row) for row in rows_of(column)]
    mask = jagged.from_values(jagged.values(column) % 2 == 0, jagged.lengths(column))
    assert jagged.segment_sum(mask).tolist() == [sum(v % 2 == 0 for v in row) for row in rows_of(column)]


def test_values_are_shared_and_carry_gradients() -> None:
    values = torch.ones(3, requires_grad=True)
    column = jagged.from_values(values, [1, 2])
    jagged.values(jagged.select_rows(column, [1, 1])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 2]
    assert jagged.values(column).data_ptr() == values.data_ptr()


def test_columns_over_one_offsets_tensor_can_be_combined() -> None:
    first = column_of([2, 0, 1])
    second = jagged.from_values(jagged.values(first) * 10, offsets=jagged.offsets(first))
    assert rows_of(first + second) == [[0, 11], [], [22]]


def test_an_empty_row_does_not_decide_the_dtype() -> None:
    assert jagged.from_rows([torch.tensor([]), torch.tensor([2**60 + 1])]).dtype == torch.int64
    assert jagged.from_rows([]).dtype == torch.float32


def test_holes_between_rows_are_left_out() -> None:
    column = torch.nested.nested_tensor_from_jagged(
        torch.arange(8), torch.tensor([0, 2, 6, 8]), lengths=torch.tensor([1, 3, 0])
    )
    assert rows_of(column) == [[0], [2, 3, 4], []]
    assert jagged.offsets(column).tolist() == [0, 1, 4, 4]


def test_what_does_not_fit_is_refused() -> None:
    column = column_of([1, 2])
    with pytest.raises(IndexError, match="row 2"):
        jagged.select_rows(column, [0, 2])
    with pytest.raises(IndexError, match="row -3"):
        jagged.select_rows(column, [-3])
    with pytest.raises(IndexError, match="mask"):
        jagged.select_rows(column, torch.tensor([True]))
    with pytest.raises(ValueError, match="add up"):
        jagged.from_values(torch.zeros(3), [1, 1])
    with pytest.raises(ValueError, match="length of -1"):
        jagged.from_values(torch.zeros(1), [2, -1])
    with pytest.raises(ValueError, match="lengths or from offsets"):
        jagged.from_values(torch.zeros(1))
    with pytest.raises(ValueError, match="does not fit"):
        jagged.pad(column, 0, length=1)
    with pytest.raises(ValueError, match="was not padded"):
        jagged.unpad(torch.zeros(1, 2), torch.tensor([3]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("longest", [3, 90])
@pytest.mark.parametrize("width", [(), (2,)])
def test_rows_of_any_length_and_type_are_selected_and_joined(dtype, longest, width):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, longest, (20,), generator=generator)
    flat = torch.randint(0, 100, (int(sizes.sum()), *width), generator=generator).to(dtype)
    column = jagged.from_values(flat, sizes)
    rows = torch.tensor([19, 0, 0, 7, 3])
    before = jagged.to_rows(column)
    picked = jagged.select_rows(column, rows)
    assert jagged.values(picked).dtype == dtype
    for found, row in zip(jagged.to_rows(picked), rows.tolist(), strict=True):
        assert torch.equal(found, before[row])
    both = jagged.to_rows(jagged.concat([picked, column]))
    assert all(torch.equal(a, b) for a, b in zip(both, [*jagged.to_rows(picked), *before], strict=True))
    assert not len(jagged.values(jagged.select_rows(column, torch.empty(0, dtype=torch.int64))))


@pytest.mark.parametrize("longest", [3, 90])
def test_a_selection_passes_gradients_on(longest):
    values = torch.arange(3.0 * longest, requires_grad=True)
    picked = jagged.select_rows(jagged.from_values(values, [longest] * 3), [2, 2, 0])
    jagged.values(picked).sum().backward()
    assert torch.equal(values.grad, torch.tensor([1.0, 0.0, 2.0]).repeat_interleave(longest))
