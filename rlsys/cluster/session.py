"""A connection to a Ray cluster: one of our own for the run, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.cluster.placement import ActorSpec, Plan
from rlsys.config.errors import UserError
from rlsys.config.schema import ClusterConfig

_CONNECT_S = 30


@dataclass(frozen=True)
class Session:
    """A live connection. gpus, cores: what the cluster has; logs: folder of Ray's own logs on this machine."""

    gpus: int
    cores: int
    local: bool
    logs: str


@contextmanager
def connect(config: ClusterConfig) -> Iterator[Session]:
    """Starts or joins a cluster; on leaving, everything that the run started is gone.

    Raises:
        UserError: no cluster at ``cluster.address``.
    """
    local = config.address is None
    logging.getLogger("ray").setLevel(logging.ERROR)  # importing ray has set it lower
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", str(_CONNECT_S))
    try:
        if config.address is not None:
            _probe(config.address)
        context = ray.init(
            address="local" if local else config.address,
            include_dashboard=False if local else None,
            num_cpus=os.cpu_count() if local else None,
            object_store_memory=int(config.object_store_gib * 2**30) if local else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {"HYDRA_FULL_ERROR": "1"}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        if local:
            raise
        raise UserError(
            f"no Ray cluster answers at '{config.address}': {str(error).splitlines()[0]}",
            where="cluster.address",
            fix="start one with `ray start --head`, or leave cluster.address out for one of the run's own",
        ) from error
    try:
        total = ray.cluster_resources()
        logs = str(context.address_info.get("session_dir", ""))
        yield Session(int(total.get("GPU", 0)), int(total.get("CPU", 1)), local, logs)
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Raises OSError where nobody listens at ``host:port``: Ray itself tries again for many minutes. Other forms of
    address (``auto``, ``ray://…``) are Ray's to look up."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


class Placement:
    """Books a plan's bundles and says how each actor is to be started."""

    def __init__(self, plan: Plan, *, seconds: float):
        self.plan = plan
        self._group: PlacementGroup | None = None
        if plan.bundles:
            self._group = placement_group(list(plan.bundles), strategy="PACK")
            if not self._group.wait(seconds):
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

    def release(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
