"""Shards: what some ranks wrote, any other number of ranks reads; what is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

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
            start, stop = chunk(len(tensor), rank, ranks)
            shards[name] = Shard(tensor[start:stop], tuple(tensor.shape), start)
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
                start, stop = chunk(len(tensor), rank, readers)
                part = reader.read(name, start, stop)
                assert part.dtype == tensor.dtype
                assert torch.equal(part, tensor[start:stop])


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


def test_unknown_tensors_and_rows_nobody_wrote(tmp_path: Path) -> None:
    write_shards(tmp_path, "model", 0, 1, {"a": Shard(torch.zeros(2, 3), (5, 3), 0)})
    with ShardReader(tmp_path, "model") as reader:
        with pytest.raises(UserError, match="no tensor 'b'"):
            reader.read("b")
        with pytest.raises(UserError, match="rows 2 to 5"):
            reader.read("a")


def test_a_slice_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ValueError, match="no slice"):
        Shard(torch.zeros(2, 3), (5, 4), 0)
    with pytest.raises(ValueError, match="not within"):
        Shard(torch.zeros(2, 3), (5, 3), 4)
