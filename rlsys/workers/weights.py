"""Weights on their way: what a trainer rank sends, what a sampler's actor opens, and the transport between them.

- ``shared_memory``: rank 0 writes once, samplers on its host map that memory. Rank 0 keeps it while an eighth
  of main memory is free.
- ``object_store``: flat buckets through Ray's object store, fetched one at a time.
- ``delta``: through the object store, only what changed. Rank 0 keeps a copy of what it sent, each sampler's actor too.
- ``cuda_ipc``: every rank packs a bucket on its GPU, which the sampler there maps; one bucket after the other, each
  while all wait (``rlsys.engines.sync.cuda_ipc``).
- ``nccl``: rank 0 broadcasts packed buckets to the samplers' GPUs (``rlsys.engines.sync.broadcast``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import ray
import torch

from rlsys.batch.versions import WeightVersion
from rlsys.engines.sync.broadcast import Broadcast
from rlsys.engines.sync.buckets import Entry, Parcel, pack
from rlsys.engines.sync.checksum import WeightsChecksum
from rlsys.engines.sync.cuda_ipc import IpcBucket
from rlsys.engines.sync.delta import DeltaSender, Mirror
from rlsys.engines.sync.shared_memory import Segment, SharedBucket, host_identity, main_memory
from rlsys.engines.sync.transport import Transport

Weights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Host:
    """Where an actor runs. identity: equal where memory can be shared; gpu: whether it has one; gpus: UUIDs of those
    that weights lie on."""

    identity: str
    gpu: bool
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls, gpus: Iterable[str] = ()) -> Host:
        return cls(host_identity(), torch.cuda.is_available(), tuple(gpus))

    def places(self) -> set[tuple[str, str]]:
        """Its GPUs, each with where its memory can be handed over."""
        return {(self.identity, gpu) for gpu in self.gpus}


@dataclass(frozen=True)
class SendRequest:
    """What the driver asks of the trainer. version: of the weights; base: the version that every sampler holds, where
    changes to it are enough; None: not known; adapter: the adapter alone."""

    transport: Transport
    version: WeightVersion
    base: WeightVersion | None = None
    adapter: bool = False


@dataclass(frozen=True)
class SentWeights:
    """What the driver hands on. parcels: references of buckets, or where the memory is; checksum: of the weights that
    were sent; nbytes: of what travels; seconds: that rank 0 spent on each part; index: of what will be broadcast."""

    transport: Transport
    parcels: list[ray.ObjectRef] | SharedBucket
    checksum: str
    nbytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    index: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class TakenWeights:
    """A sampler's answer: the checksum of what it now computes with, and the seconds that each part took."""

    checksum: str
    seconds: dict[str, float]


class WeightSender:
    """Rank 0's side, for any transport that the driver asks for."""

    def __init__(self) -> None:
        self._segment = Segment(memory=main_memory)
        self._delta = DeltaSender()

    def send(self, weights: Weights, request: SendRequest, held: Mapping[str, bytes] | None = None) -> SentWeights:
        """Hands out ``weights``.

        Args:
            weights: as the engine exports them, CPU tensors in the sampler's dtype.
            held: ``tensor_digest`` of further weights, which every sampler has: they are not sent, and count.
        """
        clock = _Clock()
        checksum = WeightsChecksum()
        for name, digest in (held or {}).items():
            checksum.add_digest(name, digest)
        if request.transport == "shared_memory":
            return self._shared(clock.timed(weights), clock, checksum)

        def checked() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in clock.timed(weights):
                with clock.part("checksum"):
                    checksum.add(name, tensor)
                yield name, tensor

        buckets: Iterable[Any]
        if request.transport == "delta":
            buckets = self._delta.encode(checked(), request.version, request.base)
        else:
            buckets = pack(checked())
        refs, nbytes = [], 0
        for bucket in buckets:
            nbytes += bucket.nbytes
            refs.append(ray.put(bucket))
        return SentWeights(request.transport, refs, checksum.hexdigest(), nbytes, clock.seconds("write"))

    def _shared(self, weights: Weights, clock: _Clock, checksum: WeightsChecksum) -> SentWeights:
        for name, written in self._segment.write(weights):
            with clock.part("checksum"):
                checksum.add(name, written)
        bucket = self._segment.bucket()
        return SentWeights("shared_memory", bucket, checksum.hexdigest(), bucket.nbytes, clock.seconds("write"))

    def release(self) -> None:
        """Called when every sampler has its weights. Memory stays for the next update where there is enough."""
        self._segment.let_go()


class Handover:
    """Parcels that an engine is handed one at a time, from another thread than the one that it reads them in."""

    def __init__(self) -> None:
        self._offered: SimpleQueue[tuple[IpcBucket | None, Future[None]]] = SimpleQueue()
        self._error: BaseException | None = None

    def offer(self, bucket: IpcBucket | None) -> Future[None]:
        """Done when the engine asks for the next one: it has then read this one, and its memory may be written to."""
        read: Future[None] = Future()
        if self._error is not None:
            read.set_exception(self._error)
        else:
            self._offered.put((bucket, read))
        return read

    def abandon(self, error: BaseException) -> None:
        self._error = error
        while not self._offered.empty():
            self._offered.get()[1].set_exception(error)

    def __iter__(self) -> Iterator[IpcBucket]:
        while True:
            bucket, read = self._offered.get()
            if bucket is None:
                read.set_result(None)
                return
            try:
                yield bucket
            except BaseException as error:
                read.set_exception(error)
                raise
            read.set_result(None)


class WeightIntake:
    """A sampler's actor's side: opens what the trainer sent."""

    def __init__(self) -> None:
        self._mirror = Mirror()
        self._handover = Handover()

    def offer(self, bucket: IpcBucket | None) -> Future[None]:
        """Hands the engine one bucket of an update that was opened; None: there are no more. Done when it was read."""
        return self._handover.offer(bucket)

    def abandon(self, error: BaseException) -> None:
        """The update broke off: nobody reads any more."""
        self._handover.abandon(error)

    def open(self, sent: SentWeights) -> Iterable[Parcel]:
        """Parcels for the engine, fetched one at a time: what has been loaded may leave the object store. The engine
        does not sample meanwhile, so a wait for the next one keeps nobody waiting."""
        if isinstance(sent.parcels, SharedBucket):
            return [sent.parcels]
        if sent.transport == "cuda_ipc":
            self._handover = Handover()
            return self._handover
        if sent.transport == "nccl":
            return [Broadcast(sent.index)]
        fetched = (ray.get(ref) for ref in sent.parcels)
        return [self._mirror.apply(fetched)] if sent.transport == "delta" else fetched


class _Clock:
    """Seconds by part of one send; what is not timed by name is the rest."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    def timed(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights``; the time until each is there counts as ``gather``."""
        iterator = iter(weights)
        while True:
            with self.part("gather"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def part(self, name: str) -> _Part:
        return _Part(self._parts, name)

    def seconds(self, rest: str) -> dict[str, float]:
        """By part; everything else since the beginning under ``rest``."""
        total = time.perf_counter() - self._began
        return self._parts | {rest: total - sum(self._parts.values())}


class _Part:
    def __init__(self, parts: dict[str, float], name: str):
        self._parts, self._name = parts, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._parts[self._name] = self._parts.get(self._name, 0.0) + time.perf_counter() - self._began
