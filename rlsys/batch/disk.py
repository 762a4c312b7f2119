"""A batch as one safetensors file: raw buffers, and a JSON text that says what they are. No pickle.

Buffers (names as other safetensors readers show them)
    ``dense/NAME``      a dense column
    ``values/NAME``     a jagged column's values; its offsets are ``offsets/N``, shared by columns that have the same
    ``array/NAME``      bytes of a numeric or string array of non_tensor_batch
    ``header``          the JSON text: columns, arrays, objects, meta_info, and a checksum of every other buffer
Metadata: ``format``, ``version`` and the checksum of the header.

Objects are JSON with tags for what JSON does not have: tuples, NumPy arrays and scalars, dicts with keys that are no
strings.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor

from rlsys.batch import jagged
from rlsys.batch.wire import raw_bytes
from rlsys.config.errors import UserError

FORMAT, VERSION = "rlsys.DataProto", "1"
_TAG = "#"  # marks a JSON object that stands for something else
_HEADER = "header"

Parts = tuple[TensorDict | None, dict[str, np.ndarray], dict[str, Any]]


def save(path: str | os.PathLike[str], batch: TensorDict | None, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Writes the file beside and renames it into place, so that a reader sees the old one or the new.

    Raises:
        UserError: a column or meta_info holds what the file cannot, or the file cannot be written.
    """
    buffers: dict[str, Tensor] = {}
    header: dict[str, Any] = {
        "batch": None if batch is None else _describe_batch(batch, buffers),
        "arrays": {key: _describe_array(key, array, buffers) for key, array in arrays.items()},
        "meta_info": [[key, _encode_at(value, f"meta_info '{key}'")] for key, value in meta.items()],
    }
    header["checksums"] = {name: _checksum(buffer) for name, buffer in buffers.items()}
    text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    metadata = {"format": FORMAT, "version": VERSION, "checksum": str(_checksum(text))}
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(_apart(buffers | {_HEADER: text}), beside, metadata)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the batch could not be written: {error}",
            where=str(target),
            fix="check the folder and the space on the disk",
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Parts:
    """batch (on the CPU), non_tensor_batch and meta_info of a file that :func:`save` wrote.

    Raises:
        UserError: there is no such file, it is truncated or edited, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise _bad(path, "is a safetensors file, but not a batch")
            if metadata.get("version") != VERSION:
                raise _bad(path, f"is a batch of format version {metadata.get('version')}, this is version {VERSION}")
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise UserError(f"the batch could not be read: {error}", where=str(path), fix="check the path") from error
    except SafetensorError as error:
        raise _bad(path, f"is truncated or no batch at all ({error})") from error
    try:
        text = buffers.pop(_HEADER)
        if str(_checksum(text)) != metadata["checksum"]:
            raise _bad(path, "has a damaged header")
        header = json.loads(text.numpy().tobytes())
        for name, checksum in header["checksums"].items():
            if _checksum(buffers[name]) != checksum:
                raise _bad(path, f"is damaged: the bytes of '{name}' are not those that were written")
        batch = None if header["batch"] is None else _rebuild_batch(header["batch"], buffers)
        arrays = {key: _rebuild_array(key, described, buffers) for key, described in header["arrays"].items()}
        return batch, arrays, {key: _decode(value) for key, value in header["meta_info"]}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _bad(path, f"has a header that does not fit its buffers ({error!r})") from error


def _bad(path: str | os.PathLike[str], what: str) -> UserError:
    return UserError(f"the file {what}", where=str(path), fix="write it again with DataProto.save_to_disk")


# ---- columns


def _describe_batch(batch: TensorDict, buffers: dict[str, Tensor]) -> dict[str, Any]:
    columns: list[list[Any]] = []
    offsets: list[Tensor] = []
    for key, column in batch.items():
        if isinstance(column, Tensor) and not column.is_nested:
            buffers[f"dense/{key}"] = column.detach().cpu().contiguous()
            columns.append([key, {"kind": "dense"}])
        elif jagged.is_jagged(column):
            place = column._ragged_idx
            rows_first = column.transpose(1, place) if place != 1 else column
            buffers[f"values/{key}"] = jagged.values(rows_first).detach().cpu().contiguous()
            bounds = jagged.offsets(rows_first).cpu()
            index = next((i for i, known in enumerate(offsets) if torch.equal(known, bounds)), len(offsets))
            if index == len(offsets):
                offsets.append(bounds)
                buffers[f"offsets/{index}"] = bounds.contiguous()
            columns.append([key, {"kind": "jagged", "offsets": index, "ragged_dim": place}])
        else:
            raise UserError(
                f"a {type(column).__name__} cannot be written to disk",
                where=f"column '{key}'",
                fix="only dense and jagged tensor columns can",
            )
    return {"batch_size": list(batch.batch_size), "columns": columns}


def _rebuild_batch(described: dict[str, Any], buffers: dict[str, Tensor]) -> TensorDict:
    columns: dict[str, Tensor] = {}
    for key, column in described["columns"]:
        if column["kind"] == "dense":
            columns[key] = buffers[f"dense/{key}"]
            continue
        values, offsets = buffers[f"values/{key}"], buffers[f"offsets/{column['offsets']}"]
        rows_first = jagged.from_values(values, offsets=offsets)
        place = column["ragged_dim"]
        columns[key] = rows_first.transpose(1, place) if place != 1 else rows_first
    return TensorDict(columns, batch_size=described["batch_size"])


def _describe_array(key: str, array: np.ndarray, buffers: dict[str, Tensor]) -> dict[str, Any]:
    if array.dtype != object:
        buffers[f"array/{key}"] = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else \
            torch.empty(0, dtype=torch.uint8)  # fmt: skip
        return {"kind": "array", "dtype": _dtype_name(array.dtype, f"column '{key}'"), "shape": list(array.shape)}
    width = max(int(np.prod(array.shape[1:])), 1)
    cells = [_encode_at(cell, f"column '{key}', row {index // width}") for index, cell in enumerate(array.flat)]
    return {"kind": "objects", "shape": list(array.shape), "cells": cells}


def _rebuild_array(key: str, described: dict[str, Any], buffers: dict[str, Tensor]) -> np.ndarray:
    if described["kind"] == "array":
        return _array(buffers[f"array/{key}"].numpy().tobytes(), described)
    return _objects(described)


def _apart(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers each of which has its memory to itself: safetensors refuses to write one twice."""
    seen: set[int] = set()
    apart = {}
    for name, buffer in buffers.items():
        storage = buffer.untyped_storage()
        shared = storage.nbytes() != buffer.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        apart[name] = buffer.clone() if shared else buffer
    return apart


def _checksum(buffer: Tensor) -> int:
    return zlib.crc32(raw_bytes(buffer).numpy())


# ---- objects


class _NotJson(Exception):
    """What is not JSON-like: the type's name."""


def _encode_at(value: Any, where: str) -> Any:
    try:
        return _encode(value)
    except _NotJson as error:
        raise UserError(
            f"an object of type {error} cannot be written to disk",
            where=where,
            fix="keep strings, numbers, booleans, None, lists, tuples, dicts and NumPy arrays in object columns",
        ) from None
    except RecursionError:
        raise UserError("an object contains itself and cannot be written to disk", where=where) from None


def _encode(value: Any) -> Any:
    if value is None or type(value) in (str, bool, int, float):
        return value
    if type(value) is list:
        return [_encode(item) for item in value]
    if type(value) is tuple:
        return {_TAG: "tuple", "items": [_encode(item) for item in value]}
    if type(value) is dict:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _encode(item) for key, item in value.items()}
        return {_TAG: "dict", "items": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return {_TAG: "objects", "shape": list(value.shape), "cells": [_encode(cell) for cell in value.flat]}
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_TAG: kind, "dtype": _dtype_name(value.dtype), "shape": list(value.shape), "data": data}
    raise _NotJson(type(value).__name__)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item) for key, item in value.items()}
    return _DECODERS[value[_TAG]](value)


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tuple": lambda value: tuple(_decode(item) for item in value["items"]),
    "dict": lambda value: {_decode(key): _decode(item) for key, item in value["items"]},
    "objects": lambda value: _objects(value),
    "array": lambda value: _array(base64.b64decode(value["data"]), value),
    "scalar": lambda value: _array(base64.b64decode(value["data"]), value)[()],
}


def _objects(described: dict[str, Any]) -> np.ndarray:
    flat = np.empty(len(described["cells"]), dtype=object)
    for index, cell in enumerate(described["cells"]):
        flat[index] = _decode(cell)
    return flat.reshape(described["shape"])


def _array(data: bytes, described: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype=np.dtype(described["dtype"])).reshape(described["shape"])


def _dtype_name(dtype: np.dtype, where: str | None = None) -> str:
    """The dtype as text that NumPy reads back; records and sub-arrays have none."""
    if dtype.kind in "biufcSUmM":
        return dtype.str
    if where is None:
        raise _NotJson(f"ndarray of {dtype}")
    raise UserError(f"an array of {dtype} cannot be written to disk", where=where, fix="use a plain NumPy dtype")
