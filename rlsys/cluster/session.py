"""A connection to a Ray cluster: one of our own for the run, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.cluster.placement import ActorSpec, Plan
from rlsys.config.clusters import ClusterConfig, address_of
from rlsys.config.errors import UserError

_CONNECT_S = 30
INLINE_BYTES = 16 << 10
"""Larger answers stay in the object store. Ray's own limit of 100 KiB would keep shards of a few samples in the
driver's memory, and send their tokens on from there."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Session:
    """A live connection. gpus: of all nodes; cores: of the smallest node; nodes: how many; local: started for this run;
    logs: folder of Ray's own logs on this machine."""

    gpus: int
    cores: int
    nodes: int
    local: bool
    logs: str


@contextmanager
def connect(config: ClusterConfig, *, weights_bytes: int = 0) -> Iterator[Session]:
    """Starts or joins a cluster; on leaving, everything that the run started is gone.

    Args:
        weights_bytes: of one copy of the model in the sampler's dtype, which passes through the object store.

    Raises:
        UserError: no cluster at ``cluster.address``.
    """
    address = address_of(config)
    local = address is None
    logging.getLogger("ray").setLevel(logging.ERROR)  # importing ray has set it lower
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", str(_CONNECT_S))
    if local:
        os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))
    try:
        if address is not None:
            probe(address)
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
            f"no Ray cluster answers at '{address}': {str(error).splitlines()[0]}",
            where="cluster.address",
            fix="start one with `ray start --head`, or choose cluster=local for one of the run's own",
        ) from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Session(
            gpus=int(sum(node.get("GPU", 0) for node in nodes)),
            cores=int(min(node.get("CPU", 1) for node in nodes)),
            nodes=len(nodes),
            local=local,
            logs=str(context.address_info.get("session_dir", "")),
        )
    finally:
        ray.shutdown()


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

    Raises:
        UserError: the GPUs were not free in time.
    """

    def __init__(self, plan: Plan, *, seconds: float, check: Callable[[], None] = lambda: None):
        self.plan = plan
        self._group: PlacementGroup | None = None
        if plan.bundles:
            self._group = placement_group(list(plan.bundles), strategy="PACK")
            if not self._booked(self._group, seconds, check):
                self.release()
                raise UserError(
                    f"{len(plan.bundles)} GPUs were not free within {seconds:g} s",
                    where="cluster",
                    fix="wait for the other jobs, or lower trainer.ranks and rollout.workers",
                )

    def options(self, actor: ActorSpec) -> dict[str, object]:
        """Ray's options for this actor. CPU shares are not booked: the stages of a step take turns."""
        options: dict[str, object] = {"num_cpus": 0, "num_gpus": actor.gpus, "runtime_env": {"env_vars": actor.env}}
        if self._group is not None and actor.bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=actor.bundle
            )
        return options

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
