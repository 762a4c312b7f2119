"""Disks that fill up, checkpoints that rot, an object store that is too small, a gradient that is no number."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from chaos_runs import SAMPLES, Chaos, surviving
from running import steps_of

from rlsys.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(chaos: Chaos, small_disk: Path) -> None:
    where = (f"run_root={small_disk / 'runs'}", "checkpoint.keep_last=2")
    run = chaos("steps=100000", *where)
    folders = small_disk / "runs"
    run.until(lambda: len(list(folders.glob("*/checkpoints/step-*"))) >= 2, "two checkpoints")
    (folder,) = folders.iterdir()
    other = small_disk / "of somebody else"
    with suppress(OSError), other.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    assert run.ends() == 2
    assert "the disk is full" in run.said.read_text()
    assert run.left() == []
    other.unlink()
    newest = CheckpointStore(folder / "checkpoints", 2, True).latest()
    assert newest is not None
    last = newest.step + 2
    run.start(*where, "resume=auto", f"steps={last}")
    assert run.ends() == 0
    assert len(surviving(folder).trained_ids) == last * SAMPLES
    assert not list((folder / "checkpoints").glob(".partial*"))


@pytest.mark.parametrize("fault", ["truncated", "a bit flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(chaos: Chaos, fault: str) -> None:
    run = chaos("steps=3")
    assert run.ends() == 0
    weights = next((run.folder / "checkpoints" / "step-00000003").glob("model-*.safetensors"))
    content = bytearray(weights.read_bytes())
    if fault == "truncated":
        del content[-100:]
    else:
        content[-1] ^= 1
    weights.write_bytes(content)
    run.start("resume=auto", "steps=5")
    assert run.ends() == 2
    before = run.folder / "checkpoints" / "step-00000002"
    assert f"resume={before}" in " ".join(run.said.read_text().split())
    run.start(f"resume={before}", "steps=5")
    assert run.ends() == 0
    lines = steps_of(run.folder)
    assert [(line["step"], line["lineage"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert len(surviving(run.folder).trained_ids) == 5 * SAMPLES


def test_folders_of_a_writer_that_was_killed_are_cleared(chaos: Chaos) -> None:
    run = chaos("steps=2")
    assert run.ends() == 0
    left = run.folder / "checkpoints" / ".partial-step-00000003"
    left.mkdir()
    (left / "model-00001-of-00001.safetensors").write_bytes(b"half")
    run.start("resume=auto", "steps=3")
    assert run.ends() == 0
    assert not left.exists()
