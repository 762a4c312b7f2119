"""Equality of whatever a batch holds, and the unions and merges that depend on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from rlsys.batch import jagged
from rlsys.batch.errors import BatchError


def deep_equal(left: Any, right: Any) -> bool:
    """Equality that takes NaN for equal to NaN, looks into containers and arrays, and ends on circular references.

    Arrays are equal when their dtypes are, and the cells of object arrays when their types are: 1 is not 1.0 there.
    """
    return _equal(left, right, set())


def _equal(left: Any, right: Any, comparing: set[tuple[int, int]]) -> bool:
    if left is right:
        return True
    pair = (id(left), id(right))
    if pair in comparing:  # a cycle: equal if everything around it is
        return True
    comparing.add(pair)
    try:
        return _equal_contents(left, right, comparing)
    finally:
        comparing.discard(pair)


def _equal_contents(left: Any, right: Any, comparing: set[tuple[int, int]]) -> bool:
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return isinstance(left, np.ndarray) and isinstance(right, np.ndarray) and _equal_arrays(left, right, comparing)
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and columns_equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key], comparing) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right):
        return len(left) == len(right) and all(_equal(a, b, comparing) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right):
        return True
    return bool(left == right)


def _equal_arrays(left: np.ndarray, right: np.ndarray, comparing: set[tuple[int, int]]) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype != object:
        return np.array_equal(left, right, equal_nan=left.dtype.kind in "fcmM")
    return all(type(a) is type(b) and _equal(a, b, comparing) for a, b in zip(left.flat, right.flat, strict=True))


def columns_equal(left: Any, right: Any) -> bool:
    """Two columns of a batch: tensors (NaN is not NaN, as in ``torch.equal``), jagged ones, or nested TensorDicts."""
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return type(left) is type(right) and bool((left == right).all())
    if left.is_nested != right.is_nested or left.layout != right.layout or left.dtype != right.dtype:
        return False
    if not left.is_nested:
        return torch.equal(left, right)
    if jagged.is_jagged(left) and left._ragged_idx == right._ragged_idx == 1:
        return jagged.equal(left, right)
    rows = list(left.unbind()), list(right.unbind())
    return len(rows[0]) == len(rows[1]) and all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def union_tensor_dict(tensor_dict1: TensorDict, tensor_dict2: TensorDict) -> TensorDict:
    """Adds the columns of the second to the first, and returns the first.

    Raises:
        BatchError: the batch sizes differ, or a column is in both and not the same; nothing has been added then.
    """
    if tensor_dict1.batch_size != tensor_dict2.batch_size:
        raise BatchError(
            f"columns of batch size {tuple(tensor_dict2.batch_size)} do not go with {tuple(tensor_dict1.batch_size)}"
        )
    known = set(tensor_dict1.keys())
    for key, column in tensor_dict2.items():
        if key in known and not columns_equal(tensor_dict1[key], column):
            raise BatchError(f"column '{key}' is in both batches and not the same")
    for key, column in tensor_dict2.items():
        if key not in known:
            tensor_dict1.set(key, column)
    return tensor_dict1


def union_numpy_dict(tensor_dict1: dict[str, np.ndarray], tensor_dict2: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the arrays of the second to the first, and returns the first.

    Raises:
        BatchError: an array is in both and not the same; nothing has been added then.
    """
    for key in tensor_dict1.keys() & tensor_dict2.keys():
        left, right = tensor_dict1[key], tensor_dict2[key]
        both_arrays = isinstance(left, np.ndarray) and isinstance(right, np.ndarray)
        if not (both_arrays and deep_equal(left, right)):
            raise BatchError(f"`{key}` in tensor_dict1 and tensor_dict2 are not the same object.")
    tensor_dict1.update(tensor_dict2)
    return tensor_dict1


def union_meta_info(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Adds the entries of the second to the first, and returns the first.

    Raises:
        BatchError: a key is in both with different values; nothing has been added then.
    """
    for key in left.keys() & right.keys():
        if not deep_equal(left[key], right[key]):
            raise BatchError(f"'{key}' is in the meta_info of both batches and not the same")
    left.update(right)
    return left


def merge_meta_info(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of several batches as those of one; the dicts under ``metrics`` become one dict of lists.

    Raises:
        BatchError: a fact has two values, or a metric is not among the first worker's.
    """
    merged: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []
    for info in infos:
        found = info.get("metrics")
        if found is not None:
            metrics += found if isinstance(found, list) else [found]
        for key, value in info.items():
            if key == "metrics":
                continue
            if key in merged and not deep_equal(merged[key], value):
                raise BatchError(f"Conflicting values for meta_info key '{key}'")
            merged.setdefault(key, value)
    if metrics:
        for one in metrics:
            if unknown := one.keys() - metrics[0].keys():
                raise BatchError(f"metric '{min(unknown)}' is not among the first worker's")
        merged["metrics"] = {key: [one[key] for one in metrics if key in one] for key in metrics[0]}
    return merged
