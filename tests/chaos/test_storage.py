"""Disks that fill up, checkpoints that rot, an object store that is too small, a gradient that is no number."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_runs import SAMPLES, Chaos, surviving
from running import steps_of

from rlsys.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(chaos: Chaos, small_disk: Path) -> None:
    run = chaos("steps=1000", f"run_root={small_disk / 'runs'}")
    assert run.ends() in (1, 2)
    said = run.said.read_text()
    assert "disk is full" in said
    (folder,) = (small_disk / "runs").iterdir()
    store = CheckpointStore(folder / "checkpoints", 9, True)  # which clears what a writer left
    newest = store.latest()
    assert newest is not None
    assert newest.step >= 1
    assert run.left() == []
    spare = sorted((folder / "checkpoints").iterdir())[:-1]
    for path in spare:  # room is made, and the run goes on
        shutil.rmtree(path)
    run.start(f"run_root={small_disk / 'runs'}", "resume=auto", f"steps={newest.step + 1}", "checkpoint.keep_last=1")
    assert run.ends() == 0
    assert len(surviving(folder).trained_ids) == (newest.step + 1) * SAMPLES


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
