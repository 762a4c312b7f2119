"""Shards: what some ranks wrote, any other number of ranks reads; what is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlsys.checkpoint.shards import Shard, ShardReader, write_shards
from rlsys.config.errors import UserError


def chunk(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    size = -(-rows // ranks)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def write(folder: Path, tensors: dict[str, torch.Tensor], ranks: int) -> list[Path]:
    files = []
    for rank in range(ranks):
        shards = {}
        for name, tensor in tensors.items():
            start, stop = chunk(tensor.numel(), rank, ranks)
            shards[name] = Shard(tensor.view(-1)[start:stop], tuple(tensor.shape), start)
        files.append(write_shards(folder, "model", rank, ranks, shards))
    return files


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: int, writers: int, readers: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {"a": torch.randn(rows, 3), "b.c": torch.arange(2 * rows).bfloat16()}
    write(folder, tensors, writers)
    with ShardReader(folder, "model") as reader:
        assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
            for rank in range(readers):
                start, stop = chunk(tensor.numel(), rank, readers)
                part = reader.read_flat(name, start, stop)
                assert part.dtype == tensor.dtype
                assert torch.equal(part, tensor.view(-1)[start:stop])


def test_slices_by_rows_and_by_elements_are_one_layout(tmp_path: Path) -> None:
    tensor = torch.randn(5, 3)
    write_shards(tmp_path, "model", 0, 2, {"a": Shard(tensor[:3], (5, 3), 0)})
    write_shards(tmp_path, "model", 1, 2, {"a": Shard(tensor.view(-1)[9:], (5, 3), 9)})
    with ShardReader(tmp_path, "model") as reader:
        assert torch.equal(reader.read("a"), tensor)


@pytest.mark.parametrize("copies", [2, 3, 7])
def test_ranks_that_hold_the_same_write_it_once(tmp_path: Path, copies: int) -> None:
    tensor = torch.randn(5)
    files = [
        write_shards(tmp_path, "model", copy, copies, {"a": Shard(tensor, (5,), 0, copies, copy)})
        for copy in range(copies)
    ]
    assert sum(load_file(file)["a"].numel() for file in files) == 5
    with ShardReader(tmp_path, "model") as reader:
        assert torch.equal(reader.read("a"), tensor)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": torch.randn(6, 2)}, 3)
    files[1].unlink()
    with pytest.raises(UserError, match="not one complete set"):
        ShardReader(tmp_path, "model")
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(UserError, match="no model files"):
        ShardReader(tmp_path, "model")


def test_files_of_two_sets_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.randn(6, 2)}, 3)
    write(tmp_path, {"a": torch.randn(6, 2)}, 2)
    with pytest.raises(UserError, match="not one complete set"):
        ShardReader(tmp_path, "model")


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    (file,) = write(tmp_path, {"a": torch.randn(6, 2)}, 1)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="not a shard") as error:
        ShardReader(tmp_path, "model")
    assert error.value.where == str(file)
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="not a shard"):
        ShardReader(tmp_path, "model")


def test_unknown_tensors_and_elements_nobody_wrote(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", 0, 1, {"a": Shard(torch.zeros(2, 3), (5, 3), 0)})
    with ShardReader(tmp_path, "model") as reader:
        with pytest.raises(UserError, match="no tensor 'b'"):
            reader.read("b")
        with pytest.raises(UserError, match="elements 6 to 15"):
            reader.read("a")


def test_a_slice_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ValueError, match="not within"):
        Shard(torch.zeros(2, 3), (5, 3), 10)
    with pytest.raises(ValueError, match="not within"):
        Shard(torch.zeros(2), (5,), -1)
