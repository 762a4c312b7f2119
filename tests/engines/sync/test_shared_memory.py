"""Weights in shared memory arrive in another process as they were written, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.shared_memory import Segment, SharedBucket, _mapped, host_identity

TENSORS = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
        st.lists(st.integers(0, 40), min_size=0, max_size=3),
    ),
    max_size=8,
)


def make(shapes: list) -> list[tuple[str, torch.Tensor]]:
    return [(f"w{i}", (torch.rand(shape) * 99).to(dtype)) for i, (dtype, shape) in enumerate(shapes)]


@given(updates=st.lists(TENSORS.filter(len), min_size=1, max_size=3))
def test_what_is_mapped_is_what_was_written(updates: list) -> None:
    """Also when the memory is written again, with more or with less."""
    segment = Segment()
    for shapes in updates:
        weights = make(shapes)
        written = [(name, tensor.clone()) for name, tensor in segment.write(weights)]
        for got in (written, list(segment.bucket().tensors())):
            assert [name for name, _ in got] == [name for name, _ in weights]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(got, weights, strict=True))
    segment.release()


READER = """
import pickle, sys, warnings
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.shared_memory import host_identity
warnings.simplefilter("error")
print(weights_checksum(pickle.load(sys.stdin.buffer).tensors()), host_identity())
"""


def test_another_process_maps_it() -> None:
    segment, weights = Segment(), make([(torch.bfloat16, [300, 20]), (torch.float32, [7])])
    for _ in segment.write(weights):
        pass
    bucket = pickle.dumps(segment.bucket())
    done = subprocess.run([sys.executable, "-c", READER], input=bucket, capture_output=True, check=False)
    assert done.stdout.decode().split() == [weights_checksum(weights), host_identity()], done.stderr.decode()


def test_released_memory_is_gone() -> None:
    segment = Segment()
    for _ in segment.write([("w", torch.ones(10))]):
        pass
    bucket = segment.bucket()
    assert os.path.exists(bucket.path)
    segment.release()
    assert not os.path.exists(bucket.path)
    with pytest.raises(FileNotFoundError):
        list(bucket.tensors())


class Changing:
    """Main memory whose free part changes."""

    def __init__(self, free: int):
        self.free, self.total = free, 80

    def __call__(self) -> tuple[int, int]:
        return self.free, self.total


def written(segment: Segment) -> SharedBucket:
    for _ in segment.write([("w", torch.ones(10))]):
        pass
    return segment.bucket()


@pytest.mark.parametrize(("free", "kept"), [(80, True), (10, True), (9, False), (0, False)])
def test_the_memory_stays_while_others_have_room(free: int, kept: bool) -> None:
    """Whatever its own size: an eighth of all must be free beside it."""
    segment = Segment(memory=Changing(free))
    bucket = written(segment)
    segment.let_go()
    assert bucket.kept is kept is os.path.exists(bucket.path)
    segment.release()


def test_the_same_pages_are_written_again_while_they_are_kept() -> None:
    memory = Changing(80)
    segment = Segment(memory=memory)
    inodes = []
    for memory.free in (80, 80, 0, 80):
        inodes.append(os.stat(written(segment).path).st_ino)
        segment.let_go()
    assert inodes[0] == inodes[1] == inodes[2] != inodes[3]
    segment.release()


def test_a_receiver_lets_go_of_what_is_not_kept_any_more() -> None:
    """Though it had kept it mapped before: memory that somebody maps does not go back to the system."""
    memory = Changing(80)
    segment = Segment(memory=memory)
    for memory.free in (80, 0):
        assert sum(1 for _ in written(segment).tensors()) == 1
        assert bool(_mapped) is (memory.free > 0)
        segment.let_go()


def test_it_is_said_once_that_memory_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    segment = Segment(memory=Changing(0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            written(segment)
            segment.let_go()
    assert [r.levelname for r in caplog.records if "main memory" in r.message] == ["WARNING"]
