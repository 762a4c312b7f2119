"""Weights from trainer to sampler inside one GPU: each trainer rank packs them into a bucket in its own GPU's memory,
and the sampler's rank on that GPU maps it by CUDA's handle of it. Nothing passes through main memory.

Every rank has each weight whole for a moment (``export_weights`` gathers it everywhere), so every GPU has a sender of
its own. The bucket is written over as soon as every sampler has answered that it has read what is in it. One update
exports it once and each receiver maps it once: CUDA counts the two against each other before memory goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsys.config.errors import UserError
from rlsys.engines.sync.buckets import Entry, aligned
from rlsys.engines.sync.checksum import WeightsChecksum

BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class IpcHandle:
    """How another process of this host opens a flat buffer of bytes on a GPU.

    gpu: the GPU's UUID (its index differs from process to process). The others are what torch's reduction of a CUDA
    tensor gives (``torch.multiprocessing.reductions``): size: bytes of the storage; offset: of the storage in the
    allocation that ``memory`` names, bytes; start, length: of the buffer in the storage; counter, counter_at: where
    receivers are counted; event, event_sync: what the receiver's stream must wait for.
    """

    gpu: str
    memory: bytes
    size: int
    offset: int
    start: int
    length: int
    counter: bytes
    counter_at: int
    event: bytes
    event_sync: bool

    @classmethod
    def of(cls, buffer: torch.Tensor) -> IpcHandle:
        """Of a flat uint8 tensor on a GPU, a new export: it is to be opened by one process, once."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

        rebuild, fields = reduce_tensor(buffer)
        if rebuild is not rebuild_cuda_tensor:
            raise TypeError(f"a buffer on {buffer.device} has no CUDA handle")
        (_, length, _, start, _, _, _, memory, size, offset, _, counter, counter_at, event, event_sync) = fields
        gpu = gpu_uuid(buffer.device)
        return cls(gpu, memory, size, offset, start, length[0], counter, counter_at, event, bool(event_sync))

    def open(self, device: torch.device) -> torch.Tensor:
        """The buffer as this process sees it: while the tensor lives, the sender's memory is mapped.

        Args:
            device: the same GPU, by this process's index.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        if gpu_uuid(device) != self.gpu:
            raise ValueError(f"a handle of GPU {self.gpu} came to a process on {gpu_uuid(device)}")
        return rebuild_cuda_tensor(
            torch.Tensor,
            (self.length,),
            (1,),
            self.start,
            torch.storage.TypedStorage,
            torch.uint8,
            device.index if device.index is not None else torch.cuda.current_device(),
            self.memory,
            self.size,
            self.offset,
            False,
            self.counter,
            self.counter_at,
            self.event,
            self.event_sync,
        )


def gpu_uuid(device: torch.device) -> str:
    """Raises:
    UserError: it is not a GPU.
    """
    if device.type != "cuda":
        raise UserError(
            "CUDA hands memory from process to process of one GPU, and there is none",
            where="rollout.sync",
            fix="set rollout.sync=auto or shared_memory",
        )
    return str(torch.cuda.get_device_properties(device).uuid)


@dataclass(frozen=True)
class IpcBucket:
    """Some of the weights, in the memory of one or several GPUs. handles: by GPU, of the same bytes."""

    handles: tuple[Any, ...]
    entries: tuple[Entry, ...]
    nbytes: int

    def merged(self, others: Iterable[IpcBucket]) -> IpcBucket:
        """With the handles of other ranks, which packed the same weights."""
        every = [self, *others]
        if any(bucket.entries != self.entries for bucket in every):
            raise ValueError("trainer ranks have packed different weights")
        return IpcBucket(tuple(handle for bucket in every for handle in bucket.handles), self.entries, self.nbytes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies, on this process's present GPU; for an engine that lives in the calling process."""
        device = torch.device("cuda", torch.cuda.current_device())
        yield from _PROCESS.tensors(self, device)
        torch.cuda.synchronize(device)  # who asks for the next bucket lets another process write over this one


class IpcSender:
    """One trainer rank's side of an update.

    Args:
        weights: name and tensor, on the device; gathering them is a collective, so every rank calls :meth:`next`
            equally often.
        allocate: makes a flat uint8 buffer on the device; export: makes the handle of one; wait: until what was asked
            of the device is done.
    """

    def __init__(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        allocate: Callable[[int], torch.Tensor],
        export: Callable[[torch.Tensor], Any] = IpcHandle.of,
        wait: Callable[[], None] = torch.cuda.synchronize,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self._weights, self._allocate, self._export, self._wait = iter(weights), allocate, export, wait
        self._bucket_bytes = bucket_bytes
        self._buffer: torch.Tensor | None = None
        self._handle: Any = None
        self._pending = next(self._weights, None)
        self.checksum = WeightsChecksum()
        self.nbytes = 0

    @torch.no_grad()
    def next(self) -> IpcBucket | None:
        """The next bucket, over the one before: every receiver has read that. None: there is no more."""
        entries: list[Entry] = []
        end = 0
        while self._pending is not None:
            name, tensor = self._pending
            nbytes = aligned(tensor)
            if entries and end + nbytes > self._bucket_bytes:
                break
            buffer = self._room(nbytes)
            entry = Entry.of(name, tensor, end)
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            buffer[end : end + len(raw)].copy_(raw)
            self.checksum.add(name, tensor)
            entries.append(entry)
            end += nbytes
            self._pending = next(self._weights, None)
        if not entries:
            self.close()
            return None
        self._wait()
        self.nbytes += end
        return IpcBucket((self._handle,), tuple(entries), end)

    def close(self) -> None:
        """Gives the buffer back, once the receivers have let go of it."""
        self._buffer = self._handle = None

    def _room(self, nbytes: int) -> torch.Tensor:
        """The buffer; a new one, exported anew, for a first tensor that is larger than it."""
        if self._buffer is None or nbytes > len(self._buffer):
            self._buffer = self._allocate(max(nbytes, self._bucket_bytes))
            self._handle = self._export(self._buffer)
        return self._buffer


class IpcReceiver:
    """One process's side: maps the sender's buffer when it first comes, and keeps the mapping until another comes or
    :meth:`close`."""

    def __init__(self, open_handle: Callable[[Any, torch.device], torch.Tensor] = IpcHandle.open):
        self._open = open_handle
        self._mapped: tuple[Any, torch.Tensor] | None = None

    def tensors(self, bucket: IpcBucket, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of the weights: whoever keeps one until its layer is complete must not see the next bucket's bytes.

        Raises:
            ValueError: none of the handles is of this GPU.
        """
        handle = _handle_of(bucket.handles, device)
        if self._mapped is None or self._mapped[0] != handle:
            self._mapped = None  # let go of the old one first
            self._mapped = handle, self._open(handle, device)
        buffer = self._mapped[1]
        for entry in bucket.entries:
            dtype = getattr(torch, entry.dtype)
            nbytes = torch.Size(entry.shape).numel() * dtype.itemsize
            yield entry.name, buffer[entry.offset : entry.offset + nbytes].clone().view(dtype).view(entry.shape)

    def close(self) -> None:
        self._mapped = None


def _handle_of(handles: Sequence[Any], device: torch.device) -> Any:
    gpu = gpu_uuid(device) if device.type == "cuda" else ""
    for handle in handles:
        if handle.gpu == gpu:
            return handle
    raise ValueError(f"no trainer rank is on GPU {gpu}, only on {', '.join(handle.gpu for handle in handles)}")


_PROCESS = IpcReceiver()


def close_mapping() -> None:
    """After an update that this very process received: lets go of the sender's memory."""
    _PROCESS.close()
