"""Memory that is given back and taken again in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines import storages as module
from rlsys.engines.storages import Emptied, HostMemory, Offloaded, own, storages
from rlsys.tracking.memory import pss_bytes


@given(sizes=st.lists(st.integers(0, 50), max_size=6), block=st.integers(1, 64), start=st.integers(0, 30))
def test_what_was_offloaded_comes_back_bit_for_bit(sizes: list[int], block: int, start: int) -> None:
    """Views too, NaNs included, wherever the blocks of main memory end."""
    tensors = [torch.randint(-(2**31), 2**31, (size,)).to(torch.int32).view(torch.float32) for size in sizes]
    views = [tensor[1:] for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        host = HostMemory(pinned=False)
        for _ in range(2):
            away = Offloaded(storages([*tensors, *views], "cpu"), host, start)
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
            away.restore()
    for tensor, view, old in zip(tensors, views, before, strict=True):
        assert torch.equal(tensor.view(torch.int32), old.view(torch.int32))
        assert torch.equal(view.view(torch.int32), old[1:].view(torch.int32))


def test_a_storage_counts_once_and_only_on_its_device() -> None:
    whole = torch.ones(10)
    assert len(storages([whole, whole[3:], torch.empty(0)], "cpu")) == 1
    assert storages([whole], "cuda") == []


def test_memory_really_falls_and_comes_back() -> None:
    import os

    tensor = torch.ones(50 << 20, dtype=torch.float32)  # 200 MiB
    view = tensor[5:]
    with_it = pss_bytes(os.getpid())
    emptied = Emptied(storages([tensor], "cpu"))
    assert with_it - pss_bytes(os.getpid()) > 150 << 20
    assert emptied.nbytes == 200 << 20
    emptied.restore()
    tensor.fill_(2)
    assert view[-1] == 2


def test_memory_of_somebody_else_is_left_for_its_own() -> None:
    array = bytearray(16)
    tensor = torch.frombuffer(array, dtype=torch.float32)
    own([tensor])
    Emptied(storages([tensor], "cpu")).restore()
    assert len(array) == 16
    assert tensor.shape == (4,)
