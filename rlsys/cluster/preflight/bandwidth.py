"""Rates measured on this machine and between the nodes of a cluster: main memory, disk, GPU copies, the network.

The best of a few repetitions, in GB/s of 10⁹ bytes. A rate far below what the topology says is a warning: the wrong
interface, a PCIe link with half its lanes, a disk that is shared."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.cluster.hardware import NodeType
from rlsys.cluster.preflight.report import Finding, Issue
from rlsys.workers.waits import Call, gather

_REPEATED = 3
_SECONDS = 120.0
_LOW = 0.4  # of the data sheet's rate, below which something is wrong: a stream through Ray is one of several


def memory_rates(size: int = 256 << 20) -> Finding:
    """Of a copy in main memory by one thread, and by all that torch has; bytes read and written both count.

    Args:
        size: bytes of the copied block; several times the caches.
    """
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    one = _best(lambda: np.copyto(target, source))
    from_, to = torch.from_numpy(source), torch.from_numpy(target)
    every = _best(lambda: to.copy_(from_))
    facts = {"one_thread_gbs": _rate(2 * size, one), "threads": torch.get_num_threads(), "gbs": _rate(2 * size, every)}
    return Finding(facts)


def disk_rates(folder: Path, size: int = 256 << 20) -> Finding:
    """Of one file written in ``folder`` until it is on the disk, and read again past the page cache.

    Raises:
        OSError: no such folder, no permission, or no room.
    """
    block = os.urandom(8 << 20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(len(block)):
                pass
        read = time.perf_counter() - began
    return Finding({"folder": str(folder), "write_gbs": _rate(size, written), "read_gbs": _rate(size, read)})


def gpu_rates(size: int = 256 << 20) -> Finding:
    """Of copies from pinned memory to each GPU and back, inside it (read and write both count), and from the first GPU
    to the others. No facts where there is no GPU."""
    if not torch.cuda.is_available():
        return Finding()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    facts: dict[str, Any] = {}
    blocks = [torch.empty(size, dtype=torch.uint8, device=f"cuda:{n}") for n in range(torch.cuda.device_count())]
    for number, block in enumerate(blocks):
        other = torch.empty_like(block)
        copies: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {
            "to": (size, block, host),
            "from": (size, host, block),
            "inside": (2 * size, other, block),
        }
        if number:
            copies["peer"] = (size, block, blocks[0])
        for name, (moved, to, source) in copies.items():
            facts[f"gpu{number}_{name}_gbs"] = _rate(moved, _best(partial(_copied, to, source)))
    return Finding(facts)


def against_sheet(finding: Finding, kind: NodeType | None) -> Finding:
    """The GPU's rates with a warning where one is far below the data sheet's."""
    if kind is None or kind.gpu is None or kind.gpu.unified:
        return finding
    issues = []
    for name, rate in finding.facts.items():
        sheet = (
            kind.gpu.bandwidth_gbs
            if name.endswith("_inside_gbs")
            else kind.link_gbs
            if name.endswith("_peer_gbs")
            else 0.0
        )
        if sheet and rate < _LOW * sheet:
            which = name.removesuffix("_gbs").replace("_", " ")
            what = f"{which} copies at {rate:g} GB/s, and the data sheet says {sheet:g}"
            fix = "see `nvidia-smi topo -m` and `nvidia-smi -q` for throttling, other processes and links that are down"
            issues.append(Issue("gpu_slow", "warning", what, name, fix))
    return Finding(finding.facts, (*finding.issues, *issues))


def network_rates(nodes: Sequence[Mapping[str, Any]], size: int = 128 << 20, *, expected_gbs: float = 0.0) -> Finding:
    """From each live node of ``ray.nodes()`` to the next one, through Ray's object store, as shards go. No facts with
    one node.

    Args:
        expected_gbs: that the topology says a node has to others; 0: not known.
    """
    alive = [node for node in nodes if node["Alive"]]
    if len(alive) < 2:
        return Finding()
    facts, issues = {}, []
    for source, target in zip(alive, [*alive[1:], alive[0]], strict=True):
        names = [f"{n['NodeManagerAddress']} {n['NodeID'][:6]}" for n in (source, target)]
        rate = max(_sent(source, target, names, size) for _ in range(_REPEATED))
        facts[" → ".join(names)] = round(rate, 3)
        if expected_gbs and rate < 0.1 * expected_gbs:  # one stream of TCP does not fill a fast link
            what = f"{rate:.2f} GB/s from {names[0]} to {names[1]}, and the link has {expected_gbs:g}"
            fix = "start Ray on the fast interface's address (ray start --node-ip-address=…), and check the cable"
            issues.append(Issue("network_slow", "warning", what, " → ".join(names), fix))
    return Finding({"gbs": facts}, tuple(issues))


def _make(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def _fetch(boxed: list[ray.ObjectRef], seconds: float) -> float:
    """In a task of the receiver: GB/s."""
    began = time.perf_counter()
    block = ray.get(boxed[0], timeout=seconds)
    return len(block) / 1e9 / (time.perf_counter() - began)


def _sent(source: Mapping[str, Any], target: Mapping[str, Any], names: Sequence[str], size: int) -> float:
    def at(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=where)

    block = at(source, _make).remote(size)
    call = Call(at(target, _fetch).remote([block], _SECONDS), f"node {names[1]}", f"{size >> 20} MiB from {names[0]}")
    return float(gather([call], phase="start", seconds=_SECONDS)[0])


def _copied(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source, non_blocking=True)
    for tensor in (to, source):
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the quickest of a few, the first one (which maps pages) left out."""
    run()
    times = []
    for _ in range(_REPEATED):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _rate(size: int, seconds: float) -> float:
    return round(size / 1e9 / max(seconds, 1e-9), 2)
