"""The processes of a run: who they are on every host, so that they can be looked at when they do not answer, and found
when the driver is no more.

A number is given out again once its process has ended. What is kept of a process is therefore its number, when it was
started by the clock of its kernel, and which boot and process namespace that number is of: together they never return.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.state import state as cluster_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.checkpoint.atomic import write_json

NAME = "processes.json"
_LOOK_S = 30.0


@dataclass(frozen=True)
class Found:
    """One process on the host where it was looked for. started: clock ticks since the host's boot; below: of the
    actor's process, which has children of its own."""

    pid: int
    started: int
    command: str
    below: bool = False


@dataclass(frozen=True)
class Process:
    """One process of a run.

    role: ``driver``, ``ray`` (a cluster that the run itself started), or ``ROLE_INDEX`` of an actor.
    machine: see :func:`machine`; node: Ray's id of the host.
    """

    role: str
    host: str
    machine: str
    node: str
    pid: int
    started: int
    command: str
    below: bool = False


@functools.cache
def machine() -> str:
    """This boot of this host, and the process namespace that we are in: where a process number means something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """Clock ticks from the host's boot to the start of a process; None: there is none, or it has ended already and
    only waits for its parent to notice."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def look(pids: Sequence[int]) -> tuple[str, str, dict[int, list[Found]]]:
    """This host's name and machine, and by number each of these processes with all below it."""
    return socket.gethostname(), machine(), {pid: _tree(pid) for pid in pids}


def _tree(pid: int) -> list[Found]:
    found = []
    with suppress(psutil.Error):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())[:120] or process.name()
                if (ticks := started(process.pid)) is not None:
                    found.append(Found(process.pid, ticks, command, below=process.pid != pid))
    return found


def actor_table(handles: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What Ray's head knows of actors, whether or not they answer: by name their ``State``, ``Pid`` and ``Address``.

    Args:
        handles: by name.
    """
    ids = {handle._actor_id.hex(): name for name, handle in handles.items() if hasattr(handle, "_actor_id")}
    if not ids:
        return {}
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    table = cluster_state.actor_table(None, job_id=job)
    return {ids[actor]: entry for actor, entry in table.items() if actor in ids}


def alive(table: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    """By name: host (Ray's id) and process number, of those that run."""
    return {
        name: (str(entry["Address"]["NodeID"]), int(entry["Pid"]))
        for name, entry in table.items()
        if entry["State"] == "ALIVE"
    }


def of_run(actors: Mapping[str, tuple[str, int]], *, local: bool) -> list[Process]:
    """The driver, actors (as :func:`alive` has them) and all below them, on every host that answers.

    Args:
        local: the run has a Ray cluster of its own, whose processes are listed too.
    """
    here = ray.get_runtime_context().get_node_id()
    by_node: dict[str, dict[int, str]] = {}
    for name, (node, pid) in actors.items():
        by_node.setdefault(node, {})[pid] = name
    processes = []
    for node, (host, where, trees) in _looked(by_node, here).items():
        for pid, tree in trees.items():
            role = by_node[node][pid]
            processes += [Process(role, host, where, node, **asdict(found)) for found in tree]
    known = {process.pid for process in processes if process.node == here}
    own = [found for found in _tree(os.getpid()) if found.pid not in known and (local or not found.below)]
    driver = [
        Process("ray" if found.below else "driver", socket.gethostname(), machine(), here, **asdict(found))
        for found in own
    ]
    return [*driver, *processes]


def _looked(by_node: Mapping[str, Iterable[int]], here: str) -> dict[str, tuple[str, str, dict[int, list[Found]]]]:
    """:func:`look` on every host; one that does not answer is left out."""
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        node: task.options(scheduling_strategy=on(node)).remote(list(by_node[node])) for node in by_node if node != here
    }
    found = {here: look(list(by_node[here]))} if here in by_node else {}
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LOOK_S)
    for node, ref in asked.items():
        with suppress(ray.exceptions.RayError):
            found[node] = ray.get(ref, timeout=0.1)
    return found


def on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def write(folder: Path, processes: Sequence[Process]) -> None:
    """``processes.json``, in one go."""
    write_json(folder / NAME, [asdict(process) for process in processes])


def read(folder: Path) -> list[Process]:
    """Empty where there is none, or where a full disk left none that can be read: nothing can be looked for then."""
    try:
        return [Process(**entry) for entry in json.loads((folder / NAME).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
