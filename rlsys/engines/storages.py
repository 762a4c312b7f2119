"""Memory of tensors, given back and taken again in place: tensors, their views and whoever holds them stay as they are,
only the storage below them has no bytes meanwhile. Reading such a tensor is undefined, so an engine that rests says so
and answers nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor

from rlsys.tracking.memory import pss_bytes

_BLOCK = 256 << 20  # pinned memory is handed out in powers of two


def storages(tensors: Iterable[torch.Tensor], device: str) -> list[torch.UntypedStorage]:
    """What the tensors lie in on devices of this type (``cuda``), each storage once; empty ones are left out."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == device and local.untyped_storage().nbytes():
            found[local.untyped_storage()._cdata] = local.untyped_storage()
    return list(found.values())


def own(tensors: Iterable[torch.Tensor]) -> None:
    """Moves tensors that lie in memory which is not theirs to give back (a mapped file) into memory of their own."""
    for tensor in tensors:
        if not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


class Emptied:
    """Storages without bytes; what was in them is gone.

    nbytes: that were given back.
    """

    def __init__(self, held: Iterable[torch.UntypedStorage]):
        self._sizes = [(storage, storage.nbytes()) for storage in held]
        self.nbytes = sum(size for _, size in self._sizes)
        for storage, _ in self._sizes:
            storage.resize_(0)

    def restore(self) -> None:
        """Gives them bytes again, whatever these hold."""
        for storage, size in self._sizes:
            storage.resize_(size)


class HostMemory:
    """Main memory for what leaves a GPU, kept from one time to the next: pinning takes longer than filling it."""

    def __init__(self, *, pinned: bool):
        self._pinned = pinned
        self._blocks: list[torch.Tensor] = []

    def reserve(self, nbytes: int) -> None:
        missing = nbytes - sum(map(len, self._blocks))
        while missing > 0:
            size = min(missing, _BLOCK)
            self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
            missing -= size

    def pieces(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Bytes ``start : stop``, in as many pieces as there are blocks."""
        for block in self._blocks:
            if start < len(block) and stop > 0:
                yield block[max(start, 0) : min(stop, len(block))]
            start, stop = start - len(block), stop - len(block)


class Offloaded:
    """Storages without bytes, whose content is in main memory until :meth:`restore`, bit for bit.

    nbytes: that were given back.
    """

    @torch.no_grad()
    def __init__(self, held: Iterable[torch.UntypedStorage], host: HostMemory, start: int = 0):
        """start: where in ``host`` there is room."""
        kept = list(held)
        self._host, self._start = host, start
        self._sizes = [storage.nbytes() for storage in kept]
        self.nbytes = sum(self._sizes)
        host.reserve(start + self.nbytes)
        for device, piece in self._pairs(kept):
            piece.copy_(device, non_blocking=True)
        _wait(kept)
        self._emptied, self._kept = Emptied(kept), kept

    @torch.no_grad()
    def restore(self) -> None:
        self._emptied.restore()
        for device, piece in self._pairs(self._kept):
            device.copy_(piece, non_blocking=True)
        _wait(self._kept)

    def _pairs(self, held: list[torch.UntypedStorage]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Bytes of the storages, and where they lie in main memory."""
        at = self._start
        for storage, size in zip(held, self._sizes, strict=True):
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))
            offset = 0
            for piece in self._host.pieces(at, at + size):
                yield flat[offset : offset + len(piece)], piece
                offset += len(piece)
            at += size


def _wait(held: list[torch.UntypedStorage]) -> None:
    """Until copies from and to GPUs have been made."""
    if any(storage.device.type == "cuda" for storage in held):
        torch.cuda.synchronize()


def _trim() -> None:
    """Has the C library hand back to the system what was freed: it keeps pieces of a few MiB for itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def used_bytes(device: torch.device) -> int:
    """Of a GPU, by whoever uses it; else this process's memory (its share of what it has in common with others)."""
    if device.type != "cuda":
        _trim()
        return pss_bytes(os.getpid())
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free
