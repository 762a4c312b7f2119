"""What outlived a driver that was killed: found by ``processes.json`` of its run, and ended.

Ray ends a run's processes when its driver is gone; this is for what it missed or has not got to yet. A process is only
touched where its number, start and host are those that were written down: never one that was given the number since.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from rlsys.cluster.processes import Process, machine, on, read, started

_ENDS_S = 10.0
_POLL_S = 0.05
_ANSWER_S = 60.0


def end_here(folder: Path) -> list[Process]:
    """Ends, on this host, what is left of the run in ``folder``, with all processes below.

    Returns:
        Those of the run's processes that were alive.
    """
    return end(read(folder))


def end_elsewhere(folder: Path) -> list[Process]:
    """The same on the other hosts of the cluster that this process is connected to."""
    elsewhere = [process for process in read(folder) if process.machine != machine()]
    if not elsewhere:
        return []
    here = ray.get_runtime_context().get_node_id()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    task = ray.remote(num_cpus=0, max_retries=0)(end)
    asked = [task.options(scheduling_strategy=on(node)).remote(elsewhere) for node in nodes]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    found: list[Process] = []
    for ref in done:
        with suppress(ray.exceptions.RayError):  # a host that left meanwhile has nothing running
            found += ray.get(ref)
    return found


def end(processes: Sequence[Process]) -> list[Process]:
    """Kills those that are of this host and alive, and what is below them. Returns them, without what was below.

    Nothing where the driver is alive, this process or another: it has let go of the run folder, so that its run came to
    an end, and it goes on with something else (a notebook), for which it needs what is below it.
    """
    left = [process for process in processes if is_alive(process)]
    if any(process.role == "driver" or process.pid == os.getpid() for process in left):
        return []
    doomed = {(process.pid, process.started) for process in left}
    for process in left:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                if (ticks := started(child.pid)) is not None and child.pid != os.getpid():
                    doomed.add((child.pid, ticks))
    deadline = time.monotonic() + _ENDS_S
    while doomed and time.monotonic() < deadline:
        for pid, ticks in list(doomed):
            if started(pid) != ticks:
                doomed.discard((pid, ticks))
                continue
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, 9)
        time.sleep(_POLL_S)
    return left


def is_alive(process: Process) -> bool:
    """Whether it runs on this host, and is the one that was written down."""
    return process.machine == machine() and started(process.pid) == process.started
