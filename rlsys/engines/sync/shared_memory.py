"""Weights in memory that the sender writes once and every sampler on its host maps, read-only.

The memory has no name and belongs to the sender: a receiver opens it by the sender's file descriptor (``/proc``), and
nothing is left behind when a process is killed. That takes one host, one process-id namespace and one user, which is
what ``host_identity`` compares.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsys.engines.sync.buckets import Entry, aligned

KEPT_BYTES = 1 << 30  # memory up to this stays with the sender: taking new pages costs more time than the copy


@dataclass(frozen=True)
class SharedBucket:
    """Weights in a sender's memory. path: as which a process of the same host opens it; it holds until the sender
    writes again or releases it. kept: the sender will write its next update there too."""

    path: str
    nbytes: int
    entries: tuple[Entry, ...]
    kept: bool = False

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the mapped memory, not to be written to; what is kept stays mapped until the next bucket is."""
        memory = _mapping(self)
        for entry in self.entries:
            yield entry.name, entry.view(memory)


_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
_mapped: dict[tuple[int, int, int], mmap.mmap] = {}  # at most one


def _mapping(bucket: SharedBucket) -> mmap.mmap:
    """The bucket's memory, from the last time if it is the same."""
    with open(bucket.path, "rb") as file:
        stat = os.fstat(file.fileno())
        key = (stat.st_dev, stat.st_ino, bucket.nbytes)
        memory = _mapped.get(key)
        if memory is None:
            _mapped.clear()
            # Page tables in one go: touching page after page would take as long as the copy that this saves.
            memory = mmap.mmap(file.fileno(), bucket.nbytes, mmap.MAP_SHARED | _POPULATE, mmap.PROT_READ)
        if bucket.kept:
            _mapped[key] = memory
    return memory


class Segment:
    """A sender's side: memory that grows to what is written, and is written over by the next update.

    Args:
        name: shown by the system's tools.
    """

    def __init__(self, name: str = "rlsys-weights"):
        self._name = name
        self._descriptor: int | None = None
        self._memory: mmap.mmap | None = None
        self._size = self._end = 0
        self._entries: list[Entry] = []

    def write(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies ``weights`` in from the start on; yields each as it now lies in the memory (do not keep it)."""
        self._entries, self._end = [], 0
        for name, tensor in weights:
            yield name, self.append(name, tensor)

    def append(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copies one tensor behind what is there; returns it as it lies in the memory (do not keep it)."""
        entry, end = Entry.of(name, tensor, self._end), self._end + aligned(tensor)
        self._grow(end)
        self._entries.append(entry)
        self._end = end
        return self.view(entry).copy_(tensor)

    def view(self, entry: Entry) -> torch.Tensor:
        """One tensor in the memory; while it lives the memory cannot grow."""
        return entry.view(self._memory)

    def bucket(self) -> SharedBucket:
        """What has been written, for the receivers."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return SharedBucket(path, self._end, tuple(self._entries), kept=self._end <= KEPT_BYTES)

    def let_go(self) -> None:
        """Called when every receiver has its weights: releases what is too much to keep."""
        if self._end > KEPT_BYTES:
            self.release()

    def release(self) -> None:
        """Gives the memory back to the system once no receiver maps it any more."""
        if self._memory is not None:
            self._memory.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._memory = None
        self._size = self._end = 0
        self._entries = []

    def _grow(self, end: int) -> None:
        if end <= self._size and self._memory is not None:
            return
        if self._descriptor is None:
            self._descriptor = os.memfd_create(self._name)
        # Pages are taken when they are written: asking for twice as much costs addresses only.
        size = max(2 * end, mmap.PAGESIZE)
        os.ftruncate(self._descriptor, size)
        if self._memory is not None:
            self._memory.close()
        self._memory, self._size = mmap.mmap(self._descriptor, size), size


def host_identity() -> str:
    """Equal for two processes exactly when each can open the other's shared memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}:{os.getuid()}"
