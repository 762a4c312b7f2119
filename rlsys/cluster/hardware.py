"""What is known of GPUs and nodes: data-sheet figures as plain data, no torch and no Ray.

Rates are decimal (GB/s of 10⁹ bytes) and for one direction, memory is what the driver reports (GiB), arithmetic is
dense (no structured sparsity). Prices are rough on-demand ones of 2026, to compare with and not to bill by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    memory_gib: of the GPU; where ``unified``, of the host and the GPU together, which have the same.
    bandwidth_gbs: of that memory.
    tflops: peak of dense matrix products, 10¹² a second, by dtype (``bfloat16``, ``fp8``, ``fp4``); without a dtype:
        no units for it.
    capability: CUDA compute capability.
    """

    name: str
    memory_gib: float
    bandwidth_gbs: float
    tflops: Mapping[str, float]
    capability: tuple[int, int]
    unified: bool = False


@dataclass(frozen=True)
class NodeType:
    """One host.

    gpus: how many; cores: of the CPUs; memory_gib: main memory (the GPU's own where it is unified).
    arch: of the CPUs, as ``uname -m`` says.
    link_gbs: of a GPU to the others of its domain; 0: it has none.
    network_gbs: of the node to others, all ports together.
    dollars_per_hour: of the node.
    """

    name: str
    gpu: Gpu | None
    gpus: int
    cores: int
    memory_gib: float
    arch: str
    link_gbs: float
    network_gbs: float
    dollars_per_hour: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 79.2, 2039, {"float32": 19.5, "bfloat16": 312}, (8, 0)),
        Gpu("H100", 79.1, 3350, {"float32": 67, "bfloat16": 989, "fp8": 1979}, (9, 0)),
        Gpu("H200", 139.7, 4800, {"float32": 67, "bfloat16": 989, "fp8": 1979}, (9, 0)),
        Gpu("B200", 178.3, 7700, {"float32": 75, "bfloat16": 2250, "fp8": 4500, "fp4": 9000}, (10, 0)),
        Gpu("GB200", 184.0, 8000, {"float32": 80, "bfloat16": 2500, "fp8": 5000, "fp4": 10000}, (10, 0)),
        # One petaFLOP is the data sheet's figure for sparse FP4.
        Gpu("GB10", 119.6, 273, {"float32": 31, "bfloat16": 125, "fp8": 250, "fp4": 500}, (12, 1), unified=True),
    )
}
"""By the name that Ray gives them (``ray.util.accelerators``), and the driver within its product name."""

TRAYS_PER_RACK = 18
"""Compute trays of an NVL72, of four GPUs each: 72 GPUs are one NVLink domain (130 TB/s in all)."""

GB10_SAMPLER_CEILING = 0.85
"""Of unified memory, what trainer and sampler may have together; the operating system has none of its own elsewhere."""

NODES: dict[str, NodeType] = {
    node.name: node
    for node in (
        NodeType("cpu_host", None, 0, 16, 62.0, "x86_64", 0.0, 1.25, 0.6),
        # Two 200 GbE ports hang on two PCIe Gen5 x4 links: 200 Gb/s together, whichever cable they go through.
        NodeType("gb10", GPUS["GB10"], 1, 20, 119.6, "aarch64", 0.0, 25.0, 0.2),
        NodeType("a100_node", GPUS["A100"], 8, 128, 1900.0, "x86_64", 300.0, 200.0, 16.0),
        NodeType("h100_node", GPUS["H100"], 8, 112, 1900.0, "x86_64", 450.0, 400.0, 24.0),
        NodeType("h200_node", GPUS["H200"], 8, 112, 1900.0, "x86_64", 450.0, 400.0, 28.0),
        NodeType("b200_node", GPUS["B200"], 8, 112, 1900.0, "x86_64", 900.0, 400.0, 40.0),
        # Two Grace CPUs and four GPUs. Their memory shows up as NUMA nodes too; those have no CPU.
        NodeType("gb200_tray", GPUS["GB200"], 4, 144, 880.0, "aarch64", 900.0, 200.0, 24.0),
    )
}

POOL_NODES = {name: NODES[f"{name.lower()}_node"] for name in ("A100", "H100", "H200", "B200")}
"""The node of a ``gpu_pool``, by the name of its GPU."""


def gpu_named(product: str) -> Gpu | None:
    """The GPU that a driver's or Ray's name is of (``NVIDIA H100 80GB HBM3``, ``H100``); None: not one of these."""
    words = product.upper().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def node_type(gpu: Gpu | None, gpus: int) -> NodeType | None:
    """The node with so many of this GPU, or else one with more, of which so many are there; None: it is not known."""
    known = [node for node in NODES.values() if node.gpu == gpu and node.gpus >= gpus]
    return min(known, key=lambda node: node.gpus) if known else None


def compute_numa_nodes(cpus_of_node: Mapping[int, str]) -> list[int]:
    """NUMA nodes with CPUs. The memory of a GB200's GPUs shows up as nodes without any, to which no process can be
    bound and whose memory is not the host's.

    Args:
        cpus_of_node: by node, the text of ``/sys/devices/system/node/nodeN/cpulist``.
    """
    return sorted(number for number, cpus in cpus_of_node.items() if cpus.strip())


def numa_memory_of(gpu: Gpu | None, nodes: Path = Path("/sys/devices/system/node")) -> tuple[int, int]:
    """Total and free bytes of a GB200's memory in what the kernel says is main memory; of other GPUs there is none.

    Args:
        nodes: where the kernel says what each NUMA node has.
    """
    if gpu is not GPUS["GB200"]:
        return 0, 0
    folders = {int(folder.name.removeprefix("node")): folder for folder in nodes.glob("node[0-9]*")}
    own = compute_numa_nodes({n: (folder / "cpulist").read_text(encoding="ascii") for n, folder in folders.items()})
    total, free = 0, 0
    for text in ((folders[n] / "meminfo").read_text(encoding="ascii") for n in folders.keys() - set(own)):
        said = dict(re.findall(r"(MemTotal|MemFree):\s*(\d+) kB", text))
        total += int(said.get("MemTotal", 0)) * 1024
        free += int(said.get("MemFree", 0)) * 1024
    return total, free
