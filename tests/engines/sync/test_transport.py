"""Which transport is chosen where, and which cannot act."""

from __future__ import annotations

from typing import Any

import pytest

from rlsys.config.errors import UserError
from rlsys.engines.sync.transport import choose


@pytest.mark.parametrize(
    ("place", "chosen"),
    [
        ({"one_host": True, "gpus": False, "vllm": True}, "shared_memory"),
        ({"one_host": True, "gpus": True, "vllm": True}, "shared_memory"),
        ({"one_host": True, "gpus": True, "vllm": True, "same_gpus": True}, "cuda_ipc"),
        ({"one_host": False, "gpus": True, "vllm": True, "same_gpus": True}, "cuda_ipc"),
        ({"one_host": False, "gpus": True, "vllm": True, "own_gpus": True}, "nccl"),
        ({"one_host": False, "gpus": True, "vllm": True}, "object_store"),
        ({"one_host": False, "gpus": True, "vllm": False, "own_gpus": True}, "object_store"),
        ({"one_host": False, "gpus": False, "vllm": True}, "object_store"),
    ],
)
def test_auto_follows_the_placement(place: dict[str, Any], chosen: str) -> None:
    assert choose("auto", **place) == chosen


@pytest.mark.parametrize("wanted", ["object_store", "delta"])
def test_the_object_store_is_everywhere(wanted: Any) -> None:
    assert choose(wanted, one_host=True, gpus=False, vllm=False) == wanted


@pytest.mark.parametrize(
    ("wanted", "place"),
    [
        ("shared_memory", {"one_host": False, "gpus": True, "vllm": True}),
        ("nccl", {"one_host": False, "gpus": False, "vllm": True}),
        ("nccl", {"one_host": False, "gpus": True, "vllm": True}),
        ("nccl", {"one_host": False, "gpus": True, "vllm": True, "same_gpus": True}),
        ("cuda_ipc", {"one_host": True, "gpus": False, "vllm": True}),
        ("cuda_ipc", {"one_host": True, "gpus": True, "vllm": True}),
        ("cuda_ipc", {"one_host": False, "gpus": True, "vllm": True, "own_gpus": True}),
    ],
)
def test_a_transport_that_cannot_act_is_refused(wanted: Any, place: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        choose(wanted, **place)
    assert error.value.where == "rollout.sync"
