"""GPU kernels, and the one place that says whether they can be used here."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

_LOG = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels serve this tensor: on a CUDA device, in float32 or narrower, with Triton installed."""
    return tensor.is_cuda and tensor.dtype in DTYPES and _triton_is_there()


@functools.cache
def _triton_is_there() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    _LOG.warning("Triton is not installed: log-probs are computed with torch operations, which is slower")
    return False
