"""A delta turns what was sent last into what is new, bit for bit, whatever the dtype, the shape and the change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.batch.versions import WeightVersion
from rlsys.engines.sync.delta import DeltaBucket, DeltaSender, Mirror
from rlsys.engines.sync.verify import SyncError

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.uint8: torch.uint8}
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 4), (300, 301), (70_001,)])


def version(step: int) -> WeightVersion:
    return WeightVersion(0, step)


def held(mirror_bucket: object) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in mirror_bucket.tensors()}  # type: ignore[attr-defined]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(
        one.contiguous().reshape(-1).view(torch.uint8).numpy(), other.contiguous().reshape(-1).view(torch.uint8).numpy()
    )


@settings(max_examples=40)
@given(
    tensors=st.lists(st.tuples(st.sampled_from(sorted(DTYPES, key=str)), SHAPES), min_size=1, max_size=4),
    rates=st.lists(st.sampled_from([0.0, 0.001, 0.1, 1.0]), min_size=1, max_size=3),
    bucket_bytes=st.sampled_from([1, 500, 1 << 28]),
    seed=st.integers(0, 2**31),
)
def test_what_arrives_is_what_was_sent(tensors: list, rates: list[float], bucket_bytes: int, seed: int) -> None:
    """Any bits at all, NaN and both zeros among them, over several updates."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index, (dtype, shape) in enumerate(tensors):
        size = torch.empty(shape, dtype=dtype).nbytes
        weights[f"w{index}"] = (
            torch.randint(256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)
        )
    sender, mirror, base = DeltaSender(), Mirror(), None
    for step, rate in enumerate([1.0, *rates]):
        for tensor in weights.values():
            bits = tensor.reshape(-1).view(DTYPES[tensor.dtype])
            bits[torch.rand(bits.shape, generator=generator) < rate] ^= 1
        buckets = list(sender.encode(weights.items(), version(step), base, bucket_bytes=bucket_bytes))
        assert {bucket.base for bucket in buckets} == {base}
        arrived = held(mirror.apply(buckets))
        assert list(arrived) == list(weights)
        assert all(same_bits(arrived[name], tensor) for name, tensor in weights.items())
        base = version(step)
    mirror.release()


def encoded(sender: DeltaSender, weight: torch.Tensor, step: int, base: int | None) -> DeltaBucket:
    (bucket,) = sender.encode([("w", weight)], version(step), None if base is None else version(base))
    return bucket


def test_little_is_sent_where_little_changed_and_never_more_than_everything() -> None:
    weight = torch.randn(1000, 1000).bfloat16()
    sender = DeltaSender()
    full = encoded(sender, weight, 0, None).nbytes
    assert encoded(sender, weight, 1, 0).nbytes <= 100
    weight.view(torch.int16).view(-1)[::100] ^= 1
    assert encoded(sender, weight, 2, 1).nbytes < full / 40
    assert encoded(sender, -weight, 3, 2).nbytes == full


def test_everything_is_sent_where_the_receiver_has_something_else() -> None:
    sender, mirror = DeltaSender(), Mirror()
    weight = torch.randn(50, 50)
    mirror.apply([encoded(sender, weight, 0, None)])
    changes = encoded(sender, weight + 1, 1, 0)
    again = encoded(sender, weight + 2, 2, 0)  # the receiver never got the one in between
    assert again.base is None
    assert torch.equal(held(mirror.apply([again]))["w"], weight + 2)
    with pytest.raises(SyncError, match="changes to the weights"):
        mirror.apply([changes])
    assert mirror.version is None, "what it has is not built upon"


def test_an_encoding_that_breaks_off_is_not_built_upon() -> None:
    sender = DeltaSender()
    list(sender.encode([("w", torch.zeros(4)), ("v", torch.zeros(4))], version(0), None))

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(4)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(sender.encode(broken(), version(1), version(0)))
    (bucket,) = sender.encode([("w", torch.ones(4)), ("v", torch.ones(4))], version(2), version(0))
    assert bucket.base is None
