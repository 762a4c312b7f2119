"""Memory is that of the whole tree of processes, with shared pages counted once."""

import subprocess
import sys
from contextlib import ExitStack

import psutil
import pytest

from rlsys.tracking.memory import MemoryMonitor, pss_bytes

MIB = 1 << 20
SIZE = 96 * MIB

# Touches SIZE bytes, forks a child that reads them, says so, and waits for its standard input to end.
SHARING = f"""
import os, sys
block = bytearray(b"x") * {SIZE}
child = os.fork()
assert sum(block[:: 4096]) > 0
if child == 0:
    sys.stdin.read(); os._exit(0)
print(child, flush=True)
sys.stdin.read()
os.waitpid(child, 0)
"""


@pytest.fixture
def sharing():
    """A process and its child that share SIZE bytes; gives the pids of both."""
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", SHARING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        yield process.pid, int(process.stdout.readline())


def test_shared_pages_count_once(sharing: tuple[int, int]):
    resident = sum(psutil.Process(pid).memory_info().rss for pid in sharing)
    proportional = sum(pss_bytes(pid) for pid in sharing)
    assert resident > 2 * SIZE
    assert SIZE < proportional < 1.5 * SIZE


def test_descendants_are_found(sharing: tuple[int, int]):
    own = pss_bytes(psutil.Process().pid)
    monitor = MemoryMonitor()
    total = monitor.sample()
    assert total > own + SIZE * 0.9
    assert monitor.peak_bytes == monitor.last_bytes == total
    assert sum(monitor.peak_by_name.values()) == total


def test_an_orphan_stays_watched():
    """The parent dies after its child was seen; the child is handed to init."""
    script = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', "
    script += f"'b = bytearray(b\"x\") * {SIZE}; print(1, flush=True); input()']); print(p.pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.stdout.readline()
        monitor = MemoryMonitor()
        before = monitor.sample()
        parent.kill()
        parent.wait()
        try:
            assert monitor.sample() > before - SIZE / 2
            fresh = MemoryMonitor()
            unaware = fresh.sample()
            fresh.watch(child.pid)
            assert fresh.sample() > unaware + SIZE * 0.9
        finally:
            child.kill()


def test_the_peak_stays_when_memory_is_freed():
    with MemoryMonitor(interval_s=0.01) as monitor:
        block = bytearray(b"x") * SIZE
        during = monitor.sample()
        del block
        after = monitor.sample()
    assert after < during - SIZE / 2
    assert monitor.stop() >= during


def test_a_process_that_is_gone_weighs_nothing():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    assert pss_bytes(process.pid) == 0
