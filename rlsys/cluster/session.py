"""A connection to a Ray cluster: one of our own for the run, or one that runs already."""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import Config  # type: ignore[attr-defined] # compiled
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlsys.cluster.network import HostLook, chosen, look, network_env
from rlsys.cluster.placement import ActorSpec, Plan
from rlsys.cluster.shape import take_part
from rlsys.cluster.topology import DOMAIN_LABEL, Node, Topology, found, this_host
from rlsys.config.clusters import ClusterConfig, Gb10, address_of
from rlsys.config.errors import UserError

_CONNECT_S = 30
_AUTH_MODE = "RAY_AUTH_MODE"
_TOKEN_GIVEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_LOOK_S = 120  # a host starts a first process for it, and reads its packages from a slow disk
INLINE_BYTES = 16 << 10
"""Larger answers stay in the object store. Ray's own limit of 100 KiB would keep shards of a few samples in the
driver's memory, and send their tokens on from there."""
_POLL_S = 0.5
_ELSEWHERE_S = 5.0  # so long the domain that was planned is waited for, where another one may do
_ANY_DOMAIN = {DOMAIN_LABEL: "STRICT_PACK", "ray.io/node-id": "PACK"}


class HostsFailed(UserError):
    """Hosts of the cluster on which rlsys does not run.

    Args:
        failed: by host, why, as far as it is known.
    """

    def __init__(self, failed: Mapping[str, str]):
        said = "; ".join(f"{host}: {why.strip().splitlines()[-1]}" for host, why in failed.items())
        super().__init__(
            f"rlsys does not run on every host of the cluster: {said}",
            where="cluster",
            fix="install the same rlsys and Python on every host, or give them with submit=FILE (working_dir); of one "
            "that is silent see `ray status` and its logs",
        )
        self.failed = dict(failed)

    def __reduce__(self) -> tuple:
        return type(self), (self.failed,)


@dataclass(frozen=True)
class Session:
    """A live connection. topology: the hosts that the run may use; local: started for this run; logs: folder of Ray's
    own logs on this machine; env: by host, what its actors have in their environment."""

    topology: Topology
    local: bool
    logs: str
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.topology.gpus

    @property
    def cores(self) -> int:
        """Of the smallest host that has any."""
        return min((node.cores for node in self.topology.nodes if node.cores), default=1)

    @property
    def nodes(self) -> int:
        return len(self.topology.nodes)

    @property
    def said(self) -> str:
        """In words: ``16 GPUs on 2 hosts``."""
        size = f"{self.gpus} GPUs" if self.gpus else f"{max(self.topology.cores, 1)} CPU cores"
        return size if self.nodes == 1 else f"{size} on {self.nodes} hosts"

    def free(self) -> dict[str, int] | None:
        """By host, GPUs that nobody holds; None: this run alone is here."""
        if self.local or not self.gpus:
            return None
        there = available_resources_per_node()
        return {node.id: int(there.get(node.id, {}).get("GPU", 0)) for node in self.topology.nodes}


@contextmanager
def connect(config: ClusterConfig, *, weights_bytes: int = 0) -> Iterator[Session]:
    """Starts or joins a cluster; on leaving, everything that the run started is gone.

    Args:
        weights_bytes: of one copy of the model in the sampler's dtype, which passes through the object store.

    Raises:
        UserError: no cluster at ``cluster.address``, or not the one that ``cluster.kind`` describes.
    """
    address = address_of(config)
    local = address is None
    logging.getLogger("ray").setLevel(logging.ERROR)  # importing ray has set it lower
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", str(_CONNECT_S))
    if local:
        os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))
        if isinstance(config, Gb10) or this_host().unified:
            # It takes the GPU's memory for the host's, and kills for it.
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        own_token()
    try:
        if address is not None:
            probe(address)
        with free_agent_port():
            context = ray.init(
                address="local" if local else address,
                include_dashboard=False if local else None,
                num_cpus=os.cpu_count() if local else None,
                object_store_memory=object_store_bytes(weights_bytes) if local else None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
            )
    except (OSError, RuntimeError, ValueError) as error:
        if local:
            raise
        raise UserError(
            f"no Ray cluster answers at '{address}': {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where="cluster.address",
            fix="start one with `ray start --head`, or choose cluster=local for one of the run's own",
        ) from error
    try:
        topology = take_part(config, found(ray.nodes()))
        logs = str(context.address_info.get("session_dir", ""))
        yield Session(topology, local, logs, _environments(topology))
    finally:
        ray.shutdown()


def own_token() -> None:
    """A cluster of the run's own asks for Ray's token, whatever the environment says: who may connect to it may run
    code. The token is made where there is none, and no other user of this machine may read it.

    Raises:
        UserError: it can be neither made nor made private.
    """
    os.environ[_AUTH_MODE] = "token"
    Config.initialize("")  # Ray has read the variable already
    if any(os.environ.get(name) for name in _TOKEN_GIVEN):
        return  # where it comes from is the user's business
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"Ray's token cannot be kept to this user: {error}",
            where=str(path),
            fix="set RAY_AUTH_TOKEN_PATH to a file of this user's that holds one (`ray get-auth-token --generate`)",
        ) from error


def _environments(topology: Topology) -> dict[str, dict[str, str]]:
    """By host, what its actors need to reach those of the others."""
    hosts = [node for nodes in topology.domains().values() for node in nodes]
    if len(hosts) < 2 and not topology.unified:
        return {}
    looks = _looks(hosts)
    interfaces = chosen(looks, {node.id: node.address for node in hosts}) if len(hosts) > 1 else {}
    return {
        node.id: network_env(looks[node.id], interfaces.get(node.id), unified=topology.unified, gpus=topology.gpus > 0)
        for node in hosts
    }


def _looks(hosts: Sequence[Node]) -> dict[str, HostLook]:
    """What every host says of itself.

    Raises:
        HostsFailed: some do not answer, or have no rlsys.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = [task.options(scheduling_strategy=_on(node.id)).remote() for node in hosts]
    _, late = ray.wait(asked, num_returns=len(asked), timeout=_LOOK_S)
    addresses = Counter(node.address for node in hosts)
    looks, failed = dict[str, HostLook](), dict[str, str]()
    for node, ref in zip(hosts, asked, strict=True):
        name = node.address if addresses[node.address] == 1 else f"{node.address} ({node.id[:8]})"
        if ref in late:
            failed[name] = f"it started no process within {_LOOK_S} s"
            continue
        try:
            looks[node.id] = ray.get(ref)
        except ray.exceptions.RayError as error:
            failed[name] = str(error)
    if failed:
        raise HostsFailed(failed)
    return looks


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


@contextmanager
def free_agent_port() -> Iterator[None]:
    """Clusters that ``ray.init`` starts in here are one of several of a machine. Ray gives a node's agent, which takes
    jobs, a fixed port, has no option of ``ray.init`` for another, and without the port takes no jobs."""
    from ray._private import parameter

    kept = parameter.RayParams
    parameter.RayParams = partial(kept, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = kept


def object_store_bytes(weights_bytes: int) -> int:
    """Shared memory of a local cluster's object store: room for the weights on their way (one copy, and half of the
    next) and half a GiB for batches."""
    return int(1.5 * weights_bytes) + 2**29


def probe(address: str) -> None:
    """Raises OSError where nobody listens at ``host:port``: Ray itself tries again for many minutes. Other forms of
    address (``auto``, ``ray://…``) are Ray's to look up."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


class Placement:
    """Books a plan's bundles and says how each actor is to be started.

    Args:
        seconds: how long to wait for GPUs that others still hold.
        check: called while waiting; raises to end the wait.
        settle: the plan again, for the hosts that the bundles have landed on; None: there is one host.
        hosts: ids of those that the run may use: where the planned NVLink domain has been taken meanwhile, Ray may
            choose another one among them.

    Raises:
        UserError: the GPUs were not free in time.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        seconds: float,
        check: Callable[[], None] = lambda: None,
        settle: Callable[[Sequence[str]], Plan] | None = None,
        hosts: Collection[str] = (),
    ):
        self.plan = plan
        self._group: PlacementGroup | None = None
        if plan.bundles:
            asked = time.monotonic()
            elsewhere = plan.booking.one_domain and _may_be_anywhere(hosts)
            self._group = self._where_planned(plan)
            booked = self._booked(self._group, min(seconds, _ELSEWHERE_S) if elsewhere else seconds, check)
            if not booked and elsewhere:  # the domain that fits best has been taken meanwhile: any other will do
                self.release()
                self._group = placement_group(list(plan.bundles), topology_strategy=_ANY_DOMAIN)
                booked = self._booked(self._group, seconds - (time.monotonic() - asked), check)
            if not booked:
                self.release()
                gpus = sum(bundle["GPU"] for bundle in plan.bundles)
                raise UserError(
                    f"{gpus:g} GPUs were not free within {seconds:g} s",
                    where="cluster",
                    fix="wait for the other jobs, or lower trainer.ranks and rollout.workers",
                )
            if settle is not None:
                landed = placement_group_table(self._group)["bundles_to_node_id"]
                self.plan = settle([landed[index] for index in range(len(plan.bundles))])

    def options(self, actor: ActorSpec) -> dict[str, object]:
        """Ray's options for this actor. CPU shares are not booked: the stages of a step take turns."""
        options: dict[str, object] = {"num_cpus": 0, "num_gpus": actor.gpus, "runtime_env": {"env_vars": actor.env}}
        if self._group is not None and actor.bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=actor.bundle
            )
        elif actor.node is not None:
            options["scheduling_strategy"] = _on(actor.node)
        return options

    @staticmethod
    def _where_planned(plan: Plan) -> PlacementGroup:
        selectors = list(plan.booking.selectors)
        return placement_group(
            list(plan.bundles), strategy="PACK", bundle_label_selector=selectors if any(selectors) else None
        )

    @staticmethod
    def _booked(group: PlacementGroup, seconds: float, check: Callable[[], None]) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if group.wait(_POLL_S):
                return True
            check()
        return False

    def release(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _may_be_anywhere(hosts: Collection[str]) -> bool:
    """Whether Ray may choose the domain: this Ray can be asked to, and every host that has a domain is one of
    ``hosts`` (their ids), which the run may use."""
    if "topology_strategy" not in inspect.signature(placement_group).parameters:
        return False
    labelled = {node["NodeID"] for node in ray.nodes() if node["Alive"] and DOMAIN_LABEL in node.get("Labels", {})}
    return labelled <= set(hosts)
