"""Weights from process to process of one GPU. Without one: the layout of buckets, their order, and who is refused, with
a handle that stands for CUDA's; with one: the real way into another process."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.cuda_ipc import IpcBucket, IpcHandle, IpcReceiver, IpcSender, gpu_uuid
from rlsys.workers.weights import Handover

CPU = torch.device("cpu")
SHAPES = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
    ),
    max_size=9,
)


@dataclass(frozen=True)
class Handle:
    """Stands for CUDA's: names memory of this process."""

    key: int
    gpu: str = ""


class Memory:
    """Opens what it exported, and counts both."""

    def __init__(self, gpu: str = "") -> None:
        self.buffers: list[torch.Tensor] = []
        self.opened = 0
        self.gpu = gpu

    def export(self, buffer: torch.Tensor) -> Handle:
        self.buffers.append(buffer)
        return Handle(len(self.buffers) - 1, self.gpu)

    def open(self, handle: Handle, _device: torch.device) -> torch.Tensor:
        self.opened += 1
        return self.buffers[handle.key]


def sender(weights: Any, memory: Memory, bucket_bytes: int = 256) -> IpcSender:
    return IpcSender(
        weights,
        allocate=lambda n: torch.empty(n, dtype=torch.uint8),
        export=memory.export,
        wait=lambda: None,
        bucket_bytes=bucket_bytes,
    )


@given(shapes=SHAPES, bucket=st.integers(16, 300))
def test_what_is_read_is_what_was_packed_though_the_bucket_is_written_over(shapes: Any, bucket: int) -> None:
    weights = [(f"w{i}", (torch.rand(shape) * 99).to(dtype)) for i, (dtype, shape) in enumerate(shapes)]
    memory, received = Memory(), []
    sending, receiver = sender(weights, memory, bucket), IpcReceiver(memory.open)
    while (packed := sending.next()) is not None:
        assert len(packed.entries) == 1 or packed.nbytes <= bucket
        received += list(receiver.tensors(packed, CPU))
    assert [name for name, _ in received] == [name for name, _ in weights]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, weights, strict=True))
    assert sending.checksum.hexdigest() == weights_checksum(weights)
    assert memory.opened == len(memory.buffers), "an export is opened once"


def test_one_update_exports_one_bucket() -> None:
    memory = Memory()
    sending, receiver = sender([(f"w{i}", torch.ones(20)) for i in range(40)], memory), IpcReceiver(memory.open)
    rounds = 0
    while (packed := sending.next()) is not None:
        rounds += 1
        list(receiver.tensors(packed, CPU))
    assert rounds > 5
    assert len(memory.buffers) == memory.opened == 1


def test_each_rank_offers_its_own_gpu_and_a_stranger_is_told() -> None:
    weights = [("w", torch.arange(3.0))]
    here, there = Memory(), Memory("GPU-there")
    mine, theirs = sender(weights, here).next(), sender(weights, there).next()
    assert mine is not None
    assert theirs is not None
    both = theirs.merged([mine])
    assert torch.equal(dict(IpcReceiver(here.open).tensors(both, CPU))["w"], weights[0][1])
    with pytest.raises(ValueError, match="GPU-there"):
        list(IpcReceiver(there.open).tensors(theirs, CPU))
    with pytest.raises(ValueError, match="different weights"):
        both.merged([IpcBucket((), (), 0)])


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError) as error:
        gpu_uuid(CPU)
    assert error.value.where == "rollout.sync"
    with pytest.raises(TypeError, match="no CUDA handle"):
        IpcHandle.of(torch.zeros(8, dtype=torch.uint8))


def bucket(name: str) -> IpcBucket:
    return IpcBucket((name,), (), 0)


def test_a_sender_waits_until_its_bucket_was_read() -> None:
    handover, read = Handover(), []
    first, second = handover.offer(bucket("a")), handover.offer(bucket("b"))
    parcels = iter(handover)
    read.append(next(parcels))
    assert not first.done()
    read.append(next(parcels))
    assert first.done()
    assert not second.done()
    end = handover.offer(None)
    reader = threading.Thread(target=lambda: read.extend(parcels))
    reader.start()
    end.result(timeout=30)
    reader.join()
    assert second.done()
    assert [parcel.handles for parcel in read] == [("a",), ("b",)]


def test_an_update_that_breaks_off_keeps_no_sender_waiting() -> None:
    handover = Handover()
    waiting: list[Future[None]] = [handover.offer(bucket("a")), handover.offer(bucket("b"))]
    parcels = iter(handover)
    next(parcels)
    with pytest.raises(RuntimeError):
        parcels.throw(RuntimeError("it broke"))  # type: ignore[attr-defined]
    handover.abandon(RuntimeError("it broke"))
    waiting.append(handover.offer(None))
    for future in waiting:
        with pytest.raises(RuntimeError, match="broke"):
            future.result(timeout=1)


def _read(connection: Any) -> None:
    """In another process: the checksum of everything that comes."""
    receiver, kept = IpcReceiver(), []
    while (packed := connection.recv()) is not None:
        kept += list(receiver.tensors(packed, torch.device("cuda", 0)))
        torch.cuda.synchronize()
        connection.send(True)
    receiver.close()
    connection.send(weights_checksum(kept))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_another_process_reads_them_on_the_gpu() -> None:
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=_read, args=(theirs,))
    reader.start()
    device = torch.device("cuda", 0)
    weights = [(f"w{i}", torch.randn(300, 100 + i, device=device).bfloat16()) for i in range(50)]
    weights.append(("large", torch.randn(3 << 20, device=device)))  # more than a bucket
    sending = IpcSender(
        weights, allocate=lambda n: torch.empty(n, dtype=torch.uint8, device=device), bucket_bytes=1 << 20
    )
    while (packed := sending.next()) is not None:
        ours.send(packed)
        assert ours.recv()
    ours.send(None)
    assert ours.recv() == weights_checksum(weights) == sending.checksum.hexdigest()
    reader.join(60)
    before = torch.cuda.memory_allocated()
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() <= before
