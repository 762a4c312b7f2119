"""The checksum changes with everything that changes what a model computes, and with nothing else."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.engines.sync.checksum import (
    Piece,
    WeightsChecksum,
    pieces_checksum,
    row_hashes,
    tensor_digest,
    weights_checksum,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (3, 5), "c": (7,), "d": (300, 301)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1, 2, 3, 1001, 70_000, 140_001]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 31),
)
def test_one_flipped_bit_changes_it(dtype: torch.dtype, size: int, where: float, bit: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    flipped = tensor.clone()
    word = flipped.view(torch.int32 if dtype == torch.float32 else torch.int16)
    index, width = int(where * size), word.element_size() * 8
    word[index] ^= torch.tensor(1 << (bit % width), dtype=torch.int64).to(word.dtype)
    assert tensor_digest(flipped) != tensor_digest(tensor)


@given(first=st.integers(0, 9_999), second=st.integers(0, 9_999))
def test_two_swapped_elements_change_it(first: int, second: int) -> None:
    tensor = torch.arange(1.0, 10_001.0)
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    assert (tensor_digest(swapped) == tensor_digest(tensor)) == (first == second)


def test_negating_a_tensor_changes_it() -> None:
    tensor = torch.randn(1 << 17, generator=torch.Generator().manual_seed(1))
    assert tensor_digest(-tensor) != tensor_digest(tensor)


def test_two_swapped_tensors_change_it() -> None:
    given = weights()
    swapped = given | {"a": given["b"], "b": given["a"]}
    assert weights_checksum(swapped.items()) != weights_checksum(given.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype_count(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6, dtype=dtype)
    others = [torch.zeros(6, 4, dtype=dtype), torch.zeros(4, 7, dtype=dtype), torch.zeros(0, 6, dtype=dtype)]
    others += [torch.zeros(4, 6, dtype=d) for d in DTYPES if d != dtype]
    assert len({tensor_digest(t) for t in [tensor, *others]}) == 1 + len(others)


def test_a_missing_or_renamed_tensor_changes_it() -> None:
    given = weights()
    less = {k: v for k, v in given.items() if k != "c"}
    assert len({weights_checksum(w.items()) for w in (given, less, less | {"e": given["c"]})}) == 3


def test_order_memory_layout_and_bucket_do_not_matter() -> None:
    given = weights()
    other = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in given.items()}
    assert weights_checksum(reversed(other.items())) == weights_checksum(given.items())


def test_a_subnormal_number_and_a_negative_zero_count() -> None:
    tiny = struct.unpack("<f", struct.pack("<I", 7))[0]
    given = [torch.tensor([0.0, value, 0.0]) for value in (0.0, -0.0, tiny, -tiny)]
    assert len({tensor_digest(tensor) for tensor in given}) == len(given)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[torch.Tensor, list[Piece]]:
    """A tensor and how ranks hold it: row shards of column shards, some of them twice."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
    ranks = draw(st.sampled_from([1, 2, 4]))
    rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 64, 256])) * ranks
    tensor = (torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) * 99).to(dtype)
    if draw(st.booleans()):
        parts = [(0, rank * columns // ranks, part) for rank, part in enumerate(tensor.chunk(ranks, 1))]
    else:
        cut = draw(st.integers(0, rows))
        parts = [(0, 0, tensor[:cut]), (cut, 0, tensor[cut:])] * draw(st.integers(1, 2))
    pieces = [
        Piece(
            "w", str(dtype)[6:], (rows, columns), row, part.shape[1], row_hashes(part, first, columns).numpy().tobytes()
        )
        for row, first, part in parts
    ]
    return tensor, draw(st.permutations(pieces))


@given(cuts())
def test_ranks_together_have_the_checksum_of_the_whole(given: tuple[torch.Tensor, list[Piece]]) -> None:
    tensor, pieces = given
    assert pieces_checksum([piece] for piece in pieces) == weights_checksum([("w", tensor)])


def test_ranks_that_differ_where_they_hold_the_same_or_leave_a_part_out_are_refused() -> None:
    tensor = torch.randn(4, 6)
    whole = Piece("w", "float32", (4, 6), 0, 6, row_hashes(tensor).numpy().tobytes())
    with pytest.raises(ValueError, match="differ"):
        pieces_checksum([[whole], [replace(whole, hashes=row_hashes(tensor + 1).numpy().tobytes())]])
    with pytest.raises(ValueError, match="in part"):
        pieces_checksum([[replace(whole, hashes=whole.hashes[:16])]])
    with pytest.raises(ValueError, match="dtype or shape"):
        pieces_checksum([[whole], [replace(whole, shape=(6, 4))]])


def test_a_change_below_the_samplers_precision_is_none_in_its_dtype() -> None:
    exact = {name: tensor.bfloat16() for name, tensor in weights().items()}
    nudged = {name: tensor.float() * (1 + 2e-7) for name, tensor in exact.items()}
    assert weights_checksum(nudged.items(), torch.bfloat16) == weights_checksum(exact.items())
    assert weights_checksum(nudged.items()) != weights_checksum(
        (name, tensor.float()) for name, tensor in exact.items()
    )


def test_it_is_the_same_on_every_machine() -> None:
    tensor = torch.arange(200_000, dtype=torch.float32).reshape(400, 500)
    assert weights_checksum([("w", tensor), ("b", tensor[0].bfloat16())]) == "5cd50102e616f392fde03a04cd4c2e66"


def test_what_passes_through_is_counted_once() -> None:
    checksum = WeightsChecksum()
    given = weights()
    assert dict(checksum.through(given.items())) == given
    assert checksum.hexdigest() == weights_checksum(given.items())
    with pytest.raises(ValueError, match="'a'"):
        checksum.add("a", given["a"])
