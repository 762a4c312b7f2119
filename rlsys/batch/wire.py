"""Columns as raw buffers and a few words about each: how a batch crosses process borders.

Buffers are NumPy arrays, so that pickle protocol 5 hands them over out of band: Ray writes each once into the object
store, and a reader on the same node gets tensors over the store's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from rlsys.batch import jagged

EncodedTensor = tuple[str, tuple[int, ...], Any]
EncodedTensorDict = tuple[tuple[int, ...], str | None, dict[str, Any]]


def raw_bytes(tensor: Tensor) -> Tensor:
    """[N] uint8, on the CPU: the bytes of a dense tensor, shared with one that is contiguous there."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single element may have any stride and is contiguous all the same.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def serialize_single_tensor(obj: Tensor) -> EncodedTensor:
    """dtype, shape and the bytes of a dense tensor. The bytes are shared with a contiguous CPU tensor."""
    return str(obj.dtype).removeprefix("torch."), tuple(obj.shape), raw_bytes(obj).numpy()


def deserialize_single_tensor(arr: EncodedTensor, *, copy: bool = True) -> Tensor:
    """The tensor on the CPU.

    Args:
        copy: False shares the memory of the bytes, which must then not be written to where they are read-only.
    """
    name, shape, data = arr
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype")
    raw = np.frombuffer(bytearray(data) if copy else data, dtype=np.uint8)
    return torch.from_numpy(_writable(raw)).view(dtype).view(shape)


def serialize_tensordict(batch: TensorDict) -> EncodedTensorDict:
    """batch size, device and columns. A jagged column is its values and offsets; columns that share offsets still do
    on the other side. What is no tensor (a nested TensorDict, non-tensor data) is left to pickle."""
    offsets: dict[int, EncodedTensor] = {}
    items: dict[str, Any] = {}
    for key, column in batch.items():
        if not isinstance(column, Tensor):
            items[key] = ("object", column)
        elif jagged.is_jagged(column):
            bounds = column.offsets()
            shared = offsets.setdefault(id(bounds), serialize_single_tensor(bounds))
            lengths = None if column.lengths() is None else serialize_single_tensor(column.lengths())
            items[key] = ("jagged", (serialize_single_tensor(column._values), shared, lengths, column._ragged_idx))
        elif column.is_nested:
            items[key] = ("strided", [serialize_single_tensor(row) for row in column.unbind()])
        else:
            items[key] = serialize_single_tensor(column)
    return tuple(batch.batch_size), None if batch.device is None else str(batch.device), items


def deserialize_tensordict(arr: EncodedTensorDict, *, copy: bool = True) -> TensorDict:
    """The TensorDict, on its device where this process has that, else on the CPU.

    Args:
        copy: as for :func:`deserialize_single_tensor`.
    """
    batch_size, device, items = arr
    offsets: dict[int, Tensor] = {}

    def tensor(encoded: EncodedTensor) -> Tensor:
        return deserialize_single_tensor(encoded, copy=copy)

    columns: dict[str, Any] = {}
    for key, encoded in items.items():
        if len(encoded) == 3:
            columns[key] = tensor(encoded)
        elif len(encoded) == 2:
            kind, parts = encoded
            columns[key] = _decode(kind, parts, tensor, offsets)
        else:
            raise ValueError(f"column {key!r}: 2 or 3 parts were expected, not {len(encoded)}")
    return TensorDict(columns, batch_size=batch_size, device=_device_here(device))


def _decode(kind: str, parts: Any, tensor: Callable[[EncodedTensor], Tensor], offsets: dict[int, Tensor]) -> Any:
    if kind == "object":
        return parts
    if kind == "strided":
        return torch.nested.as_nested_tensor([tensor(row) for row in parts])
    values, shared, lengths, ragged = parts
    bounds = offsets.setdefault(id(shared[2]), tensor(shared))
    sizes = None if lengths is None else tensor(lengths)
    if sizes is None and ragged == 1:
        return jagged.view(tensor(values), bounds)
    return torch.nested.nested_tensor_from_jagged(tensor(values), bounds, lengths=sizes, jagged_dim=ragged)


def _device_here(device: str | None) -> str | None:
    """None keeps the tensors where they were made: a GPU that this process does not see is the CPU."""
    if device is None or torch.device(device).type == "cpu":
        return device
    there = torch.device(device)
    return device if there.type == "cuda" and (there.index or 0) < torch.cuda.device_count() else "cpu"


class _Memory:
    """An array's memory with no word about being read-only, for the array interface; keeps the array alive."""

    def __init__(self, owner: np.ndarray):
        self.owner = owner
        interface = owner.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _writable(array: np.ndarray) -> np.ndarray:
    """A view that may be written to. torch has no read-only tensors and warns about every one over such an array; that
    nobody writes to a batch received through the object store is the rule that ``DataProto`` states."""
    return array if array.flags.writeable else np.asarray(_Memory(array))
