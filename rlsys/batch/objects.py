"""Columns of Python objects, and what is in a batch in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rlsys.batch.errors import BatchError


def object_array(cells: Iterable[Any]) -> np.ndarray:
    """An object array over a sequence, as ``np.array(cells, dtype=object)`` makes it: nested sequences of equal length
    become further dimensions, others stay cells."""
    cells = cells if isinstance(cells, Sequence) else list(cells)
    try:
        return np.array(cells, dtype=object)
    except ValueError:  # arrays that agree in some dimensions and not in others
        return _column_of(cells)


def concat_arrays(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all parts, one after the other.

    Raises:
        BatchError: an array is missing somewhere, or rows have different shapes.
    """
    for index, part in enumerate(parts):
        if differing := parts[0].keys() ^ part.keys():
            raise BatchError(f"object column '{min(differing)}' is not in all of the batches (see number {index})")
    return {key: _concat(key, [part[key] for part in parts]) for key in parts[0]} if parts else {}


def _concat(key: str, arrays: list[np.ndarray]) -> np.ndarray:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        # Lists happened to have one length each in one part and not in another.
        if any(array.dtype != object for array in arrays):
            raise BatchError(f"rows of column '{key}' have different shapes: {sorted(shapes)}")
        arrays = [array if array.ndim == 1 else _column_of(array.tolist()) for array in arrays]
    return np.concatenate(arrays, axis=0)


def _column_of(cells: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(cells), dtype=object)
    for index, cell in enumerate(cells):
        column[index] = cell
    return column


def describe(columns: dict[str, Any], arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> list[str]:
    """A batch in words: shapes, dtypes and devices of its columns, types of its facts, one a line."""
    lines = ["batch"]
    for key, column in columns.items():
        if isinstance(column, torch.Tensor):
            lines.append(f"  {key}: {tuple(column.shape)} ({column.dtype}) {column.device}")
        else:
            lines.append(f"  {key}: {type(column).__name__}")
    lines.append("non_tensor_batch")
    lines += [f"  {key}: ndarray{array.shape} ({array.dtype})" for key, array in arrays.items()]
    lines.append("meta_info")
    lines += [f"  {key}: {type_words(value)}" for key, value in facts.items()]
    return lines


def type_words(value: Any) -> str:
    """The type of a value and of what is in it: ``list[int]``, ``dict[str: float]``, ``ndarray(3,) (int64)``."""
    if isinstance(value, list):
        inside = sorted({type_words(item) for item in value[:3]})
        return f"list[{'|'.join(inside) if inside else '...'}]"
    if isinstance(value, tuple):
        return f"tuple({', '.join(type_words(item) for item in value)})"
    if isinstance(value, dict):
        if not value:
            return "dict"
        key, item = next(iter(value.items()))
        return f"dict[{type_words(key)}: {type_words(item)}]"
    if isinstance(value, np.ndarray):
        return f"ndarray{value.shape} ({value.dtype})"
    return type(value).__name__
