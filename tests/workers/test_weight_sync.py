"""What the hosts of trainer ranks and samplers say about how weights can travel between them."""

from __future__ import annotations

import pytest

from rlsys.engines.sync.transport import choose
from rlsys.workers.weight_sync import placement
from rlsys.workers.weights import Host


def on(host: str, *gpus: str) -> Host:
    return Host(host, gpu=bool(gpus), gpus=gpus)


@pytest.mark.parametrize(
    ("trainer", "samplers", "chosen"),
    [
        ([on("a", "0")], [on("a", "0")], "cuda_ipc"),
        ([on("a", "0"), on("b", "4")], [on("a", "0"), on("b", "4")], "cuda_ipc"),
        ([on("a", "0")], [on("a", "0"), on("a", "1")], "shared_memory"),
        ([on("a", "0")], [on("a", "0"), on("b", "4")], "object_store"),
        ([on("a", "0")], [on("b", "4"), on("b", "4")], "object_store"),
        ([on("a", "0"), on("a", "1")], [on("a", "1"), on("b", "4")], "nccl"),
        ([on("a", "0")], [on("b", "4", "5"), on("b", "6", "7")], "nccl"),
        ([on("a", "0")], [on("b")], "object_store"),
        ([on("a")], [on("a")], "shared_memory"),
        ([on("a")], [on("b", "4")], "object_store"),
    ],
)
def test_the_way_follows_from_where_everybody_is(trainer: list[Host], samplers: list[Host], chosen: str) -> None:
    """NCCL: only where rank 0 and the samplers' ranks share no GPU; other trainer ranks do not meet them."""
    assert choose("auto", vllm=True, **placement(trainer, samplers)) == chosen
