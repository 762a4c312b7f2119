"""Disks that fill up, checkpoints that rot, an object store that is too small, a gradient that is no number."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from chaos_runs import SAMPLES, Chaos, surviving
from running import environment, steps_of

from rlsys.checkpoint.store import CheckpointStore
from rlsys.tracking.ledger import State

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


STORE = 2 << 20
# A cluster with a store smaller than Ray allows, and in it twice as much as it holds, which belongs to somebody else.
CLUSTER = f"""
import sys
import numpy, ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES = 1
cluster = Cluster(initialize_head=True, head_node_args=dict(
    num_cpus=2, object_store_memory={STORE}, include_dashboard=False, object_spilling_directory=sys.argv[1]))
ray.init(cluster.address, log_to_driver=False)
held = [ray.put(numpy.zeros(1 << 20, numpy.uint8)) for _ in range({2 * STORE >> 20})]
print("at", cluster.address, flush=True)
input()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[str]:
    """Address of a cluster with an object store that is full."""
    spilled = tmp_path / "spilled"
    spilled.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(spilled)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=str(Path(__file__).parent.parent)),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address = next(line.split()[1] for line in process.stdout if line.startswith("at "))
    assert list(spilled.rglob("*")), "nothing has been spilled"
    yield address
    process.stdin.close()
    process.wait(60)


def test_a_full_object_store_holds_sampling_back_and_the_run_ends_well(chaos: Chaos, small_store: str) -> None:
    """What is sampled ahead is more than the share of the store that groups may take; Ray spills the rest to disk."""
    steps, prompts, samples, bound = 10, 8, 16, 8
    run = chaos(
        "cluster=ray",
        f"cluster.address='{small_store}'",
        "controller=async",
        f"controller.max_staleness={bound}",
        "algorithm.loss=decoupled_ppo",
        f"steps={steps}",
        f"data.prompts_per_step={prompts}",
        f"rollout.samples_per_prompt={samples}",
        "data.max_response_tokens=96",
    )
    assert run.ends() == 0
    assert any(line["async/held_back"] > 0 for line in steps_of(run.folder))
    found = surviving(run.folder)
    assert len(found.trained_ids) == steps * prompts * samples
    assert found.groups[State.TRAINED] == steps * prompts
