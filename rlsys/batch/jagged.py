"""Jagged columns: rows of different length as one buffer of values and the offsets of its rows.

A ``torch.nested`` jagged tensor is the view of the two; nothing is padded until an engine pads at its own door. Shapes:
values [T, …] of all rows laid end to end, offsets [B + 1] with offsets[0] = 0, lengths [B]. Columns that share one
offsets tensor can be added, multiplied and compared as they are; torch takes rows of other offsets for another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

Side = Literal["left", "right"]


def is_jagged(column: object) -> bool:
    return isinstance(
        column, NestedTensor
    )  # asking the tensor itself goes through torch's dispatcher, 250 times slower


def view(values: Tensor, offsets: Tensor) -> Tensor:
    """The jagged column over ``values`` [T, …] and ``offsets`` [B + 1] int64, which are not looked at."""
    if values.requires_grad:
        return torch.nested.nested_tensor_from_jagged(values, offsets)
    return NestedTensor(values, offsets)  # the same without a node for autograd, in a quarter of the time


def from_values(
    values: Tensor, lengths: Tensor | Sequence[int] | None = None, *, offsets: Tensor | None = None
) -> Tensor:
    """A jagged column over ``values`` [T, …] (shared, not copied), by the rows' ``lengths`` [B] or ``offsets`` [B + 1].

    Raises:
        ValueError: neither or both are given, or the rows do not add up to the values.
    """
    if (lengths is None) == (offsets is None):
        raise ValueError("a jagged column is made from lengths or from offsets")
    if offsets is None:
        offsets = _offsets_of(torch.as_tensor(lengths, device=values.device))
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(values):
        raise ValueError(f"lengths add up to {last - first}, and there are {len(values)} values")
    return view(values, offsets)


def from_rows(rows: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """A jagged column from one tensor a row.

    Args:
        dtype: of the column; without it the type of the rows that have values counts (an empty row is often a float by
            accident), and float32 where there are none.
    """
    if dtype is None:
        dtype = next((row.dtype for row in rows if len(row)), rows[0].dtype if len(rows) else torch.float32)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    values = torch.cat([row.to(dtype) for row in rows]) if len(rows) else torch.empty(0, dtype=dtype)
    return from_values(values, lengths)


def values(column: Tensor) -> Tensor:
    """[T, …] all rows end to end (shared memory)."""
    column = _compact(column)
    with torch._C.DisableTorchFunctionSubclass():  # the question alone would take as long as the answer
        differentiable = column.requires_grad
    return column.values() if differentiable else column._values


def offsets(column: Tensor) -> Tensor:
    """[B + 1] int64"""
    return _compact(column).offsets().to(torch.int64)


def lengths(column: Tensor) -> Tensor:
    """[B] int64"""
    return offsets(column).diff()


def num_rows(column: Tensor) -> int:
    return column.size(0)


def to_rows(column: Tensor) -> list[Tensor]:
    """Views of the rows."""
    return list(torch.split(values(column), lengths(column).tolist()))


@dataclass(frozen=True)
class Gather:
    """Where the values of some rows lie: starts and sizes [b] of those rows, and the offsets [b + 1] of the new ones.

    Columns with equal offsets share one, and so does the result.
    """

    starts: Tensor
    sizes: Tensor
    offsets: Tensor

    @cached_property
    def index(self) -> Tensor:
        """[T'] of every new value, into the old ones."""
        # how far it is into the new buffer, moved by how far its row has moved
        moved = (self.starts - self.offsets[:-1]).repeat_interleave(self.sizes)
        return moved.add_(torch.arange(len(moved), device=moved.device))

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """First value of every row, and the one after its last."""
        return list(zip(self.starts.tolist(), (self.starts + self.sizes).tolist(), strict=True))


def plan_rows(offsets: Tensor, rows: Tensor) -> Gather:
    """The gather that lays rows [b] int64 (≥ 0, in any order, repeated or not) end to end."""
    rows = rows.to(offsets.device)
    starts = offsets[rows]
    sizes = offsets[rows + 1] - starts
    return Gather(starts, sizes, _offsets_of(sizes))


_LONG_ROWS = 16  # mean length from which on copying rows is faster than fetching values one by one


def gather(column: Tensor, plan: Gather) -> Tensor:
    """The column's values at ``plan``, as a jagged column that shares the plan's offsets."""
    flat = values(column)
    numbers = _as_numpy(flat)
    if numbers is None or int(plan.offsets[-1]) < _LONG_ROWS * max(len(plan.sizes), 1):
        return view(flat.index_select(0, plan.index), plan.offsets)
    joined = np.concatenate([numbers[start:stop] for start, stop in plan.runs])
    return view(torch.from_numpy(joined).view(flat.dtype), plan.offsets)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_numpy(flat: Tensor) -> np.ndarray | None:
    """A view of the values as integers of their size. NumPy puts large arrays on large pages, which the CPU has ready
    several times as fast as torch's. None where NumPy cannot have them: on a GPU, with a gradient, as complex128."""
    integer = _INTEGERS.get(flat.element_size())
    if integer is None or flat.device.type != "cpu" or flat.requires_grad or flat.is_conj() or flat.is_neg():
        return None
    return flat.detach().view(integer).numpy()


def join(parts: Sequence[Tensor]) -> Tensor:
    """[Σ T, …] values of all parts one after the other."""
    arrays = [_as_numpy(part) for part in parts]
    if len({part.dtype for part in parts}) > 1 or any(array is None for array in arrays):
        return torch.cat(list(parts))
    return torch.from_numpy(np.concatenate(arrays)).view(parts[0].dtype)  # type: ignore[arg-type]


def select_rows(column: Tensor, rows: Tensor | Sequence[int]) -> Tensor:
    """The rows at these indices [b] or under this mask [B] bool, in that order; copies.

    Raises:
        IndexError: there is no such row, or the mask does not have one value a row.
    """
    return gather(column, plan_rows(offsets(column), row_indices(rows, num_rows(column))))


def row_indices(rows: Tensor | Sequence[int], count: int) -> Tensor:
    """[b] int64 in 0 … count-1, from indices (negative ones from the end) or from a mask [count] bool.

    Raises:
        IndexError: there is no such row, or the mask does not have one value a row.
    """
    rows = torch.as_tensor(rows)
    if rows.dtype == torch.bool:
        if len(rows) != count:
            raise IndexError(f"a mask of {len(rows)} does not fit {count} rows")
        return rows.nonzero().flatten()
    rows = rows.to(torch.int64)
    if len(rows):
        lowest, highest = (int(bound) for bound in rows.aminmax())
        if lowest < -count or highest >= count:
            raise IndexError(f"there are {count} rows, and row {highest if highest >= count else lowest} was asked for")
        if lowest < 0:
            rows = torch.where(rows < 0, rows + count, rows)
    return rows


def slice_rows(column: Tensor, start: int, stop: int) -> Tensor:
    """Rows start … stop-1 (0 ≤ start ≤ stop ≤ B); a view."""
    bounds = offsets(column)[start : stop + 1]
    return from_values(values(column)[int(bounds[0]) : int(bounds[-1])], offsets=bounds - bounds[0])


def concat(columns: Sequence[Tensor]) -> Tensor:
    """Rows of all columns one after the other."""
    return view(join([values(c) for c in columns]), concat_offsets([offsets(c) for c in columns]))


def concat_offsets(parts: Sequence[Tensor]) -> Tensor:
    """[Σ B + 1] offsets of rows that lie one after the other, from those [B + 1] of each part."""
    moved, start = [parts[0][:1]], 0
    for bounds in parts:
        moved.append(bounds[1:] + start)
        start += int(bounds[-1])
    return torch.cat(moved)


def repeat(column: Tensor, times: int, *, interleave: bool = True) -> Tensor:
    """Every row ``times`` times: each next to itself, or the whole column again and again."""
    rows = torch.arange(num_rows(column))
    return select_rows(column, rows.repeat_interleave(times) if interleave else rows.repeat(times))


def equal(left: Tensor, right: Tensor) -> bool:
    """The same rows with the same values (NaN is not equal to itself, as in ``torch.equal``)."""
    return torch.equal(offsets(left), offsets(right)) and torch.equal(values(left), values(right))


def segment_sum(column: Tensor) -> Tensor:
    """[B] sum of each row's values; integers for bool and integer columns."""
    flat = values(column)
    flat = flat.long() if flat.dtype == torch.bool else flat
    index = torch.arange(num_rows(column), device=flat.device).repeat_interleave(lengths(column))
    return torch.zeros(num_rows(column), dtype=flat.dtype, device=flat.device).index_add_(0, index, flat)


def pad(column: Tensor, value: float, *, length: int | None = None, side: Side = "right") -> Tensor:
    """[B, L, …] dense, rows padded with ``value`` to the longest (or to ``length``).

    Raises:
        ValueError: a row is longer than ``length``.
    """
    sizes = lengths(column)
    longest = int(sizes.max()) if len(sizes) else 0
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"a row of {longest} does not fit into {width}")
    flat = values(column)
    dense = flat.new_full((len(sizes), width, *flat.shape[1:]), value)
    dense[_inside(sizes, width, side)] = flat
    return dense


def unpad(dense: Tensor, sizes: Tensor, *, side: Side = "right") -> Tensor:
    """The jagged column of the first (``side`` left: last) ``sizes`` [B] values of each row of ``dense`` [B, L, …].

    Raises:
        ValueError: a row has fewer values than its size.
    """
    if len(sizes) and int(sizes.max()) > dense.shape[1]:
        raise ValueError(f"a row of {int(sizes.max())} was not padded to {dense.shape[1]}")
    return from_values(dense[_inside(sizes.to(dense.device), dense.shape[1], side)], sizes)


def _inside(sizes: Tensor, width: int, side: Side) -> Tensor:
    """[B, width] bool: where the values of padded rows are."""
    place = torch.arange(width, device=sizes.device)
    return place < sizes[:, None] if side == "right" else place >= width - sizes[:, None]


def _offsets_of(sizes: Tensor) -> Tensor:
    """[B + 1] from lengths [B]."""
    if len(sizes) and int(sizes.min()) < 0:
        raise ValueError(f"a row cannot have a length of {int(sizes.min())}")
    bounds = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=sizes.device)
    torch.cumsum(sizes, 0, out=bounds[1:])
    return bounds


def _compact(column: Tensor) -> Tensor:
    """The column without holes: ``torch.narrow`` and the like make rows that do not fill the buffer.

    Raises:
        ValueError: the rows differ in another dimension than their first.
    """
    if column._ragged_idx != 1:
        raise ValueError(
            f"rows of a jagged column differ in their first dimension, not in dimension {column._ragged_idx - 1}"
        )
    if column.lengths() is None:
        return column
    starts, sizes = column.offsets()[: column.size(0)], column.lengths()
    new = _offsets_of(sizes)
    moved = (starts - new[:-1]).repeat_interleave(sizes)
    return from_values(column.values()[moved + torch.arange(len(moved), device=moved.device)], offsets=new)
