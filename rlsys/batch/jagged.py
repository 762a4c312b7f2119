"""Jagged columns: rows of different length as one buffer of values and the offsets of its rows.

A ``torch.nested`` jagged tensor is the view of the two; nothing is padded until an engine pads at its own door. Shapes:
values [T, …] of all rows laid end to end, offsets [B + 1] with offsets[0] = 0, lengths [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def is_jagged(column: object) -> bool:
    return isinstance(column, Tensor) and column.is_nested and column.layout == torch.jagged


def from_values(values: Tensor, lengths: Tensor) -> Tensor:
    """A jagged column over ``values`` [T, …] (shared, not copied) with rows of ``lengths`` [B]."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=values.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    if int(offsets[-1]) != len(values):
        raise ValueError(f"lengths add up to {int(offsets[-1])}, and there are {len(values)} values")
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def from_rows(rows: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """A jagged column from one tensor a row; ``dtype`` is needed only where there are no rows."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    values = torch.cat(list(rows)) if rows else torch.empty(0, dtype=dtype or torch.float32)
    return from_values(values if dtype is None else values.to(dtype), lengths)


def values(column: Tensor) -> Tensor:
    """[T, …] all rows end to end (shared memory)."""
    return column.values()


def offsets(column: Tensor) -> Tensor:
    """[B + 1] int64"""
    return column.offsets()


def lengths(column: Tensor) -> Tensor:
    """[B] int64"""
    return column.offsets().diff()


def to_rows(column: Tensor) -> list[Tensor]:
    """Views of the rows."""
    return list(torch.split(values(column), lengths(column).tolist()))


def select_rows(column: Tensor, rows: Tensor) -> Tensor:
    """The rows at these indices [b] int64 or under this mask [B] bool, in that order; copies."""
    rows = torch.as_tensor(rows, device=values(column).device)
    if rows.dtype == torch.bool:
        rows = rows.nonzero().flatten()
    rows = rows % max(len(offsets(column)) - 1, 1) if len(rows) else rows.long()
    picked = lengths(column)[rows]
    starts = offsets(column)[:-1][rows]
    # position of every value: start of its row, plus how far it is into the new row
    within = torch.arange(int(picked.sum()), device=picked.device) - (picked.cumsum(0) - picked).repeat_interleave(picked)
    return from_values(values(column)[starts.repeat_interleave(picked) + within], picked)


def concat(columns: Sequence[Tensor]) -> Tensor:
    """Rows of all columns one after the other."""
    return from_values(torch.cat([values(c) for c in columns]), torch.cat([lengths(c) for c in columns]))


def segment_sum(column: Tensor) -> Tensor:
    """[B] sum of each row's values; integers for bool and integer columns."""
    flat = values(column)
    flat = flat.long() if flat.dtype == torch.bool else flat
    index = torch.arange(len(offsets(column)) - 1, device=flat.device).repeat_interleave(lengths(column))
    return torch.zeros(len(offsets(column)) - 1, dtype=flat.dtype, device=flat.device).index_add_(0, index, flat)


def pad(column: Tensor, value: float, *, length: int | None = None, side: Literal["left", "right"] = "right") -> Tensor:
    """[B, L] dense, rows padded with ``value`` to the longest (or to ``length``)."""
    sizes = lengths(column)
    longest = int(sizes.max()) if len(sizes) else 0
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"a row of {longest} does not fit into {width}")
    column_index = torch.arange(width, device=sizes.device)
    inside = column_index < sizes[:, None] if side == "right" else column_index >= width - sizes[:, None]
    dense = values(column).new_full((len(sizes), width, *values(column).shape[1:]), value)
    dense[inside] = values(column)
    return dense


def unpad(dense: Tensor, sizes: Tensor, *, side: Literal["left", "right"] = "right") -> Tensor:
    """The jagged column of the first (last) ``sizes`` [B] values of each row of ``dense`` [B, L]."""
    index = torch.arange(dense.shape[1], device=dense.device)
    inside = index < sizes[:, None] if side == "right" else index >= dense.shape[1] - sizes[:, None]
    return from_values(dense[inside], sizes)
