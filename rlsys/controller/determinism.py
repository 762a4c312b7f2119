"""Computing the same bits again: what has to be set for it, and a report of what is."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rlsys.engines.train.state import seed_generators

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_FIXED = ":4096:8"
"""A workspace of fixed size for each stream: without it cuBLAS may sum in another order each time (NVIDIA, cuBLAS,
"Results Reproducibility"). It is read when the first handle is made."""


@contextmanager
def deterministic(seed: int, *, threads: int = 1) -> Iterator[None]:
    """Within it torch takes deterministic kernels or raises, with ``threads`` threads, from seeded generators. The
    generators are left as they are then; everything else is put back."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
        os.environ.get(CUBLAS),
    )
    os.environ.setdefault(CUBLAS, CUBLAS_FIXED)
    _set(True, True, False, threads)
    seed_generators(seed, 0, 0)
    try:
        yield
    finally:
        _set(*before[:4])
        if before[4] is None:
            del os.environ[CUBLAS]


def _set(algorithms: bool, cudnn: bool, benchmark: bool, threads: int) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.backends.cudnn.deterministic = cudnn
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


def report(seed: int, device: torch.device) -> dict[str, Any]:
    """What decides whether this process computes the same bits again, and a trial of it. JSON content.

    Args:
        seed: of the run; every generator's follows from it.
    """
    words = np.random.SeedSequence([seed, 0, 0]).generate_state(3)
    return {
        "seeds": {"run": seed, **dict(zip(("torch", "numpy", "python"), map(int, words), strict=True))},
        "samples": "each sample's seed is a function of run seed, prompt uid, sample index and attempt",
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": {
            "deterministic": torch.backends.cudnn.deterministic,
            "benchmark": torch.backends.cudnn.benchmark,
        },
        "cublas_workspace": os.environ.get(CUBLAS),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "python_hash_seed": os.environ.get("PYTHONHASHSEED"),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "product_repeated": repeats(device),
    }


def repeats(device: torch.device, size: int = 192) -> bool:
    """Whether a matrix product and its gradient, computed twice, have the same bits. The global generators are left
    alone."""
    made = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=made).to(device)
    right = torch.randn(size, size, generator=made).to(device)

    def once() -> torch.Tensor:
        weight = left.clone().requires_grad_()
        (weight @ right).square().sum().backward()
        assert weight.grad is not None
        return weight.grad

    return torch.equal(once(), once())
