"""DataProto: the batch that flows through a training step. Names and meaning of its operations are verl's (0.9)."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from os import PathLike
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch import Tensor
from torch.utils.data import DataLoader

from rlsys.batch import disk, jagged, padded, rows
from rlsys.batch.equality import merge_meta_info, union_meta_info, union_numpy_dict, union_tensor_dict
from rlsys.batch.errors import BatchError
from rlsys.batch.objects import concat_arrays, describe, object_array
from rlsys.batch.wire import (
    deserialize_single_tensor,
    deserialize_tensordict,
    serialize_single_tensor,
    serialize_tensordict,
)

__all__ = [
    "DataProto",
    "DataProtoConfig",
    "DataProtoItem",
    "collate_fn",
    "deserialize_single_tensor",
    "deserialize_tensordict",
    "fold_batch_dim",
    "pad_dataproto_to_divisor",
    "serialize_single_tensor",
    "serialize_tensordict",
    "unfold_batch_dim",
    "union_numpy_dict",
    "union_tensor_dict",
    "unpad_dataproto",
]

_LOG = logging.getLogger(__name__)

RowIndex: TypeAlias = list | np.ndarray | Tensor


class DataProtoConfig:
    """Process-wide: whether ``chunk`` may be given a batch that it cannot divide equally."""

    auto_padding: bool = False
    auto_padding_key = "_auto_padding"  # the same for one batch, in its meta_info


@dataclass
class DataProtoItem:
    """One row. ``jagged``: the names of its columns whose rows differ in length."""

    batch: TensorDict | None = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)
    jagged: frozenset[str] = frozenset()


@dataclass(eq=False)
class DataProto:
    """Columns with one row a sample, and facts about all of them.

    Args:
        batch: tensor columns [B, …], dense or jagged (``rlsys.batch.jagged``); None: there are none.
        non_tensor_batch: columns of Python objects, numbers or strings, NumPy arrays [B, …].
        meta_info: what holds for the whole batch.

    Pickled, a batch is a small message and out-of-band buffers (protocol 5); tensors arrive on the CPU unless the whole
    batch was on a GPU that the reader has too. Through Ray's object store nothing is copied: the tensors a reader on
    the same node gets lie in the store's memory, which other readers share, so **a received batch is not written to in
    place**. Assign new columns, or take ``copy.deepcopy(data)`` first.

    Raises:
        BatchError: columns have different numbers of rows, or an object column is no array.
    """

    batch: Any = None  # TensorDict | None; not said in the type, or every reader would have to exclude None first
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.non_tensor_batch is None:
            self.non_tensor_batch = {}
        if self.meta_info is None:
            self.meta_info = {}
        self.check_consistency()

    # ---- size and checks

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return next((len(array) for array in self.non_tensor_batch.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes in tensor columns (a jagged one: its values) and arrays; of objects, the references only."""
        columns = [] if self.batch is None else [column for column in self.batch.values() if isinstance(column, Tensor)]
        tensors = sum(column.numel() * column.element_size() for column in columns)
        return tensors + sum(array.nbytes for array in self.non_tensor_batch.values())

    def check_consistency(self) -> None:
        """Raises:
        BatchError: columns have different numbers of rows, or an object column is no array.
        """
        if self.batch is not None and len(self.batch.batch_size) != 1:
            raise BatchError(f"a batch has one batch dimension, not {len(self.batch.batch_size)}")
        count = len(self) if self.batch is not None else None
        for key, array in self.non_tensor_batch.items():
            if not isinstance(array, np.ndarray):
                raise BatchError(f"column '{key}' of non_tensor_batch is no NumPy array but a {type(array).__name__}")
            if array.ndim == 0 or len(array) != (count := len(array) if count is None else count):
                raise BatchError(f"column '{key}' has shape {array.shape}, and the batch has {count} rows")

    def print_size(self, prefix: str = "") -> None:
        """Writes to the standard output how large the columns are."""
        arrays = sum(array.nbytes for array in self.non_tensor_batch.values())
        sizes = ((self.nbytes - arrays) / 1024**3, arrays / 1024**3)
        message = f"tensor columns: {sizes[0]:.6f} GiB, arrays: {sizes[1]:.6f} GiB"
        sys.stdout.write(f"{prefix}, {message}\n" if prefix else f"{message}\n")

    def get_data_info(self) -> str:
        """Columns with their shapes, dtypes and devices, and the types in meta_info, one a line."""
        columns = {} if self.batch is None else dict(self.batch.items())
        return "\n".join(describe(columns, self.non_tensor_batch, self.meta_info))

    # ---- made from, turned into

    @classmethod
    def from_single_dict(
        cls, data: Mapping[str, Any], meta_info: dict[str, Any] | None = None, auto_padding: bool = False
    ) -> Self:
        """Tensors and arrays of one dict, each where it belongs.

        Raises:
            ValueError: a value is neither.
        """
        for key, value in data.items():
            if not isinstance(value, Tensor | np.ndarray):
                raise ValueError(f"column '{key}' is neither a tensor nor an array but a {type(value).__name__}")
        tensors = {key: value for key, value in data.items() if isinstance(value, Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        return cls.from_dict(tensors=tensors, non_tensors=arrays, meta_info=meta_info, auto_padding=auto_padding)

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, Tensor] | None = None,
        non_tensors: Mapping[str, Any] | None = None,
        meta_info: dict[str, Any] | None = None,
        num_batch_dims: int = 1,
        auto_padding: bool = False,
    ) -> Self:
        """Columns of tensors, and of arrays or lists (which become object arrays).

        Args:
            num_batch_dims: so many leading dimensions must agree over all tensors.
            auto_padding: ``chunk`` of this batch need not be equal.

        Raises:
            BatchError: columns have different numbers of rows.
        """
        if num_batch_dims < 1:
            raise BatchError(f"num_batch_dims={num_batch_dims}: a batch has at least one")
        if non_tensors is not None and num_batch_dims != 1:
            raise BatchError("only num_batch_dims=1 goes together with non_tensors")
        batch = rows.from_columns(tensors, num_batch_dims) if tensors else None
        arrays = {
            key: value if isinstance(value, np.ndarray) else object_array(value)
            for key, value in (non_tensors or {}).items()
        }
        meta_info = {} if meta_info is None else meta_info
        if auto_padding:
            meta_info[DataProtoConfig.auto_padding_key] = True
        return cls(batch=batch, non_tensor_batch=arrays, meta_info=meta_info)

    @classmethod
    def from_tensordict(
        cls, tensor_dict: TensorDict, meta_info: dict[str, Any] | None = None, num_batch_dims: int = 1
    ) -> Self:
        """The reverse of :meth:`to_tensordict`: stacks of non-tensor data are object columns, single ones meta_info."""
        tensors = {key: value for key, value in tensor_dict.items() if isinstance(value, Tensor)}
        arrays, facts = {}, {} if meta_info is None else meta_info
        for key, value in tensor_dict.items():
            if isinstance(value, NonTensorData):
                facts[key] = value.data
            elif not isinstance(value, Tensor):
                arrays[key] = object_array([cell.data for cell in tensor_dict.get(key)])
        return cls.from_dict(tensors, arrays if arrays else None, facts, num_batch_dims)

    def to_tensordict(self) -> TensorDict:
        """One TensorDict: object columns as stacks of non-tensor data, meta_info as single ones.

        Raises:
            BatchError: a name is used twice.
        """
        columns = dict(self.batch.items()) if self.batch is not None else {}
        for name, keys in (("non_tensor_batch", self.non_tensor_batch), ("meta_info", self.meta_info)):
            if common := columns.keys() & keys.keys():
                raise BatchError(f"'{min(common)}' of {name} is the name of a column too")
            if name == "non_tensor_batch":
                columns |= {
                    key: NonTensorStack.from_list([NonTensorData(cell) for cell in array])
                    for key, array in self.non_tensor_batch.items()
                }
        columns |= {key: NonTensorData(value) for key, value in self.meta_info.items()}
        return TensorDict(columns, batch_size=[len(self)])

    def to_padded(self, pad_token_id: int = 0) -> Self:
        """The dense form with the field's usual names: see :func:`rlsys.batch.padded.to_padded`."""
        batch = padded.to_padded(self.batch, pad_token_id)
        return type(self)(batch, dict(self.non_tensor_batch), dict(self.meta_info))

    @classmethod
    def from_padded(cls, data: DataProto, response_columns: Sequence[str] = ()) -> Self:
        """The jagged form of a padded batch: see :func:`rlsys.batch.padded.from_padded`."""
        batch = padded.from_padded(data.batch, response_columns)
        return cls(batch, dict(data.non_tensor_batch), dict(data.meta_info))

    def save_to_disk(self, filepath: str | PathLike[str]) -> None:
        """Writes one safetensors file, beside and renamed into place; see ``rlsys.batch.disk``.

        Raises:
            UserError: an object is not JSON-like (the error names its column and row), or the file cannot be written.
        """
        disk.save(filepath, self.batch, self.non_tensor_batch, self.meta_info)

    @classmethod
    def load_from_disk(cls, filepath: str | PathLike[str]) -> Self:
        """Reads what :meth:`save_to_disk` wrote, to the CPU.

        Raises:
            UserError: there is no such file, it is truncated or edited, or it is something else.
        """
        return cls(*disk.load(filepath))

    save = save_to_disk
    load = load_from_disk

    def __getstate__(self) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
        return None if self.batch is None else serialize_tensordict(self.batch), self.non_tensor_batch, self.meta_info

    def __setstate__(self, state: tuple[Any, dict[str, np.ndarray], dict[str, Any]]) -> None:
        encoded, self.non_tensor_batch, self.meta_info = state
        self.batch = None if encoded is None else deserialize_tensordict(encoded, copy=False)

    def to(self, device: torch.device | str) -> Self:
        """Moves the tensor columns, in place; returns itself."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    # ---- columns

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> Self:
        """These columns and facts (None: all of a kind), sharing memory; deepcopy: with objects and facts of its own.

        Raises:
            KeyError: there is no such tensor column. Object columns and facts that are not there are left out.
        """
        batch = self.batch
        if batch_keys is not None and batch is None and len(batch_keys):
            raise KeyError(f"there are no tensor columns, and {list(batch_keys)} were asked for")
        if batch_keys is not None and batch is not None:
            batch = batch.select(*batch_keys)
        arrays = _some(self.non_tensor_batch, non_tensor_batch_keys)
        facts = _some(self.meta_info, meta_info_keys)
        if deepcopy:
            arrays, facts = copy.deepcopy(arrays), copy.deepcopy(facts)
        return type(self)(batch, arrays, facts)

    def pop(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
    ) -> Self:
        """Takes these columns and facts out, and returns them as a batch of their own.

        Raises:
            BatchError: one of them is not there; nothing has been taken then.
        """
        batch: Any = {} if self.batch is None else self.batch
        wanted = (
            (batch, batch_keys or (), "column", "batch"),
            (self.non_tensor_batch, non_tensor_batch_keys or (), "column", "non_tensor_batch"),
            (self.meta_info, meta_info_keys or (), "key", "meta_info"),
        )
        for source, keys, word, name in wanted:
            if missing := set(keys) - set(source.keys()):
                raise BatchError(f"there is no {word} '{min(missing)}' in {name}")
        tensors, arrays, facts = ({key: source.pop(key) for key in keys} for source, keys, _, _ in wanted)
        return type(self).from_dict(tensors, arrays, facts)

    def rename(self, old_keys: str | list[str] | None = None, new_keys: str | list[str] | None = None) -> Self:
        """Renames tensor columns, in place; returns itself.

        Raises:
            TypeError: keys are neither a name nor a list of names.
            ValueError: there are more of one than of the other.
            KeyError: there is no such column.
        """
        old, new = _names(old_keys), _names(new_keys)
        if len(old) != len(new):
            raise ValueError(f"{len(old)} columns cannot have {len(new)} new names")
        batch: Any = {} if self.batch is None else self.batch
        if missing := set(old) - set(batch.keys()):
            raise KeyError(f"there is no column '{min(missing)}'")
        for key, column in [(key, batch.pop(name)) for name, key in zip(old, new, strict=True)]:
            batch[key] = column
        return self

    def union(self, other: DataProto) -> Self:
        """Adds the columns and facts of another batch with the same rows, in place; returns itself.

        Raises:
            BatchError: the numbers of rows differ, or a column or fact is in both and not the same; nothing has been
                added of the kind that differs.
        """
        has_rows = [data for data in (self, other) if data.batch is not None or data.non_tensor_batch]
        if len(has_rows) == 2 and len(self) != len(other):
            raise BatchError(f"a batch of {len(self)} rows cannot take columns of {len(other)} rows")
        arrays = union_numpy_dict(dict(self.non_tensor_batch), other.non_tensor_batch)
        facts = union_meta_info(dict(self.meta_info), other.meta_info)
        if self.batch is None:
            self.batch = None if other.batch is None else other.batch.copy()
        elif other.batch is not None:
            union_tensor_dict(self.batch, other.batch)
        self.non_tensor_batch, self.meta_info = arrays, facts
        return self

    # ---- rows

    def __getitem__(self, item: int | slice | RowIndex) -> Any:
        """A row (``DataProtoItem``) for an int, a DataProto for everything else: slices, lists, arrays, tensors.

        Raises:
            TypeError: rows cannot be named like that.
            IndexError: there is no such row.
        """
        if isinstance(item, slice):
            return self.slice(item.start, item.stop, item.step)
        if isinstance(item, RowIndex):
            return self.select_idxs(item)
        if not isinstance(item, int | np.integer):
            raise TypeError(f"rows cannot be chosen by a {type(item).__name__}")
        if self.batch is None and not self.non_tensor_batch:
            raise IndexError(f"row {item} of 0")
        names = frozenset() if self.batch is None else frozenset(rows.nested_columns(self.batch))
        row = None if self.batch is None else rows.row(self.batch, int(item))
        return DataProtoItem(row, {key: a[item] for key, a in self.non_tensor_batch.items()}, self.meta_info, names)

    def select_idxs(self, idxs: RowIndex) -> Self:
        """The rows at these indices [b], or under this mask [B] of booleans, in that order; copies.

        Raises:
            IndexError: there is no such row.
        """
        return self._take(jagged.row_indices(_as_tensor(idxs), len(self)))

    def slice(self, start: int | None = None, end: int | None = None, step: int | None = None) -> Self:
        """Rows start … end-1, as Python slices mean it; views where step is 1."""
        where = slice(start, end, step)
        batch = None if self.batch is None else rows.cut(self.batch, *where.indices(len(self)))
        return type(self)(batch, {key: a[where] for key, a in self.non_tensor_batch.items()}, self.meta_info)

    def chunk(self, chunks: int) -> list[Self]:
        """``chunks`` runs of rows, equal unless auto padding is on (then the last ones may be shorter or empty).

        Raises:
            BatchError: the rows do not divide equally.
        """
        if not self.is_padding_enabled() and len(self) % chunks:
            raise BatchError(f"{len(self)} rows do not divide into {chunks} equal chunks")
        if self.batch is None:  # as np.array_split: sizes differ by one at most
            sizes = [(len(self) + index) // chunks for index in range(chunks)][::-1]
        else:
            size = -(-len(self) // chunks)
            sizes = [max(min(size, len(self) - size * index), 0) for index in range(chunks)]
        return self._split(sizes)

    def split(self, split_size: int) -> list[Self]:
        """Runs of ``split_size`` rows; the last may be shorter."""
        return self._split([min(split_size, len(self) - start) for start in range(0, len(self), split_size)])

    @staticmethod
    def concat(data: Sequence[DataProto]) -> DataProto:
        """Rows of all batches one after the other; the class is the first one's.

        A batch without any columns, such as an idle rank's, adds no rows.

        meta_info is merged. Under ``metrics`` each batch may have a dict or a list of dicts, one a worker; the result
        has one dict of lists, in the order of the batches.

        Raises:
            BatchError: a column is missing somewhere, or a fact has two values.
        """
        if not data:
            return DataProto()
        facts = merge_meta_info([part.meta_info for part in data])
        parts = [part for part in data if part.batch is not None or part.non_tensor_batch]
        batches = [part.batch for part in parts if part.batch is not None]
        if 0 < len(batches) < len(parts):
            raise BatchError("some of the batches have tensor columns and some have none")
        arrays = concat_arrays([part.non_tensor_batch for part in parts])
        return type(data[0])(rows.concat(batches) if batches else None, arrays, facts)

    def reorder(self, indices: RowIndex) -> None:
        """Puts the rows into this order, in place."""
        ordered = self.select_idxs(indices)
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> Self:
        """Every row so many times: each next to itself, or the whole batch again and again."""
        index = torch.arange(len(self))
        return self._take(index.repeat_interleave(repeat_times) if interleave else index.repeat(repeat_times))

    def sample_level_repeat(self, repeat_times: RowIndex | tuple[int, ...]) -> Self:
        """Row i ``repeat_times[i]`` times, next to itself.

        Raises:
            BatchError: there is not one number a row.
        """
        if not isinstance(repeat_times, list | tuple | np.ndarray | Tensor):
            raise BatchError(f"repeat_times is a list, tuple, array or tensor, not a {type(repeat_times).__name__}")
        times = torch.as_tensor(repeat_times, dtype=torch.int64).cpu()
        if times.shape != (len(self),):
            raise BatchError(f"repeat_times has shape {tuple(times.shape)}, and the batch has {len(self)} rows")
        return self._take(torch.arange(len(self)).repeat_interleave(times))

    def unfold_column_chunks(self, n_split: int, split_keys: Sequence[str] | None = None) -> Self:
        """Cuts the second dimension of the columns ``split_keys`` into ``n_split`` parts and makes each part a row; the
        rows of the other columns are repeated. A jagged column's rows must each divide equally.

        Raises:
            BatchError: a column's second dimension does not divide.
        """
        split = set(split_keys or ())
        tensors = [] if self.batch is None else [key for key in self.batch.keys() if key not in split]  # noqa: SIM118
        repeated = self.select(tensors, [key for key in self.non_tensor_batch if key not in split]).repeat(n_split)
        arrays = {
            key: rows.unfold_array(key, array, n_split) if key in split else repeated.non_tensor_batch[key]
            for key, array in self.non_tensor_batch.items()
        }
        if self.batch is None:
            return type(self)(None, arrays, self.meta_info)
        others = {} if repeated.batch is None else dict(repeated.batch.items())
        columns = {key: others[key] if key in others else rows.unfold(key, c, n_split) for key, c in self.batch.items()}
        batch = TensorDict(columns, batch_size=(len(self) * n_split,), device=self.batch.device)
        return type(self)(batch, arrays, self.meta_info)

    def make_iterator(
        self,
        mini_batch_size: int,
        epochs: int,
        seed: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Self]:
        """Mini-batches, ``epochs`` times over the rows; in their order unless ``dataloader_kwargs`` has shuffle=True.

        Args:
            seed: of the order. The order of an epoch is what torch's DataLoader gives for the seed.

        Raises:
            BatchError: the rows do not divide into mini-batches.
        """
        if len(self) % mini_batch_size:
            raise BatchError(f"{len(self)} % {mini_batch_size} != 0")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loader = DataLoader(
            range(len(self)),
            batch_size=mini_batch_size,
            collate_fn=self.select_idxs,
            generator=generator,
            **(dataloader_kwargs or {}),
        )
        return (mini_batch for _ in range(epochs) for mini_batch in loader)

    def is_padding_enabled(self) -> bool:
        return bool(self.meta_info.get(DataProtoConfig.auto_padding_key, False)) or DataProtoConfig.auto_padding

    def padding(self, padding_size: int, padding_candidate: str = "") -> None:
        """Appends the first ("first") or last row ``padding_size`` times, in place."""
        row = 0 if padding_candidate == "first" else len(self) - 1
        self.reorder(torch.cat([torch.arange(len(self)), torch.full((padding_size,), row)]))

    def _split(self, sizes: Sequence[int]) -> list[Self]:
        batches = [None] * len(sizes) if self.batch is None or not sizes else rows.split(self.batch, sizes)
        bounds = pairwise(accumulate(sizes, initial=0))
        arrays = [{key: a[start:stop] for key, a in self.non_tensor_batch.items()} for start, stop in bounds]
        return [type(self)(*columns, self.meta_info) for columns in zip(batches, arrays, strict=True)]

    def _take(self, index: Tensor) -> Self:
        batch = None if self.batch is None else rows.select(self.batch, index)
        where = index.numpy()
        return type(self)(batch, {key: a[where] for key, a in self.non_tensor_batch.items()}, self.meta_info)


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Appends rows from the first on, as often as needed, until ``size_divisor`` divides their number.

    Returns:
        The padded batch (``data`` itself where nothing is missing), and how many rows were appended.
    """
    if not isinstance(data, DataProto):
        raise BatchError(f"a DataProto is padded, not a {type(data).__name__}")
    missing = -len(data) % size_divisor
    if not len(data):
        _LOG.warning("a DataProto without rows cannot be padded")
    if not missing:
        return data, 0
    return data.select_idxs(torch.arange(len(data) + missing) % len(data)), missing


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """The batch without its last ``pad_size`` rows."""
    return data[:-pad_size] if pad_size else data


def fold_batch_dim(data: DataProto, new_batch_size: int) -> DataProto:
    """[B, …] columns as [new_batch_size, B / new_batch_size, …].

    Raises:
        BatchError: the rows do not divide, or a column is jagged (its rows have no common shape).
    """
    if len(data) % new_batch_size:
        raise BatchError(f"{len(data)} rows do not fold into {new_batch_size}")
    batch = None
    if data.batch is not None:
        rows.refuse_nested(data.batch, "folded")
        batch = data.batch.view(new_batch_size, -1)
        batch.auto_batch_size_(batch_dims=1)
    arrays = {key: a.reshape(new_batch_size, -1, *a.shape[1:]) for key, a in data.non_tensor_batch.items()}
    return type(data)(batch, arrays, data.meta_info)


def unfold_batch_dim(data: DataProto, batch_dims: int = 2) -> DataProto:
    """The first ``batch_dims`` dimensions of every column as one.

    Raises:
        BatchError: a column is jagged.
    """
    batch = None
    if data.batch is not None:
        rows.refuse_nested(data.batch, "unfolded")
        batch = data.batch.copy()
        batch.auto_batch_size_(batch_dims=batch_dims)
        batch = batch.view(-1)
    arrays = {key: a.reshape(-1, *a.shape[batch_dims:]) for key, a in data.non_tensor_batch.items()}
    return type(data)(batch, arrays, data.meta_info)


def collate_fn(x: Sequence[DataProtoItem]) -> DataProto:
    """A batch of rows (objects: one cell each)."""
    names = x[0].jagged
    singles: list[Any] = [item.batch for item in x]
    batch = None
    if singles[0] is not None:
        batch = torch.stack([single.exclude(*names) for single in singles]).contiguous()
        for name in names:
            batch.set(name, jagged.from_rows([single[name] for single in singles]))
    arrays = {key: object_array([item.non_tensor_batch[key] for item in x]) for key in x[0].non_tensor_batch}
    return DataProto(batch=batch, non_tensor_batch=arrays)


def _some(values: dict[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    return values if keys is None else {key: value for key, value in values.items() if key in keys}


def _names(keys: str | list[str] | None) -> list[str]:
    if isinstance(keys, str):
        return [keys]
    if not isinstance(keys, list):
        raise TypeError(f"columns are named by a string or a list of strings, not by a {type(keys).__name__}")
    return keys


def _as_tensor(idxs: RowIndex) -> Tensor:
    if isinstance(idxs, np.ndarray):  # a copy: arrays out of the object store are read-only
        return torch.from_numpy(idxs.astype(bool if idxs.dtype == bool else np.int64))
    return torch.as_tensor(idxs).cpu()
