"""Row operations on a TensorDict that may have jagged columns.

TensorDict itself does the dense part; nested columns go through ``rlsys.batch.jagged``, where columns with the same
offsets share one gather and, in the result, one offsets tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from rlsys.batch import jagged
from rlsys.batch.errors import BatchError

Columns = dict[str, Tensor]


def nested_columns(batch: TensorDict) -> Columns:
    """The columns that TensorDict cannot be trusted with: jagged ones, and other nested tensors."""
    return {
        key: column
        for key, column in batch.items()
        if jagged.is_jagged(column) or (isinstance(column, Tensor) and column.is_nested)
    }


def from_columns(tensors: Mapping[str, Tensor], num_batch_dims: int) -> TensorDict:
    """The columns together, with their first dimensions as batch dimensions.

    Raises:
        BatchError: these differ.
    """
    first, size = None, None
    for key, tensor in tensors.items():
        shape = torch.Size([tensor.size(0)]) if tensor.is_nested else tensor.shape[:num_batch_dims]
        if size is None:
            first, size = key, shape
        elif shape != size:
            raise BatchError(f"columns have different rows: '{first}' has {tuple(size)}, '{key}' has {tuple(shape)}")
    return TensorDict(dict(tensors), batch_size=size)


def refuse_nested(batch: TensorDict, what: str) -> None:
    """Raises:
    BatchError: there is a nested column.
    """
    for key in nested_columns(batch):
        raise BatchError(f"column '{key}' is jagged and cannot be {what}: pad it first (to_padded)")


def select(batch: TensorDict, rows: Tensor) -> TensorDict:
    """Rows [b] int64 (≥ 0), in that order; copies."""
    nested = nested_columns(batch)
    columns = {key: _take(column, rows) for key, column in batch.items() if key not in nested}
    selected = TensorDict(columns, batch_size=(len(rows),), device=batch.device)
    return _with_nested(selected, _select_nested(nested, rows))


def cut(batch: TensorDict, start: int, stop: int, step: int = 1) -> TensorDict:
    """Rows start, start + step, … before stop, as ``slice.indices`` gives them; views where step is 1."""
    if step < 0:  # torch has no views that run backwards
        return select(batch, torch.tensor(range(start, stop, step), dtype=torch.int64))
    nested = nested_columns(batch)
    part = (batch.exclude(*nested) if nested else batch)[start:stop:step]
    if step == 1:
        return _with_nested(part, _cut_nested(nested, start, max(start, stop)))
    return _with_nested(part, _select_nested(nested, torch.arange(start, max(start, stop), step)))


def split(batch: TensorDict, sizes: Sequence[int]) -> list[TensorDict]:
    """Runs of ``sizes`` rows, which add up to all; views."""
    nested = nested_columns(batch)
    dense = batch.exclude(*nested) if nested else batch
    parts = list(dense.split(list(sizes)))
    if nested:
        for part, columns in zip(parts, _split_nested(nested, sizes), strict=True):
            _with_nested(part, columns)
    return parts


def row(batch: TensorDict, index: int) -> TensorDict:
    """One row, as a TensorDict without batch dimension; a jagged column's row is a tensor of its length."""
    count = batch.batch_size[0]
    if not -count <= index < count:
        raise IndexError(f"row {index} of {count}")
    nested = nested_columns(batch)
    dense = batch.exclude(*nested) if nested else batch
    return _with_nested(dense[index], {key: column[index] for key, column in nested.items()})


def concat(batches: Sequence[TensorDict]) -> TensorDict:
    """Rows of all batches one after the other.

    Raises:
        BatchError: a column is missing somewhere, or jagged here and dense there.
    """
    names = set(batches[0].keys())
    for index, batch in enumerate(batches):
        if missing := names ^ set(batch.keys()):
            raise BatchError(
                f"column '{min(missing)}' is not in all of the batches: look at the first and at number {index}"
            )
    kinds = [nested_columns(batch).keys() for batch in batches]
    for index, nested in enumerate(kinds):
        if differing := kinds[0] ^ nested:
            raise BatchError(f"column '{min(differing)}' is jagged in one batch and dense in another (number {index})")
    if not kinds[0]:
        return torch.cat(list(batches), dim=0)
    dense = torch.cat([batch.exclude(*kinds[0]) for batch in batches], dim=0)
    parts = {key: [batch[key] for batch in batches] for key in batches[0].keys() if key in kinds[0]}  # noqa: SIM118
    return _with_nested(dense, _concat_nested(parts))


def unfold(key: str, column: Tensor, n_split: int) -> Tensor:
    """[B, n·m, …] as [B·n, m, …]; the rows of a jagged column must each divide."""
    if jagged.is_jagged(column):
        sizes = jagged.lengths(column)
        if bool((sizes % n_split).any()):
            raise BatchError(f"rows of column '{key}' do not divide into {n_split}")
        return jagged.from_values(jagged.values(column), (sizes // n_split).repeat_interleave(n_split))
    return column.reshape(_unfolded_shape(key, tuple(column.shape), n_split))


def unfold_array(key: str, array: np.ndarray, n_split: int) -> np.ndarray:
    """[B, n·m, …] as [B·n, m, …]"""
    return array.reshape(_unfolded_shape(key, array.shape, n_split))


def _unfolded_shape(key: str, shape: tuple[int, ...], n_split: int) -> tuple[int, ...]:
    if len(shape) < 2 or shape[1] % n_split:
        raise BatchError(f"column '{key}' of shape {shape} does not divide into {n_split}")
    return (shape[0] * n_split, shape[1] // n_split, *shape[2:])


def _take(column: Tensor | TensorDict, rows: Tensor) -> Tensor | TensorDict:
    if isinstance(column, Tensor):
        return column.index_select(0, rows.to(column.device))
    return column[rows]


def _with_nested(batch: TensorDict, nested: Mapping[str, Tensor]) -> TensorDict:
    """Adds columns that have the batch's rows, as is known here; ``TensorDict.set`` would look at each shape again."""
    for key, column in nested.items():
        batch._set_str(key, column, validated=True, inplace=False, non_blocking=False)
    return batch


def _ragged_first(nested: Columns) -> tuple[Columns, Columns]:
    """Jagged columns with the ragged dimension next to the rows (views), and the strided nested ones."""
    standard = {key: column.transpose(1, column._ragged_idx) if column._ragged_idx != 1 else column
                for key, column in nested.items() if jagged.is_jagged(column)}  # fmt: skip
    return standard, {key: column for key, column in nested.items() if key not in standard}


def _like(columns: Columns, originals: Columns) -> Columns:
    """The columns, with the ragged dimension where the originals have it and in their order."""
    for key in columns.keys() & originals.keys():
        if jagged.is_jagged(columns[key]) and (place := originals[key]._ragged_idx) != 1:
            columns[key] = columns[key].transpose(1, place)
    return {key: columns[key] for key in originals}


def _by_offsets(columns: Columns) -> Iterator[tuple[Tensor, list[str]]]:
    """Offsets, and the columns that have them."""
    groups: list[tuple[Tensor, list[str]]] = []
    for key, column in columns.items():
        offsets = jagged.offsets(column)
        for known, names in groups:
            if known is offsets or torch.equal(known, offsets):
                names.append(key)
                break
        else:
            groups.append((offsets, [key]))
    yield from groups


def _select_nested(nested: Columns, rows: Tensor) -> Columns:
    standard, strided = _ragged_first(nested)
    selected: Columns = {}
    for offsets, names in _by_offsets(standard):
        plan = jagged.plan_rows(offsets, rows)
        selected |= {key: jagged.gather(standard[key], plan) for key in names}
    for key, column in strided.items():
        parts = column.unbind()
        selected[key] = torch.nested.as_nested_tensor([parts[index] for index in rows.tolist()])
    return _like(selected, nested)


def _cut_nested(nested: Columns, start: int, stop: int) -> Columns:
    before, after = start, len(next(iter(nested.values()))) - stop if nested else 0
    return _split_nested(nested, [before, stop - start, after])[1]


def _split_nested(nested: Columns, sizes: Sequence[int]) -> list[Columns]:
    """The columns of each run of ``sizes`` rows."""
    standard, strided = _ragged_first(nested)
    stops = list(accumulate(sizes))
    parts: list[Columns] = [{} for _ in sizes]
    for offsets, names in _by_offsets(standard):
        buffers = [(key, jagged.values(standard[key])) for key in names]
        edges = [0, *offsets[torch.tensor(stops, dtype=torch.int64)].tolist()]
        for part, size, stop, (first, last) in zip(parts, sizes, stops, pairwise(edges), strict=True):
            bounds = offsets[stop - size : stop + 1] - first
            for key, values in buffers:
                part[key] = jagged.view(values[first:last], bounds)
    for key, column in strided.items():
        cells = column.unbind()
        for part, size, stop in zip(parts, sizes, stops, strict=True):
            part[key] = torch.nested.as_nested_tensor(list(cells[stop - size : stop]))
    return [_like(part, nested) for part in parts]


def _concat_nested(parts: Mapping[str, Sequence[Tensor]]) -> Columns:
    originals = {key: columns[0] for key, columns in parts.items()}
    joined: Columns = {}
    shared: dict[tuple[int, ...], Tensor] = {}  # columns with the same offsets in every part have the same afterwards
    for key, columns in parts.items():
        if not jagged.is_jagged(columns[0]):
            joined[key] = torch.nested.as_nested_tensor([row for column in columns for row in column.unbind()])
            continue
        standard = [_ragged_first({key: column})[0][key] for column in columns]
        offsets = [jagged.offsets(column) for column in standard]
        same = tuple(map(id, offsets))
        if same not in shared:
            shared[same] = _known(jagged.concat_offsets(offsets), shared.values())
        joined[key] = jagged.view(jagged.join([jagged.values(column) for column in standard]), shared[same])
    return _like(joined, originals)


def _known(offsets: Tensor, others: Iterable[Tensor]) -> Tensor:
    """The one of the others that is the same, or these."""
    return next((other for other in others if torch.equal(other, offsets)), offsets)
