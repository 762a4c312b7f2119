"""Weights on their way from trainer to sampler: a few large flat buffers instead of one message a parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

_ALIGNMENT = 16

Buffer = Any  # bytes in memory: a numpy array, an mmap


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a bucket: byte offset, dtype name ('float32') and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, offset: int) -> Entry:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)

    def view(self, data: Buffer) -> torch.Tensor:
        """The tensor as it lies in ``data``."""
        dtype, count = getattr(torch, self.dtype), math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(data, dtype=dtype, count=count, offset=self.offset).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """A flat byte buffer (numpy, so that an object store shares it without a copy) and its index."""

    data: np.ndarray
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the buffer, not to be written to: it may be an object store's read-only memory."""
        for entry in self.entries:
            yield entry.name, entry.view(self.data)


class Parcel(Protocol):
    """Anything that weights travel in."""

    @property
    def nbytes(self) -> int: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = 256 << 20) -> Iterator[Bucket]:
    """Packs tensors in order into buckets of at most ``bucket_bytes`` (a larger tensor gets its own)."""
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        nbytes = aligned(tensor)
        if pending and size + nbytes > bucket_bytes:
            yield _bucket(pending)
            pending, size = [], 0
        pending.append((name, tensor.detach().cpu().contiguous()))
        size += nbytes
    if pending:
        yield _bucket(pending)


def _bucket(tensors: list[tuple[str, torch.Tensor]]) -> Bucket:
    entries, offset = [], 0
    for name, tensor in tensors:
        entries.append(Entry.of(name, tensor, offset))
        offset += aligned(tensor)
    data = np.empty(offset, dtype=np.uint8)
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        data[entry.offset : entry.offset + raw.nbytes] = raw
    return Bucket(data, tuple(entries))


def aligned(tensor: torch.Tensor) -> int:
    """Bytes of ``tensor``, rounded up so that the next one starts where any dtype may be read."""
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
