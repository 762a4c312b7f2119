"""Only what changed since the last update, without loss: positions and new values in the sampler's dtype.

At a learning rate of 1e-6 an optimiser step moves most weights by less than half of what bfloat16 can tell apart, so
few of them change. The sender keeps what it sent last, the sampler's host a mirror of it; a tensor travels whole where
nothing is known of it or where its changes would be no smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rlsys.batch.versions import WeightVersion
from rlsys.engines.sync.buckets import Entry
from rlsys.engines.sync.shared_memory import Segment, SharedBucket
from rlsys.engines.sync.verify import SyncError

_BLOCK = 1 << 16  # elements whose positions are told apart by two bytes
_NUMPY = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """One tensor of a delta. entry: where its bytes begin; changed: how many elements of it are new; None: all, and it
    travels whole. Behind changed values lie their count in each block of 65,536 elements (uint32) and their positions
    in it (uint16)."""

    entry: Entry
    changed: int | None


@dataclass(frozen=True)
class DeltaBucket:
    """data: flat bytes. base: version of the weights that the changes are to; None: every tensor is whole."""

    data: np.ndarray
    changes: tuple[Change, ...]
    base: WeightVersion | None
    version: WeightVersion

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class DeltaSender:
    """Knows what it sent last. Holds a copy of the weights in the sampler's dtype."""

    def __init__(self) -> None:
        self._sent: dict[str, torch.Tensor] = {}
        self.version: WeightVersion | None = None

    def encode(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: WeightVersion,
        base: WeightVersion | None,
        bucket_bytes: int = 256 << 20,
    ) -> Iterator[DeltaBucket]:
        """What turns the weights of ``base`` into ``weights``, CPU tensors. To be exhausted.

        Args:
            version: of ``weights``.
            base: what every receiver holds; anything else than what was sent last, or None, sends everything.
            bucket_bytes: size from which on a bucket is full.
        """
        known = base is not None and base == self.version
        if not known:
            self._sent.clear()
        self.version = None  # until all of it is encoded, what was sent is neither the one nor the other
        parts: list[np.ndarray] = []
        changes: list[Change] = []
        offset = 0
        for name, tensor in weights:
            payload, changed = self._encode_one(name, tensor.detach().contiguous())
            changes.append(Change(Entry.of(name, tensor, offset), changed))
            parts.append(payload)
            offset += len(payload)
            if offset >= bucket_bytes:
                yield DeltaBucket(np.concatenate(parts), tuple(changes), base if known else None, version)
                parts, changes, offset = [], [], 0
        if changes:
            yield DeltaBucket(np.concatenate(parts), tuple(changes), base if known else None, version)
        self.version = version

    def _encode_one(self, name: str, tensor: torch.Tensor) -> tuple[np.ndarray, int | None]:
        new, old = _bits(tensor), self._sent.get(name)
        if old is None or old.shape != new.shape or old.dtype != new.dtype:
            self._sent[name] = new.clone()
            return _padded(new.numpy()), None
        positions = torch.nonzero(new != old).flatten()
        values = new[positions]
        old[positions] = values
        changed = len(positions)
        whole = new.numel() * new.element_size()
        if _payload_bytes(changed, new.numel(), new.element_size()) >= whole:
            return _padded(new.numpy()), None
        blocks = math.ceil(new.numel() / _BLOCK)
        counts = np.bincount((positions >> 16).numpy(), minlength=blocks).astype(np.uint32)
        low = (positions & (_BLOCK - 1)).to(torch.int32).numpy().astype(np.uint16)
        return _padded(values.numpy(), counts, low), changed


class Mirror:
    """The receiving host's copy of what was sent, in shared memory that samplers map.

    version: of the weights in it; None: there are none, or an update of it broke off.
    """

    def __init__(self) -> None:
        self._segment = Segment("rlsys-mirror")
        self._entries: dict[str, Entry] = {}
        self.version: WeightVersion | None = None

    def apply(self, buckets: Iterable[DeltaBucket]) -> SharedBucket:
        """Takes over what is new; returns all of the weights.

        Raises:
            SyncError: the changes are to other weights than the mirror has.
        """
        held, self.version = self.version, None
        version = None
        for bucket in buckets:
            if bucket.base is not None and bucket.base != held:
                raise SyncError(f"changes to the weights of {bucket.base} came to a sampler that has those of {held}")
            if bucket.base is None and version is None:
                self.release()
            version = bucket.version
            for change in bucket.changes:
                self._apply_one(change, bucket.data)
        self.version = version
        return self._segment.bucket()

    def _apply_one(self, change: Change, data: np.ndarray) -> None:
        entry = change.entry
        if change.changed is None:
            tensor = entry.view(data)
            if entry.name in self._entries:
                self._segment.view(self._entries[entry.name]).copy_(tensor)
            else:
                self._segment.append(entry.name, tensor)
                self._entries[entry.name] = self._segment.bucket().entries[-1]
            return
        if entry.name not in self._entries:
            raise SyncError(f"changes came to '{entry.name}', of which the sampler has nothing")
        held = _bits(self._segment.view(self._entries[entry.name]))
        values, positions = _decode(change, data)
        held[positions] = values

    def release(self) -> None:
        """Forgets the weights."""
        self._segment.release()
        self._entries.clear()
        self.version = None


def _decode(change: Change, data: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """New values [changed], as integers of their bits, and their positions in the flat tensor [changed]."""
    entry, changed = change.entry, change.changed or 0
    size = getattr(torch, entry.dtype).itemsize
    blocks = math.ceil(math.prod(entry.shape) / _BLOCK)
    values = data[entry.offset :][: changed * size].view(_NUMPY[size]).copy()
    at = entry.offset + _aligned(changed * size)
    counts = data[at:][: 4 * blocks].view(np.uint32).astype(np.int64)
    at += _aligned(4 * blocks)
    low = data[at:][: 2 * changed].view(np.uint16).astype(np.int64)
    return torch.from_numpy(values), torch.from_numpy(np.repeat(np.arange(blocks), counts) * _BLOCK + low)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """[n] the tensor's bits as integers, a view: −0 is not 0 and a NaN equals itself."""
    flat = tensor.reshape(-1)
    return flat.view(_INTEGER[flat.element_size()])


def _padded(*arrays: np.ndarray) -> np.ndarray:
    """The arrays' bytes, each starting where any dtype may be read."""
    sizes = [_aligned(array.nbytes) for array in arrays]
    flat = np.zeros(sum(sizes), dtype=np.uint8)
    offset = 0
    for array, size in zip(arrays, sizes, strict=True):
        flat[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        offset += size
    return flat


def _payload_bytes(changed: int, elements: int, itemsize: int) -> int:
    return _aligned(changed * itemsize) + _aligned(4 * math.ceil(elements / _BLOCK)) + _aligned(2 * changed)


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / 16) * 16
