"""Weights from GPU to GPU by NCCL, in packed buckets, over vLLM's own weight-transfer channel.

Trainer rank 0 and every rank of every sampler form one group. Both sides cut the weights into buckets by the same
index of names, dtypes and shapes, which the driver has sent ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsys.config.errors import UserError
from rlsys.engines.sync.buckets import Entry
from rlsys.engines.sync.checksum import WeightsChecksum

BUCKET_BYTES = 256 << 20
BUCKETS = 2  # one is filled while the other travels

Weights = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Meeting:
    """Where and as whom somebody joins the group. first_rank: of this sampler's ranks; the trainer's is 0."""

    host: str
    port: int
    first_rank: int
    world_size: int


@dataclass(frozen=True)
class Broadcast:
    """A parcel that is not here: it will be broadcast."""

    index: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(torch.empty(e.shape, dtype=getattr(torch, e.dtype), device="meta").nbytes for e in self.index)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise TypeError("broadcast weights are received by vLLM's own processes")


class Broadcaster:
    """Trainer rank 0's end. Blocks until every sampler has joined.

    Raises:
        UserError: vLLM, whose channel it is, is not installed beside the trainer.
    """

    def __init__(self, meeting: Meeting):
        try:
            from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
        except ModuleNotFoundError as error:
            raise UserError(
                "broadcasts between GPUs go over vLLM's channel, and vLLM is not installed where the trainer runs",
                where="rollout.sync",
                fix="install rlsys[gpu] on every node, or set rollout.sync=object_store",
            ) from error
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._group: Any = stateless_init_process_group(
            meeting.host, meeting.port, 0, meeting.world_size, self._device.index
        )

    def send(
        self, weights: Iterable[tuple[str, torch.Tensor]], index: Sequence[Entry]
    ) -> tuple[str, int, dict[str, float]]:
        """Broadcasts ``weights``, which are those that ``index`` lists, in its order.

        Returns:
            Their checksum, bytes, and seconds by part.
        """
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        # vLLM pulls the generator in streams of its own, which wait for nothing: the gathers, casts and hashes in it
        # would read weights that the optimiser, on another stream, is still writing.
        torch.cuda.synchronize(self._device)
        began, checksum, sizes = time.perf_counter(), WeightsChecksum(), [0]

        def on_device() -> Iterator[tuple[str, torch.Tensor]]:
            for entry, (name, tensor) in zip(index, weights, strict=True):
                if Entry.of(name, tensor, 0) != entry:
                    raise ValueError(f"'{name}' comes where the samplers were told to expect '{entry.name}'")
                moved = tensor.to(self._device)
                checksum.add(name, moved)
                sizes[0] += moved.nbytes
                yield name, moved

        packed_nccl_broadcast_producer(
            on_device(), self._group, 0, lambda item: item[1], buffer_size_bytes=BUCKET_BYTES, num_buffers=BUCKETS
        )
        torch.cuda.current_stream().synchronize()
        return checksum.hexdigest(), sizes[0], {"broadcast": time.perf_counter() - began}


class Listener:
    """The end of one rank of a sampler. rank: of this one within its sampler."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device):
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        self._device = device
        self._group: Any = stateless_init_process_group(
            meeting.host, meeting.port, meeting.first_rank + rank, meeting.world_size, device.index
        )

    def receive(self, index: Sequence[Entry], load: Any) -> None:
        """Args: load: takes a list of (name, tensor) a bucket, such as a vLLM model's ``load_weights``."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        packed_nccl_broadcast_consumer(
            iter([(e.name, (list(e.shape), getattr(torch, e.dtype))) for e in index]),
            self._group,
            0,
            settled(load, lambda: torch.cuda.current_stream(self._device).synchronize()),
            buffer_size_bytes=BUCKET_BYTES,
            num_buffers=BUCKETS,
            device=self._device,
        )


def settled(load: Callable[[Weights], object], wait: Callable[[], None]) -> Callable[[Weights], None]:
    """``load``, which returns when its copies are done. vLLM takes turns between two streams, and a layer that two
    buckets share keeps views of the first, from one stream's memory, until it is copied on the other: that memory must
    not be taken again before.

    Args:
        wait: for what was asked of the stream in use.
    """

    def load_and_wait(weights: Weights) -> None:
        load(weights)
        wait()

    return load_and_wait
