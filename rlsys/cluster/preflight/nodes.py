"""Every node of a live Ray cluster looked at by a task there, and compared with this host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.cluster.preflight.machine import Machine, look
from rlsys.cluster.preflight.network import interface, skew
from rlsys.cluster.preflight.report import Finding, Issue, Probe, Report, run_probes
from rlsys.cluster.preflight.software import same_versions
from rlsys.config.errors import UserError
from rlsys.workers.waits import ActorFailed, Call, DeadlineExceeded, StopFlag, gather

_PINGS = 3  # the quickest answer says most about a clock
_SECONDS = 120.0  # a node whose first worker process has to read its packages from a slow disk


@dataclass(frozen=True)
class Link:
    """What hosts reach each other by. env: of actors, by Ray's id of the node; gbit: that it should have, 0: not known;
    pinned: NCCL has to be told its interface."""

    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gbit: float = 0.0
    pinned: bool = False


@dataclass(frozen=True)
class Looked:
    """By the name of a node: machines that answered; ahead: seconds of their clocks, and how sure that is; failed: in
    words, of the others; ids: Ray's."""

    machines: Mapping[str, Machine]
    ahead: Mapping[str, tuple[float, float]]
    failed: Mapping[str, str]
    ids: Mapping[str, str] = field(default_factory=dict)


def look_at(nodes: Sequence[Mapping[str, Any]], *, seconds: float = _SECONDS, stop: StopFlag | None = None) -> Looked:
    """Asks all live ones of ``ray.nodes()`` at once.

    Raises:
        StopRequested: ``stop`` was requested.
    """
    alive = [node for node in nodes if node["Alive"]]
    asked = [Call(_task(node, look).remote(), _node(node), "a look at it", node) for node in alive]
    machines, ahead, failed = {}, {}, {}
    ids = {_name(node, alive): str(node["NodeID"]) for node in alive}
    deadline = time.monotonic() + seconds
    for call in asked:
        name = _name(call.payload, alive)
        try:
            left = max(deadline - time.monotonic(), 0.5)
            (machines[name],) = gather([call], phase="start", seconds=left, stop=stop)
            ahead[name] = min((_ahead(call.payload, left, stop) for _ in range(_PINGS)), key=lambda pair: pair[1])
        except (ActorFailed, DeadlineExceeded, UserError) as error:
            failed[name] = str(error)
    return Looked(machines, ahead, failed, ids)


def _clock() -> float:
    return time.time()


def _ahead(node: Mapping[str, Any], seconds: float, stop: StopFlag | None) -> tuple[float, float]:
    """Of the node's clock; a process that is there already answers."""
    sent = time.time()
    call = Call(_task(node, _clock).remote(), _node(node), "its clock")
    (there,) = gather([call], phase="start", seconds=seconds, stop=stop)
    return clock_range(sent, there, time.time())


def clock_range(sent: float, there: float, received: float) -> tuple[float, float]:
    """By how much another clock is ahead, as if it had been read half-way, and how far that may be off."""
    return there - (sent + received) / 2, (received - sent) / 2


def _task(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """The function as a task of that node."""
    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=where)


def _node(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']}"


def probes_of(looked: Looked, here: Machine, link: Link) -> list[Probe]:
    """Rows of the report."""
    return [
        Probe("nodes", lambda: answered(looked)),
        Probe("node interfaces", lambda: interfaces(looked, link)),
        Probe("versions", lambda: same_versions(here, looked.machines)),
        Probe("clocks", lambda: skew(looked.ahead)),
    ]


def answered(looked: Looked) -> Finding:
    """Whether each node could be asked; what its GPUs and memory are."""
    issues = []
    for node, said in looked.failed.items():
        if "No module named" in said:
            what = "the node has no rlsys (or another Python environment than this one)"
            fix = "install the same environment there, or start Ray there from it"
            issues.append(Issue("node_without_rlsys", "error", what, "nodes", fix, node))
        else:
            what = f"the node did not answer: {said.splitlines()[-1]}"
            issues.append(Issue("node_silent", "error", what, "nodes", "restart Ray there, or take it out", node))
    kinds = {gpu.name for machine in looked.machines.values() for gpu in machine.gpus}
    if len(kinds) > 1:
        what = f"the nodes' GPUs are not of one kind: {', '.join(sorted(kinds))}"
        issues.append(Issue("accelerator_mixed", "warning", what, "nodes", "the slowest sets the pace: use one kind"))
    for node, machine in looked.machines.items():
        if machine.gpu_reason.startswith("nvidia-smi"):
            fix = "restart the node, or reload its driver"
            issues.append(Issue("accelerator_broken", "error", machine.gpu_reason, "NVIDIA driver", fix, node))
    seen = {
        node: {"host": m.host, "cores": m.cores, "memory_gib": round(m.memory_total / 2**30, 1), "gpus": len(m.gpus)}
        for node, m in looked.machines.items()
    }
    return Finding({"nodes": seen}, tuple(issues))


def interfaces(looked: Looked, link: Link) -> Finding:
    """Whether actors on each node will talk through an interface that is there, and the fast one."""
    if len(looked.machines) < 2:
        return Finding()
    issues, told = [], {}
    for node, machine in looked.machines.items():
        given = {**machine.variables, **link.env.get(looked.ids.get(node, ""), {})}
        told[node] = given.get("NCCL_SOCKET_IFNAME") or given.get("GLOO_SOCKET_IFNAME") or "not told"
        seen = interface(replace(machine, variables=given), several_hosts=True, gbit=link.gbit, pinned=link.pinned)
        issues += [replace(issue, node=node) for issue in seen.issues]
    return Finding({"chosen": told, "gbit": link.gbit or None}, tuple(issues))


def check_nodes(here: Machine, link: Link | None = None, *, stop: StopFlag | None = None) -> Report:
    """Of the cluster that this process is connected to."""
    return run_probes(probes_of(look_at(ray.nodes(), stop=stop), here, link or Link()))


def _name(node: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """The node's address; where several have one (all on one host) with the beginning of its id."""
    address = str(node["NodeManagerAddress"])
    shared = sum(other["NodeManagerAddress"] == address for other in nodes) > 1
    return f"{address} ({node['NodeID'][:8]})" if shared else address
