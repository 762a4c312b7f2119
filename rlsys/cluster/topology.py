"""What a cluster is made of: its hosts, and which of them are one NVLink domain. Pure data, from the configuration
alone (:func:`expected`), from a live Ray cluster (:func:`found`) or from this machine (:func:`this_host`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.cluster.hardware import NODES, POOL_NODES, Gpu, NodeType, gpu_named, node_type, numa_memory_of
from rlsys.config.clusters import ClusterConfig, Gb10, Gb10Pair, Gb200Nvl72, GpuPool, H100Node, LocalCluster, RayCluster

DOMAIN_LABEL = "nvidia.com/gpu.clique"
"""A node's NVLink domain, CLUSTER_UUID.CLIQUE_ID: the label that NVIDIA's GPU feature discovery sets on Kubernetes, and
that ``ray start --labels`` is given elsewhere."""
DOMAIN_RESOURCE = "nvlink_domain:"
"""Before a domain's name: a custom resource that says the same where nodes cannot be labelled."""
_ACCELERATOR = "accelerator_type:"
_GIB = 2**30


@dataclass(frozen=True)
class Node:
    """One host. id: Ray's, or a made-up one; type: None where it is none that is known; gpus, cores: that Ray may give
    out; domain: of NVLink; None: its GPUs reach no other host by it; labels: Ray's."""

    id: str
    address: str
    type: NodeType | None
    gpus: int
    cores: int
    memory_gib: float
    domain: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpu(self) -> Gpu | None:
        return self.type.gpu if self.type is not None else None

    @property
    def reach(self) -> str:
        """Of the GPUs that its own reach by the fast interconnect: the domain, or the host alone."""
        return self.domain if self.domain is not None else self.id


@dataclass(frozen=True)
class Topology:
    """A cluster. name: of the configuration's ``cluster.kind``; nodes: none where only a live cluster can say."""

    name: str
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    @property
    def cores(self) -> int:
        return sum(node.cores for node in self.nodes)

    @property
    def unified(self) -> bool:
        """Whether host and GPU have one memory."""
        return any(node.gpu is not None and node.gpu.unified for node in self.nodes)

    def domains(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that take part, by the domain that they reach each other in; a host without NVLink to others is
        one of its own. In the order of the nodes."""
        result: dict[str, list[Node]] = {}
        for node in self.nodes:
            if node.gpus or (node.cores and not self.gpus):
                result.setdefault(node.reach, []).append(node)
        return {name: tuple(nodes) for name, nodes in result.items()}

    def node(self, name: str) -> Node:
        """Raises KeyError where there is none of that id."""
        for node in self.nodes:
            if node.id == name:
                return node
        raise KeyError(name)


def one_host(*, gpus: int, cores: int, name: str = "local") -> Topology:
    """A single host of unknown type."""
    return Topology(name, (Node("host", "127.0.0.1", None, gpus, cores, 0.0),))


def expected(config: ClusterConfig) -> Topology:
    """What the configuration says is there; ``local`` is this machine, and ``ray`` has no nodes: a live one says."""
    match config:
        case LocalCluster():
            return this_host()
        case RayCluster():
            return Topology(config.kind, ())
        case GpuPool():
            kind = POOL_NODES[config.gpu]
            share = min(config.gpus_per_node / kind.gpus, 1.0)  # of a node of which others have the rest
            cores, memory = max(1, int(kind.cores * share)), kind.memory_gib * share
            names = [f"node-{n:03d}" for n in range(config.nodes)]
            nodes = [Node(name, name, kind, config.gpus_per_node, cores, memory) for name in names]
        case Gb200Nvl72():
            nodes = [
                _of_type(f"rack-{rack:02d}-tray-{tray:02d}", NODES["gb200_tray"], f"rack-{rack:02d}")
                for rack in range(config.racks)
                for tray in range(config.trays)
            ]
        case Gb10() | Gb10Pair() | H100Node():
            count = 2 if isinstance(config, Gb10Pair) else 1
            kind = NODES["h100_node" if isinstance(config, H100Node) else "gb10"]
            nodes = [_of_type(f"{kind.name}-{n}" if count > 1 else kind.name, kind, None) for n in range(count)]
    return Topology(config.kind, tuple(nodes))


def found(nodes: Iterable[Mapping[str, Any]], name: str = "ray") -> Topology:
    """The live ones of ``ray.nodes()``, ordered by domain and address."""
    result = []
    for node in nodes:
        if not node["Alive"]:
            continue
        resources, labels = node.get("Resources", {}), node.get("Labels", {})
        gpus = int(resources.get("GPU", 0))
        kinds = [gpu_named(r.removeprefix(_ACCELERATOR)) for r in resources if r.startswith(_ACCELERATOR)]
        kind = node_type(next(iter(kinds), None), gpus) if gpus else None
        named = [r.removeprefix(DOMAIN_RESOURCE) for r in resources if r.startswith(DOMAIN_RESOURCE)]
        result.append(
            Node(
                str(node.get("NodeID", "")),
                str(node.get("NodeManagerAddress", "")),
                kind,
                gpus,
                int(resources.get("CPU", 0)),
                float(resources.get("memory", 0)) / _GIB,
                labels.get(DOMAIN_LABEL) or next(iter(named), None),
                labels,
            )
        )
    return Topology(name, tuple(sorted(result, key=lambda n: (n.domain or "", _numbers(n.address), n.id))))


def this_host(proc: Path = Path("/proc")) -> Topology:
    """This machine, from what the kernel says of it.

    Args:
        proc: where it says so.
    """
    products = []
    for path in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        products.append(model[1] if model else "")
    products = [products[number] for number in visible_devices(len(products), os.environ.get("CUDA_VISIBLE_DEVICES"))]
    total = re.search(r"^MemTotal:\s*(\d+) kB", (proc / "meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    gpu = gpu_named(products[0]) if products else None
    memory = (int(total[1]) * 1024 - numa_memory_of(gpu)[0]) / _GIB if total else 0.0
    kind = node_type(gpu, len(products)) if products else None
    return Topology("local", (Node("host", "127.0.0.1", kind, len(products), os.cpu_count() or 1, memory),))


def visible_devices(count: int, visible: str | None) -> list[int]:
    """Which of ``count`` GPUs ``CUDA_VISIBLE_DEVICES`` leaves: numbers up to the first that does not exist, as CUDA
    reads it; names (``GPU-…``, ``MIG-…``) are counted. None: it is not set."""
    if visible is None:
        return list(range(count))
    kept: list[int] = []
    for word in (word.strip() for word in visible.split(",")):
        if word.startswith(("GPU-", "MIG-")) and len(kept) < count:
            kept.append(len(kept))
        elif word.isdigit() and int(word) < count:
            kept.append(int(word))
        else:
            break
    return kept


def slurm_segment(gpus: int) -> int:
    """Nodes that ``sbatch --segment`` keeps in one block (an NVLink domain) of GB200 NVL72s, for a job of so many GPUs:
    from 128 up sixteen of a rack's eighteen trays, so that two may be out of order; from 32 up four; else one.
    """
    return 16 if gpus >= 128 else 4 if gpus >= 32 else 1


def fabric_domain(query: str) -> str | None:
    """A node's NVLink domain, CLUSTER_UUID.CLIQUE_ID, from what ``nvidia-smi -q`` says of its fabric; None: it is in
    none (an all-zero UUID is no fabric's)."""
    uuid = re.search(r"^\s*Cluster\s?UUID\s*:\s*([0-9a-fA-F-]{36})\s*$", query, re.MULTILINE)
    clique = re.search(r"^\s*Clique\s?I[Dd]\s*:\s*(\d+)\s*$", query, re.MULTILINE)
    if uuid is None or clique is None or not uuid[1].strip("0-"):
        return None
    return f"{uuid[1].lower()}.{clique[1]}"


def _of_type(name: str, kind: NodeType, domain: str | None) -> Node:
    return Node(name, name, kind, kind.gpus, kind.cores, kind.memory_gib, domain)


def _numbers(address: str) -> tuple[tuple[int, int | str], ...]:
    """10.0.0.9 before 10.0.0.10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", address) if part)
