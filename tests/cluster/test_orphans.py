"""What outlived a run: found and ended, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlsys.cluster import processes
from rlsys.cluster.orphans import end_here, is_alive
from rlsys.cluster.processes import Process

# A process with one below it, which says its number.
PARENT = (
    "import subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)']); "
    "print(child.pid, flush=True); child.wait()"
)


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def written(pid: int) -> Process:
    started = processes.started(pid)
    assert started is not None
    return Process("rollout_0", "here", processes.machine(), "node", pid, started, "sampler")


def child_of(parent: subprocess.Popen[str]) -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


def test_a_process_and_what_is_below_it_is_ended(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    child = child_of(parent)
    processes.write(tmp_path, [written(parent.pid)])
    (found,) = end_here(tmp_path)
    assert found.pid == parent.pid
    assert parent.wait(5) == -9
    assert processes.started(child) is None
    assert end_here(tmp_path) == []


@pytest.mark.parametrize("changed", [{"started": 1}, {"machine": "another/pid:[1]"}])
def test_a_number_that_was_given_out_again_or_is_of_another_host_is_left_alone(
    parent: subprocess.Popen[str], tmp_path: Path, changed: dict[str, object]
) -> None:
    child = child_of(parent)
    processes.write(tmp_path, [replace(written(parent.pid), **changed)])
    assert end_here(tmp_path) == []
    assert parent.poll() is None
    os.kill(child, 9)


def test_this_very_process_is_left_alone(tmp_path: Path) -> None:
    processes.write(tmp_path, [written(os.getpid())])
    assert end_here(tmp_path) == []


def test_a_process_that_only_waits_to_be_buried_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    entry = written(process.pid)
    assert is_alive(entry)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(entry)
    process.wait()


@pytest.mark.parametrize("content", ["", "{", '[{"pid": 1}]', "null"])
def test_a_file_that_cannot_be_read_ends_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / processes.NAME).write_text(content)
    assert end_here(tmp_path) == []
    assert end_here(tmp_path / "nothing") == []


def test_nothing_is_ended_by_the_process_that_the_earlier_run_was_driven_by(
    parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    child_of(parent)
    processes.write(tmp_path, [written(os.getpid()), written(parent.pid)])
    assert end_here(tmp_path) == []
    assert parent.poll() is None


def test_a_driver_that_lives_on_keeps_what_is_below_it(parent: subprocess.Popen[str], tmp_path: Path) -> None:
    child = child_of(parent)
    processes.write(tmp_path, [replace(written(parent.pid), role="driver"), replace(written(child), role="ray")])
    assert end_here(tmp_path) == []
    assert processes.started(child) is not None
    assert parent.poll() is None
    os.kill(child, 9)
