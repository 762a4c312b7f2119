"""Weights in memory that the sender writes once and every sampler on its host maps, read-only.

The memory has no name and belongs to the sender: a receiver opens it by the sender's file descriptor (``/proc``), and
nothing is left behind when a process is killed. That takes one host, one process-id namespace and one user, which is
what ``host_identity`` compares.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsys.engines.footprint import free_and_total, gib
from rlsys.engines.sync.buckets import Entry, aligned

_LOG = logging.getLogger(__name__)
FREE_SHARE = 0.125  # of main memory: Ray begins to end workers when a twentieth is left
Memory = Callable[[], tuple[int, int]]  # free and total bytes


def main_memory() -> tuple[int, int]:
    """What the segment is taken from: a file without a name is no part of /dev/shm, and its limit does not hold."""
    return free_and_total(torch.device("cpu"))


def affordable(free: int, total: int) -> bool:
    """Whether weights that lie in memory may stay there until the next update. Taking new pages costs many times what
    the copy does, so they do while others have room.

    Args:
        free: bytes, beside those weights; total: of main memory.
    """
    return free >= FREE_SHARE * total


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
        memory = _mapped.pop(key, None)
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
        memory: what there is of it, asked at each update, to say whether the segment stays; None: it stays.
    """

    def __init__(self, name: str = "rlsys-weights", memory: Memory | None = None):
        self._name, self._available = name, memory
        self._kept, self._told = True, False
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
        if self._available is not None:
            self._kept = self._affordable(*self._available())
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return SharedBucket(path, self._end, tuple(self._entries), kept=self._kept)

    def let_go(self) -> None:
        """Called when every receiver has its weights: releases the memory unless the bucket said that it is kept."""
        if not self._kept:
            self.release()

    def _affordable(self, free: int, total: int) -> bool:
        kept = affordable(free, total)
        if not kept and not self._told:
            self._told = True
            _LOG.warning(
                "%s GiB of %s are free in main memory: the %s GiB that weights go to the samplers in are given back "
                "after each update, which makes the next one many times slower",
                *(gib(nbytes) for nbytes in (free, total, self._end)),
            )
        return kept

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
