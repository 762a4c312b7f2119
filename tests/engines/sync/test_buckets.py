"""Buckets carry tensors of any dtype and shape unchanged."""

from __future__ import annotations

import warnings

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.sync.buckets import pack

SHAPES = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]),
        st.lists(st.integers(0, 9), min_size=0, max_size=3),
    ),
    max_size=12,
)


@given(shapes=SHAPES, bucket_bytes=st.sampled_from([1, 64, 500, 1 << 20]))
def test_what_is_unpacked_is_what_was_packed(shapes: list, bucket_bytes: int) -> None:
    weights = [(f"w{i}", (torch.rand(shape) * 99).to(dtype)) for i, (dtype, shape) in enumerate(shapes)]
    buckets = list(pack(weights, bucket_bytes))
    unpacked = [item for bucket in buckets for item in bucket.tensors()]
    assert [name for name, _ in unpacked] == [name for name, _ in weights]
    for (_, sent), (_, got) in zip(weights, unpacked, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)
    assert all(len(b.entries) == 1 or b.data.nbytes <= bucket_bytes for b in buckets)


def test_tensors_are_views_also_of_read_only_memory() -> None:
    weight = torch.randn(4, 4)
    (bucket,) = pack([("w", weight.t())])
    bucket.data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, view),) = bucket.tensors()
    assert torch.equal(view, weight.t())
    assert view.data_ptr() == bucket.data.ctypes.data
