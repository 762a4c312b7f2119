"""The group ``cluster``: where a run takes place. What each kind is made of: ``rlsys/cluster/topology.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlsys.config.values import NonNegativeFloat, Positive


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """What every kind has.

    threads: CPU threads of a trainer rank, a sampler or the reference; null: a host's cores divided by its ranks.
    placement: of trainer and samplers. ``shared``: on the same GPUs, both loaded all the time; ``colocated``: there
        they take turns: samplers sleep while the trainer works, and it waits in main memory while they sample;
        ``disaggregated``: on GPUs (without any: cores) of their own.
    """

    threads: Positive | None = None
    placement: Literal["shared", "colocated", "disaggregated"] = "shared"


@dataclass(frozen=True, kw_only=True)
class LocalCluster(_Cluster):
    """This machine: a Ray cluster of the run's own."""

    kind: Literal["local"]


@dataclass(frozen=True, kw_only=True)
class RayCluster(_Cluster):
    """A Ray cluster that runs already, whatever it is made of.

    address: HOST:PORT; ``auto``: the one that this machine belongs to.
    """

    kind: Literal["ray"]
    address: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Shaped(_Cluster):
    """Kinds of which it is known what they are made of; a cluster that lacks some of it is refused.

    address: of a Ray cluster that runs there, as for ``ray``; null: this machine is all of it.
    """

    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gb10(_Shaped):
    """One DGX Spark: a GB10, whose CPU and GPU have one memory.

    page_cache_gib: of that memory, left to the operating system, files and Ray's object store.
    """

    kind: Literal["gb10"]
    page_cache_gib: NonNegativeFloat = 16.0


@dataclass(frozen=True, kw_only=True)
class Gb10Pair(_Cluster):
    """Two of them, linked by their 200 GbE ports: one trains, the other samples.

    address: as for ``ray``.
    page_cache_gib: of each, as for ``gb10``.
    """

    kind: Literal["gb10_pair"]
    address: str = "auto"
    page_cache_gib: NonNegativeFloat = 16.0


@dataclass(frozen=True, kw_only=True)
class H100Node(_Shaped):
    """One node of eight H100."""

    kind: Literal["h100_node"]


@dataclass(frozen=True, kw_only=True)
class GpuPool(_Cluster):
    """Nodes of the same GPUs.

    address: as for ``ray``.
    nodes: how many; gpus_per_node: of each; gpu: their kind.
    """

    kind: Literal["gpu_pool"]
    address: str = "auto"
    nodes: Positive
    gpus_per_node: Positive = 8
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"


@dataclass(frozen=True, kw_only=True)
class Gb200Nvl72(_Cluster):
    """Racks of 18 trays with four GB200 each: 72 GPUs are one NVLink domain.

    address: as for ``ray``.
    racks: how many; trays: of each (16 leave two to spare).
    """

    kind: Literal["gb200_nvl72"]
    address: str = "auto"
    racks: Positive = 1
    trays: Annotated[int, Field(ge=1, le=18, strict=True)] = 18


ClusterConfig = Annotated[
    LocalCluster | RayCluster | Gb10 | Gb10Pair | H100Node | GpuPool | Gb200Nvl72, Field(discriminator="kind")
]


def address_of(cluster: ClusterConfig) -> str | None:
    """Of a Ray cluster that runs already; None: the run starts one of its own."""
    return None if isinstance(cluster, LocalCluster) else cluster.address
