"""Weights on their way from trainer to sampler: a few large flat buffers instead of one message a parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

_ALIGNMENT = 16


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a bucket: byte offset, dtype name ('float32') and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """A flat byte buffer (numpy, so that an object store shares it without a copy) and its index."""

    data: np.ndarray
    entries: tuple[Entry, ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the buffer, not to be written to: it may be an object store's read-only memory."""
        for entry in self.entries:
            dtype = getattr(torch, entry.dtype)
            count = math.prod(entry.shape)
            if count == 0:
                yield entry.name, torch.empty(entry.shape, dtype=dtype)
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                flat = torch.frombuffer(self.data, dtype=dtype, count=count, offset=entry.offset)
            yield entry.name, flat.view(entry.shape)


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = 256 << 20) -> Iterator[Bucket]:
    """Packs tensors in order into buckets of at most ``bucket_bytes`` (a larger tensor gets its own)."""
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        nbytes = _aligned(tensor)
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
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset += _aligned(tensor)
    data = np.empty(offset, dtype=np.uint8)
    for entry, (_, tensor) in zip(entries, tensors, strict=True):
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        data[entry.offset : entry.offset + raw.nbytes] = raw
    return Bucket(data, tuple(entries))


def _aligned(tensor: torch.Tensor) -> int:
    """Bytes of ``tensor``, rounded up so that the next one starts where any dtype may be read."""
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
